"""What is where in a COCO annotation file, so that the file itself need not be in memory.

COCO's `instances_train2014.json` is 330 MB of text and 2 GB as Python objects. It is read once, an
entry at a time; what is kept is the labels, and where the annotations of each image lie in the
file. This index is stored beside the file (`.instances_train2014.index.npz`) and read instead as
long as size and time of the file are those it was made from; of a small file, and where the
folder cannot be written, it is made anew each time. Masks read their image's annotations from the
file itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wsis.errors import InputError, MissingExtraError

_VERSION = 1
_WINDOW = 1 << 22
_STORE_FROM = 1 << 24
_EXPECTED = (
    "expected COCO instances: categories (id, name), images (id, file_name) and annotations "
    "(image_id, category_id)"
)


@dataclass(frozen=True)
class CocoIndex:
    """The content of an annotation file but for the outlines.

    Attributes:
        class_names: `[K]` names of the categories, in the order of their ids.
        category_ids: `[K] int64`, ascending.
        file_names: `[N]` files of the images, in the order of the file.
        numbers: `[N] int64` ids of the images.
        labels: `[N, K] uint8`, 1 where the image has an annotation of the category.
        first: `[N + 1] int64`, the annotations of image i are `first[i]:first[i + 1]`.
        starts: `[A] int64` byte where an annotation starts, by image, in the file's order.
        lengths: `[A] int64` its bytes.
        sha256: `[32] uint8` of the file.
    """

    class_names: np.ndarray
    category_ids: np.ndarray
    file_names: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sha256: np.ndarray

    @property
    def digest(self) -> str:
        """SHA-256 of the annotation file, hex."""
        return bytes(self.sha256).hex()

    def annotations(self, path: Path, image: int) -> list[dict[str, Any]]:
        """The entries of one image, read from the annotation file.

        Args:
            path: the file that the index is of.
            image: position of the image in the index.

        Raises:
            InputError: the file is not the one that was indexed, or cannot be read.
        """
        part = slice(self.first[image], self.first[image + 1])
        try:
            with open(path, "rb") as file:
                texts = [
                    os.pread(file.fileno(), int(length), int(start))
                    for start, length in zip(self.starts[part], self.lengths[part], strict=True)
                ]
            entries = [json.loads(text) for text in texts]
            intact = all(entry["image_id"] == self.numbers[image] for entry in entries)
        except (OSError, ValueError, TypeError, KeyError):
            intact = False
        if not intact:
            raise InputError(f"{path}: changed or removed since it was opened; start again")
        return entries


def read_index(path: Path) -> CocoIndex:
    """The index of an annotation file: the stored one where it is still true, else a new one.

    Raises:
        InputError: no such file, not JSON, or no COCO instances.
        MissingExtraError: tqdm is not installed.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns])
    stored = path.with_name(f".{path.stem}.index.npz")
    index = _load(stored, stamp) if status.st_size >= _STORE_FROM else None
    if index is None:
        index = build_index(path)
        if status.st_size >= _STORE_FROM:
            _store(stored, stamp, index)
    return index


def build_index(path: Path) -> CocoIndex:
    """Read an annotation file once, in constant memory but for the index.

    Raises:
        InputError: no such file, not JSON, or no COCO instances.
        MissingExtraError: tqdm is not installed.
    """
    categories: dict[int, str] = {}
    numbers, owners, kinds = array("q"), array("q"), array("q")
    starts, lengths = array("q"), array("q")
    files: list[str] = []
    found = set()
    try:
        with open(path, "rb") as file:
            reader = _Reader(file, path)
            for key, entry, start, end in reader.entries():
                found.add(key)
                if entry is None:
                    continue
                if key == "images":
                    numbers.append(entry["id"])
                    files.append(Path(_text(entry["file_name"])).name)
                elif key == "categories":
                    categories[entry["id"]] = _text(entry["name"])
                elif key == "annotations":
                    owners.append(entry["image_id"])
                    kinds.append(entry["category_id"])
                    starts.append(start)
                    lengths.append(end - start)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError, OverflowError, UnicodeError):
        raise InputError(f"{path}: {_EXPECTED}") from None
    if not {"images", "categories", "annotations"} <= found:
        raise InputError(f"{path}: {_EXPECTED}")
    return _arrange(path, categories, numbers, files, owners, kinds, starts, lengths, reader.digest)


def _arrange(
    path: Path,
    categories: dict[int, str],
    numbers: array[int],
    files: list[str],
    owners: array[int],
    kinds: array[int],
    starts: array[int],
    lengths: array[int],
    digest: bytes,
) -> CocoIndex:
    """Columns by image. Annotations of images that the file does not list are left out."""
    ids = np.array(sorted(categories), np.int64)
    kind, owner = np.array(kinds, np.int64), np.array(owners, np.int64)
    unknown = np.flatnonzero(~np.isin(kind, ids))
    if unknown.size:
        raise InputError(
            f"{path}: an annotation of image {owner[unknown[0]]} has category "
            f"{kind[unknown[0]]}, which the file does not list"
        )
    images = np.array(numbers, np.int64)
    order = np.argsort(images, kind="stable")
    if (np.diff(images[order]) == 0).any():
        raise InputError(f"{path}: two images have the same id")
    known = np.isin(owner, images)
    place = order[np.searchsorted(images[order], owner[known])] if images.size else owner[:0]
    by_image = np.argsort(place, kind="stable")
    labels = np.zeros((len(images), len(ids)), np.uint8)
    labels[place, np.searchsorted(ids, kind[known])] = 1
    counts = np.bincount(place, minlength=len(images))
    return CocoIndex(
        class_names=np.array([categories[i] for i in ids.tolist()], np.str_),
        category_ids=ids,
        file_names=np.array(files, np.str_),
        numbers=images,
        labels=labels,
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        starts=np.array(starts, np.int64)[known][by_image],
        lengths=np.array(lengths, np.int64)[known][by_image],
        sha256=np.frombuffer(digest, np.uint8),
    )


class _Reader:
    """Entries of the lists of a JSON object, one at a time, with their place in the file.

    The text is decoded as Latin-1, so that a character is a byte; the strings that are kept are
    decoded again (`_text`).
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise MissingExtraError("tqdm", "train", "reading COCO annotations") from error
        self._file, self._path = file, path
        self._hash = hashlib.sha256()
        self._text, self._base, self._at, self._ended = "", 0, 0, False
        self._decode = json.JSONDecoder().raw_decode
        size = os.fstat(file.fileno()).st_size
        self._bar = tqdm(total=size, desc=f"index {path.name}", unit="B", unit_scale=True, delay=2)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the file, after the last entry."""
        return self._hash.digest()

    def entries(self) -> Iterator[tuple[str, Any, int, int]]:
        """`(key, entry, start, end)` of each entry; `(key, None, 0, 0)` for the key itself."""
        with self._bar:
            self._extend()
            if self._text.startswith("\xef\xbb\xbf"):
                self._at = 3
            if self._peek() != "{":
                self._value()
                raise TypeError("not an object")
            self._at += 1
            while self._peek() != "}":
                key = self._value()[0]
                self._expect(":")
                if self._peek() == "[" and key in ("images", "annotations", "categories"):
                    yield key, None, 0, 0
                    self._at += 1
                    while self._peek() != "]":
                        entry, start, end = self._value()
                        yield key, entry, start, end
                        if self._peek() != "]":
                            self._expect(",")
                    self._at += 1
                else:
                    self._value()
                if self._peek() != "}":
                    self._expect(",")
            while not self._ended:
                self._extend()

    def _extend(self) -> None:
        """Forget what has been read, and read on: at least as much as is left."""
        left = self._text[self._at :]
        data = self._file.read(max(_WINDOW, len(left)))
        self._hash.update(data)
        self._bar.update(len(data))
        self._ended = not data
        self._base, self._text, self._at = self._base + self._at, left + data.decode("latin-1"), 0

    def _peek(self) -> str:
        """The next character that is no space."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                raise self._error("it ends too early")
            self._extend()

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._error(f"expected {character!r} at byte {self._base + self._at}")
        self._at += 1

    def _value(self) -> tuple[Any, int, int]:
        """The next value, and where it starts and ends in the file."""
        self._peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._error(str(error)) from None
            except RecursionError:
                raise self._error("nested too deep") from None
            else:
                # A number at the end of the window may go on behind it.
                if end < len(self._text) or self._ended:
                    start = self._at
                    self._at = end
                    return value, self._base + start, self._base + end
            self._extend()

    def _error(self, what: str) -> InputError:
        return InputError(f"{self._path}: expected JSON, got {what}")


def _text(value: str) -> str:
    return value.encode("latin-1").decode("utf-8") if not value.isascii() else value


def _load(stored: Path, stamp: np.ndarray) -> CocoIndex | None:
    try:
        with np.load(stored, allow_pickle=False) as content:
            if not np.array_equal(content["stamp"], stamp):
                return None
            return CocoIndex(**{field.name: content[field.name] for field in fields(CocoIndex)})
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _store(stored: Path, stamp: np.ndarray, index: CocoIndex) -> None:
    temporary = stored.with_name(f"{stored.name}.{os.getpid()}.part")
    # A folder that cannot be written is no reason to stop: the index is made anew next time.
    with suppress(OSError):
        try:
            with open(temporary, "wb") as file:
                columns = {field.name: getattr(index, field.name) for field in fields(CocoIndex)}
                np.savez(file, stamp=stamp, **columns)
            os.replace(temporary, stored)
        finally:
            temporary.unlink(missing_ok=True)
