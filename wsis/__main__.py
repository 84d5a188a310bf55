"""``python -m wsis`` is the command ``wsis``."""

import sys

from wsis.cli import main

if __name__ == "__main__":
    sys.exit(main())
