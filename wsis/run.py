"""``python -m wsis.run script.py ...``: a program that is not changed, on the operators of wsis.

Before the program starts, ``pydensecrf`` and ``bilateralfilter`` are put in place where they are
missing (:func:`wsis.compat.install`). Otherwise it runs as under ``python``: its folder is first on
the path, ``sys.argv`` and ``__name__`` are its own, its exit code is the exit code.
"""

from __future__ import annotations

import io
import runpy
import sys
import types
from pathlib import Path

USAGE = """\
usage: python -m wsis.run [--force] SCRIPT.py [ARGUMENTS]
       python -m wsis.run [--force] -m MODULE [ARGUMENTS]

  --force   take the place of pydensecrf and bilateralfilter even where they are installed
"""


def main(arguments: list[str]) -> int:
    """Runs a script or module; returns 2 where there is none, else when the program has ended."""
    force = arguments[:1] == ["--force"]
    rest = arguments[1:] if force else arguments
    if rest[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    as_module = rest[:1] == ["-m"]
    if len(rest) < 1 + as_module or (not as_module and rest[0].startswith("-")):
        print(USAGE, end="", file=sys.stderr)
        return 2
    if not as_module and not Path(rest[0]).is_file():
        print(f"wsis.run: error: {rest[0]}: no such file", file=sys.stderr)
        return 2

    from wsis.compat import install

    if as_module:
        install(force)
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        return 0
    script = rest[0]
    # As python itself does for a script; under -m this entry was the current folder.
    sys.path[0] = str(Path(script).resolve().parent)
    install(force)
    sys.argv = rest
    with io.open_code(str(Path(script).resolve())) as file:
        code = compile(file.read(), script, "exec")
    # A module of its own that stays in place: workers that multiprocessing spawns look for the
    # functions of the program in `__main__`, by its file, and so do pickles.
    program = types.ModuleType("__main__")
    program.__file__ = script
    program.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = program
    exec(code, program.__dict__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
