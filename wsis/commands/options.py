"""What the commands share: parsers whose errors help, and the next free name."""

from __future__ import annotations

import difflib
import itertools
import re
from argparse import SUPPRESS
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wsis.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from wsis.config import DataConfig


def make_parser(command: str, description: str, *, types: bool = False) -> Any:
    """A jsonargparse parser whose errors are InputErrors with a suggestion.

    Args:
        command: its name, for the messages.
        description: for the head of its help.
        types: whether the help shows the type of every option.
    """
    try:
        from jsonargparse import ArgumentParser, DefaultHelpFormatter
    except ImportError as error:
        raise MissingExtraError("jsonargparse", "train", f"wsis {command}") from error

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            known = [o.lstrip("-") for a in self._actions for o in a.option_strings]
            text = " ".join(str(message).split())
            unknown = re.search(r"(?:arguments: --|Option ')([\w.]+)", text)
            hint = suggestion(unknown[1], known) if unknown else ""
            raise InputError(f"{_plain(text)}{hint}; see wsis {command} --help")

    class Help(DefaultHelpFormatter):
        def _get_help_string(self, action: Any) -> str:
            text = action.help or ""
            if not action.option_strings or action.default in (None, False, SUPPRESS):
                return text
            return f"{text} [%(default)s]".lstrip()

    form = DefaultHelpFormatter if types else Help
    return Parser(prog=f"wsis {command}", description=description, formatter_class=form)


def add_inputs(parser: Any) -> None:
    """``--loader`` and ``--workers`` of a command that shows images to a network."""
    parser.add_argument(
        "--loader",
        type=str | None,
        default=None,
        help="what decodes images: auto | torch | dali [the run's]",
    )
    parser.add_argument(
        "--workers",
        type=int | None,
        default=None,
        help="threads that read, and as many that work on what the network says [the run's]",
    )


def set_inputs(data: DataConfig, options: Any) -> None:
    """What `add_inputs` was given, into a run's configuration.

    Raises:
        InputError: a negative number of threads.
    """
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers must be 0 or more, got {options.workers}")
    data.loader = options.loader or data.loader
    data.workers = data.workers if options.workers is None else options.workers


def _plain(text: str) -> str:
    """A value that an option does not take, without the parser's account of its types."""
    found = re.fullmatch(r'Parser key "([\w.]+)": (.*) (?:Given|Got) value: (.*)', text)
    if found is None:
        return text
    key, account, value = found.groups()
    account = account.partition("Given value type")[0]
    words = re.findall(r"Literal\[([^]]*)\]", account)
    types = [name for name in re.findall(r"<class '(\w+)'>", account) if name != "NoneType"]
    expected = f"one of {words[0]}" if words else " or ".join(dict.fromkeys(types))
    return f"{key}: expected {expected}, got {value}" if expected else text


def suggestion(word: str, known: Any) -> str:
    """Says which known word is meant, where one is close."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def next_free(path: Path) -> Path:
    """The first of PATH-1, PATH-2, ... that does not exist."""
    return next(p for k in itertools.count(1) if not (p := Path(f"{path}-{k}")).exists())
