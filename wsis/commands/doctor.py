"""The command ``wsis doctor``."""

from __future__ import annotations

from wsis.errors import InputError


def doctor(arguments: list[str]) -> int:
    """Print what there is; returns the exit code."""
    if arguments:
        raise InputError("wsis doctor takes no options")
    from wsis.doctor import report

    print(report())
    return 0
