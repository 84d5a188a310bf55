"""What was prepared: counts against the known ones, warnings, and the file that keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsis.engine.logs import versions, write_error, write_json_atomic, write_text_atomic
from wsis.errors import InputError


@dataclass
class Record:
    """One preparation.

    Attributes:
        kind: `voc`, `sbd`, `coco` or `cub`.
        root: folder that `open_dataset`, or the evaluator of localization, takes.
        partial: other counts than the known ones are a warning, not an error.
        counts: what was counted.
        lists: first 12 hex digits of the SHA-256 of each list's ids, one per line.
        warnings: what is not as it is known to be.
        about: anything else, such as how masks were made.
    """

    kind: str
    root: Path
    partial: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    lists: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def expect(self, what: str, found: int, known: int, reason: str) -> None:
        """Compare a count with the known one.

        Args:
            what: is counted, such as `VOC list train`.
            found: the count.
            known: what it should be.
            reason: the likely cause of a difference.

        Raises:
            InputError: they differ, and the preparation is not a partial one.
        """
        self.counts[what] = found
        if found == known:
            return
        message = f"{what}: expected {known} images, got {found}; {reason}"
        if not self.partial:
            raise InputError(
                f"{self.root}: {message}; where a part of the data set is meant: --partial true"
            )
        self.warnings.append(message)

    def write_list(self, path: Path, ids: Sequence[str]) -> None:
        """Write a list of images and note its hash."""
        make_folder(path.parent)
        write_text_atomic(path, "".join(f"{name}\n" for name in ids))
        self.note_list(path.stem, ids)

    def note_list(self, name: str, ids: Sequence[str]) -> None:
        """Note the hash of a list."""
        self.lists[name] = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]

    def write(self) -> Path:
        """Write `prepare-KIND.json` into the root, the last thing that is done."""
        path = self.root / f"prepare-{self.kind}.json"
        content = {
            "kind": self.kind,
            "partial": self.partial,
            "counts": self.counts,
            "lists": self.lists,
            "warnings": self.warnings,
            **self.about,
            "versions": versions(),
        }
        write_json_atomic(path, content)
        return path

    def describe(self) -> str:
        """Counts and warnings as text."""
        counts = [f"{what}: {count} images" for what, count in self.counts.items()]
        return "\n".join([*counts, *(f"warning: {text}" for text in self.warnings)])


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: the disk refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error, 0) from error


def find_folder(source: Path, names: Sequence[str], holds: str) -> Path | None:
    """The first of some folders below `source` that has the file or folder `holds`.

    Args:
        source: where to look.
        names: folders relative to it; "" is `source` itself.
        holds: what must be in it.
    """
    return next((source / name for name in names if (source / name / holds).exists()), None)


def as_source(path: Path) -> Path:
    """The folder that downloads or unpacked data lie in; of an archive, the one around it.

    Raises:
        InputError: there is nothing of that name.
    """
    path = path.expanduser()
    if path.is_file():
        return path.parent
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected the downloaded archives in it")
    return path
