"""Read tar and zip archives that may be hostile, as a stream.

No name of an archive is ever used as a path: the caller decides where a member goes, by a pattern
of the names it knows. An archive with a name that leads elsewhere, with links in place of wanted
files, with the same file twice, or with more content than one of its size can have, is refused.
"""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from wsis.engine.logs import write_error
from wsis.errors import InputError

_AGAIN = "download it again"
_BUFFER = 1 << 16
_CHUNK = 1 << 20
_HEADER_LIMIT = 1 << 16
_FILE_LIMIT = 1 << 26
_JSON_LIMIT = 1 << 31
_TOTAL_FLOOR = 1 << 26
_TOTAL_RATIO = 50
_HEADERS = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}


@dataclass(frozen=True)
class Member:
    """A wanted file of an archive, to be read before the next one is asked for.

    Attributes:
        archive: the archive.
        name: its name there.
        size: its bytes.
        stream: its content.
    """

    archive: Path
    name: str
    size: int
    stream: IO[bytes]

    def read(self) -> bytes:
        """The whole content; of files as small as images."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """The content by parts.

        Raises:
            InputError: it is damaged, or not as long as the archive says.
        """
        left = self.size
        while left:
            with _reading(self.archive):
                chunk = self.stream.read(min(_CHUNK, left))
            if not chunk:
                raise InputError(
                    f"{self.archive}: '{self.name}' ends {left} bytes too early; {_AGAIN}"
                )
            left -= len(chunk)
            yield chunk
        with _reading(self.archive):
            self.stream.read(1)  # zipfile compares the checksum at the end


def extract(archive: Path, place: Callable[[str], Path | None]) -> int:
    """Write the files of an archive, each whole or not at all.

    A file that is there with the member's size is left as it is, so that what was interrupted goes
    on where it stopped.

    Args:
        archive: `.tar`, `.tgz` or `.zip`.
        place: where a member of this name goes; None leaves it out.

    Returns:
        How many wanted files the archive has.

    Raises:
        InputError: the archive is hostile, damaged or incomplete, or the disk refuses.
    """
    count = 0
    targets: set[Path] = set()

    def wanted(name: str, size: int) -> bool:
        nonlocal count
        target = place(name)
        if target is None:
            return False
        if target in targets:
            raise InputError(f"{archive}: refused, it holds '{name}' twice")
        targets.add(target)
        count += 1
        return not (target.is_file() and target.stat().st_size == size)

    for member in members(archive, wanted):
        target = place(member.name)
        assert target is not None
        write_member(target, member)
    return count


def members(archive: Path, wanted: Callable[[str, int], bool]) -> Iterator[Member]:
    """The wanted files of an archive, in its order.

    Args:
        archive: `.tar`, `.tgz` or `.zip`.
        wanted: of a member's name and size.

    Raises:
        InputError: the archive is hostile, damaged or incomplete.
    """
    try:
        size = archive.stat().st_size
    except OSError as error:
        raise InputError(f"{archive}: cannot be read ({error.strerror})") from None
    limit = max(_TOTAL_FLOOR, size * _TOTAL_RATIO)
    read = _zip_members if archive.suffix == ".zip" else _tar_members
    stream = read(archive, wanted, limit)
    while True:
        with _reading(archive):
            member = next(stream, None)
        if member is None:
            return
        yield member


def write_member(target: Path, member: Member) -> None:
    """Copy a member to a file by chunks: temporary name in the same folder, then rename.

    Raises:
        InputError: the archive is damaged, or the disk refuses.
    """
    temporary = target.with_name(f".{target.name}.part")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                for chunk in member.chunks():
                    file.write(chunk)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(target, error, member.size) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of reading an archive as InputErrors that say what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # tarfile and zipfile raise many kinds on damaged headers
        raise InputError(
            f"{path}: damaged or incomplete archive ({type(error).__name__}: {error}); {_AGAIN}"
        ) from None


def _check_member(archive: Path, name: str, size: int, total: int, limit: int) -> None:
    """Refuse what no honest archive has."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise InputError(f"{archive}: refused, the name {name!r} leads out of the archive")
    largest = _JSON_LIMIT if name.endswith(".json") else _FILE_LIMIT
    if size < 0 or size > largest:
        raise InputError(f"{archive}: refused, '{name}' has {size} bytes, expected <= {largest}")
    if total > limit:
        raise InputError(
            f"{archive}: refused, it unpacks to more than {limit} bytes, more than an archive of "
            "images of its size can hold"
        )


def _tar_members(archive: Path, wanted: Callable[[str, int], bool], limit: int) -> Iterator[Member]:
    size = archive.stat().st_size
    with (
        tqdm(total=size, desc=archive.name, unit="B", unit_scale=True, delay=1) as bar,
        open(archive, "rb") as file,
    ):
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        counted: Any = _Counted(file, bar)
        header = _header_type(archive)
        # tarfile's own gzip reader copies what is left of a part with every read of 10 KB.
        plain = gzip.GzipFile(fileobj=counted) if packed else counted
        tar: Any = tarfile.open(fileobj=plain, mode="r|", tarinfo=header, bufsize=_BUFFER)
        while (info := tar.next()) is not None:
            tar.members.clear()  # the names seen so far; tarfile would keep them all
            end = info.offset_data + info.size
            name = info.name.removeprefix("./")
            _check_member(archive, name, info.size, end, limit)
            if not wanted(name, info.size):
                continue
            if not info.isreg():
                raise InputError(f"{archive}: refused, '{name}' is a link or no regular file")
            yield Member(archive, name, info.size, tar.extractfile(info))
        if not header.ended:
            raise InputError(f"{archive}: it has no end mark, so a part is missing; {_AGAIN}")


def _header_type(archive: Path) -> Any:
    """A TarInfo that reads no extended header or map of any size, and notes the end mark."""

    class Header(tarfile.TarInfo):
        ended = False

        @classmethod
        def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
            Header.ended = len(buf) == tarfile.BLOCKSIZE and not any(buf)
            info = super().frombuf(buf, encoding, errors)
            if info.type in _HEADERS and info.size > _HEADER_LIMIT:
                raise InputError(f"{archive}: refused, a name of {info.size} bytes")
            if info.type == tarfile.GNUTYPE_SPARSE:
                Header._refuse_sparse()
            return info

        @staticmethod
        def _refuse_sparse(*_: Any) -> None:
            """Before its map is read, which may be of any length and costs its square."""
            raise InputError(f"{archive}: refused, it has a sparse file")

        # The three forms that an extended header may announce.
        _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse

    return Header


class _Counted:  # all that a tar stream asks of a file
    """A file that tells a progress bar what is read."""

    def __init__(self, file: IO[bytes], bar: Any) -> None:
        self._file, self._bar = file, bar

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._bar.update(len(data))
        return data


def _zip_members(archive: Path, wanted: Callable[[str, int], bool], limit: int) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as package:
        chosen, total = [], 0
        for info in package.infolist():
            total += info.file_size
            _check_member(archive, info.filename, info.file_size, total, limit)
            if info.is_dir() or not wanted(info.filename, info.file_size):
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise InputError(f"{archive}: refused, '{info.filename}' is a link")
            chosen.append(info)
        for info in tqdm(chosen, desc=archive.name, unit="file", delay=1):
            with package.open(info) as stream:
                yield Member(archive, info.filename, info.file_size, stream)
