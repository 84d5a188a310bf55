"""The small files of a run folder: records per step, metrics per epoch, times, versions.

``log.jsonl`` and ``metrics.csv`` hold nothing that depends on the clock, so that a run which was
killed and resumed ends with the same bytes as one that was not; times go to ``times.jsonl``.
"""

from __future__ import annotations

import csv
import errno
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from wsis.errors import InputError

Value = float | int | str | None


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(path: Path, error: Exception, needed: int) -> InputError:
    """The error of a failed write in one line: path, reason, needed and free bytes, cure."""
    folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    reason = getattr(error, "strerror", None) or str(error)
    cures: dict[int | None, str] = {
        errno.EACCES: "make the folder writable",
        errno.EPERM: "make the folder writable",
        errno.EROFS: "choose a folder on a writable disk",
    }
    cure = cures.get(getattr(error, "errno", None), "free space or choose another folder")
    return InputError(
        f"cannot write {path}: {reason}; {needed} bytes needed, {free} bytes free; {cure}"
    )


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all, durably: temporary name, fsync, rename, fsync.

    Raises:
        InputError: the disk refuses; the file that was there is untouched.
    """
    data = text.encode()
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error, len(data)) from error


def write_json_atomic(path: Path, value: Any) -> None:
    """Write indented JSON whole or not at all; see :func:`write_text_atomic`."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """What ran: python, packages (None where absent), platform and processor."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("wsis", "torch", "torchvision", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "platform": platform.platform(), "cpu": _cpu_name()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class RunLog:
    """Records of one run: ``log.jsonl``, ``metrics.csv``, ``times.jsonl``; TensorBoard if there.

    The ``step`` of a record is the number of updates done when it was written. Write the records of
    step N and call :meth:`sync` before the checkpoint of step N is saved; on resume call
    ``rewind(N)``: what is newer goes, and the files grow as if nothing had happened. One process
    writes (rank 0).

    TensorBoard events go to ``tensorboard/`` where the package tensorboard is installed.

    Args:
        folder: the run folder; made if absent. Files that are there are continued.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error, 0) from error
        self._records = _Lines(self.folder / "log.jsonl")
        self._times = _Lines(self.folder / "times.jsonl")
        self._metrics = _Table(self.folder / "metrics.csv")
        self._board = _tensorboard(self.folder, None)

    def record(self, step: int, **values: Value) -> None:
        """Append ``{"step": step, **values}`` to ``log.jsonl``."""
        self._records.append(step, values)
        self._draw(step, values)

    def epoch(self, epoch: int, step: int, **values: Value) -> None:
        """Add a row to ``metrics.csv``; a new name becomes a column, empty in older rows."""
        self._metrics.append({"epoch": epoch, "step": step, **values})
        self._draw(step, {f"epoch/{name}": value for name, value in values.items()})

    def time(self, step: int, **values: Value) -> None:
        """Append to ``times.jsonl``: all that depends on the clock or the machine."""
        self._times.append(step, values)

    def rewind(self, step: int) -> None:
        """Drop every record newer than ``step``, columns that are empty then, and a torn line.

        Raises:
            InputError: a file is damaged elsewhere than in its last line.
        """
        self._records.rewind(step)
        self._times.rewind(step)
        self._metrics.rewind(step)
        if self._board is not None:
            self._board.close()
            self._board = _tensorboard(self.folder, step + 1)

    def sync(self) -> None:
        """Make all records durable."""
        self._records.sync()
        self._times.sync()

    def close(self) -> None:
        """Sync and close the files."""
        self._records.close()
        self._times.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, step: int, values: Mapping[str, Value]) -> None:
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)


def _tensorboard(folder: Path, purge_step: int | None) -> Any:
    """A SummaryWriter that hides events from ``purge_step`` on, or None without tensorboard."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard", purge_step=purge_step)


class _Lines:
    """A JSONL file whose records have a step; a line reaches the system as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()

    def _open(self) -> IO[str]:
        try:
            return open(self.path, "a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise write_error(self.path, error, 0) from error

    def append(self, step: int, values: Mapping[str, Value]) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise write_error(self.path, error, len(line)) from error

    def rewind(self, step: int) -> None:
        self._file.close()
        # split, not splitlines: the piece after the last newline is a torn line or nothing.
        *lines, _ = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                newer = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}, line {number}: expected a JSON object with a step, "
                    f"got {line[:40]!r}; remove the line"
                ) from error
            if not newer:
                kept.append(line + "\n")
        write_text_atomic(self.path, "".join(kept))
        self._file = self._open()

    def sync(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self.path, error, 0) from error

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()


class _Table:
    """A CSV file of few rows, rewritten whole with each row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
            if any(not (row.get("step") or "").isdecimal() for row in self.rows):
                raise InputError(f"{path}: expected a column 'step' of numbers; remove the file")

    def append(self, row: Mapping[str, Value]) -> None:
        self.rows.append({name: "" if v is None else str(v) for name, v in row.items()})
        self._write()

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
        if self.path.exists():
            self._write()

    def _write(self) -> None:
        used = {name: None for row in self.rows for name, value in row.items() if value != ""}
        text = io.StringIO()
        writer = csv.DictWriter(text, list(used), restval="", lineterminator="\n")
        if used:
            writer.writeheader()
            writer.writerows({n: v for n, v in row.items() if n in used} for row in self.rows)
        write_text_atomic(self.path, text.getvalue())
