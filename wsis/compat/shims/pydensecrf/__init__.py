"""Importing ``pydensecrf`` from here gives :mod:`wsis.compat.pydensecrf` itself."""

import sys

import wsis.compat.pydensecrf

sys.modules[__name__] = wsis.compat.pydensecrf
for _name in ("densecrf", "eigen", "utils"):
    sys.modules[f"{__name__}.{_name}"] = getattr(wsis.compat.pydensecrf, _name)
