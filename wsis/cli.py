"""The command line: find the command, turn mistakes into messages.

A user's mistake is one line on stderr and exit code 2; a run that failed is exit code 1.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from wsis import __version__
from wsis.commands.options import suggestion
from wsis.errors import InputError, MissingExtraError

USAGE = """\
usage: wsis COMMAND [OPTIONS]

  train      learn masks from image-level labels; then evaluate and write the report
  evaluate   score a trained run, a folder of mask PNGs, or stored CAMs (evaluate cam)
  predict    masks of one image or a folder of images
  submit     masks of VOC's test images, packed for its evaluation server
  refine     stored CAMs, probabilities or labels of a folder of images to masks
  data       build a data set from its official archives, check one, look at a sample
  convert    the official RTC checkpoint to a wsis weights file
  bench      speed and memory on this machine, against a reference each
  doctor     what is installed, what was built, which devices there are

`wsis COMMAND --help` shows the options of a command.
"""


COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "refine",
    "submit",
    "data",
    "convert",
    "bench",
    "doctor",
)
"""Each is a function of this name in a module of this name in `wsis.commands`."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"wsis {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _fail(f"unknown command '{name}'{suggestion(name, COMMANDS)}; see wsis --help")
    try:
        return getattr(import_module(f"wsis.commands.{name}"), name)(rest)
    except (InputError, MissingExtraError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        # The operators need numpy alone; the commands need the extra `train`.
        if error.name is None or error.name.split(".")[0] == "wsis":
            raise
        return _fail(str(MissingExtraError(error.name, "train", f"wsis {name}")))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)


def _fail(message: str, *, code: int = 2) -> int:
    print(f"wsis: error: {message}", file=sys.stderr)
    return code
