"""The command ``wsis doctor``."""

from __future__ import annotations

from wsis.errors import InputError

_USAGE = "usage: wsis doctor\n\nWhat was built, what is installed, which devices there are."


def doctor(arguments: list[str]) -> int:
    """Print what there is; returns the exit code."""
    if arguments in (["-h"], ["--help"]):
        print(_USAGE)
        return 0
    if arguments:
        raise InputError("wsis doctor takes no options")
    from wsis.doctor import report

    print(report())
    return 0
