"""Errors that are the user's to cure."""


class InputError(ValueError):
    """Bad input: one line that names the file or tensor, what was expected, what came, the cure.

    The command line prints it without a traceback and exits with code 2.
    """


class MissingExtraError(ImportError):
    """An optional dependency is absent; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"install it with: pip install '.[{extra}]' (in a clone of wsis)"
        )
