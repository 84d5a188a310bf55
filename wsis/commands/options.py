"""What the commands share: parsers whose errors help, and the next free name."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path
from typing import Any, NoReturn

from wsis.errors import InputError, MissingExtraError


def make_parser(command: str, description: str) -> Any:
    """A jsonargparse parser whose errors are InputErrors with a suggestion."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise MissingExtraError("jsonargparse", "train", f"wsis {command}") from error

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            known = [o.lstrip("-") for a in self._actions for o in a.option_strings]
            text = " ".join(str(message).split())
            unknown = re.search(r"(?:arguments: --|Option ')([\w.]+)", text)
            hint = suggestion(unknown[1], known) if unknown else ""
            raise InputError(f"{text}{hint}; see wsis {command} --help")

    return Parser(prog=f"wsis {command}", description=description)


def suggestion(word: str, known: Any) -> str:
    """Says which known word is meant, where one is close."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def next_free(path: Path) -> Path:
    """The first of PATH-1, PATH-2, ... that does not exist."""
    return next(p for k in itertools.count(1) if not (p := Path(f"{path}-{k}")).exists())
