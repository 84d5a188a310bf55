"""Decoded images of a small data set in one memory-mapped file, for runs of many epochs.

Decoding is done once; what is kept are the RGB pixels of the whole image, so that every batch is
what it would be without the cache. The file's name is a hash of all that its content follows from:
Pillow's version and every image's path, size in bytes and time of change. A changed set
therefore has another file; old ones may be deleted at any time when no run uses them.

`NAME.rgb` holds the pixels, `NAME.json` sizes, places and CRC-32 of each image. Both are
written to a temporary name and renamed, the JSON last, under a lock that the system takes back
from a process that dies; so processes and runs that start together build it once. Each
process checks an image's CRC when it first reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsis.data.dataset import Dataset, read_json
from wsis.data.subset import Subset
from wsis.errors import InputError, MissingExtraError

_FORMAT = 1


class CachedDataset(Subset):
    """A data set whose decoded images come from a file in a folder, which is made if absent.

    Args:
        base: images in files.
        folder: where cache files lie; made if absent.
        limit_gb: refuse to write more than this, in 10^9 bytes.
        progress: show a bar while decoding.

    Raises:
        InputError: the images are generated, one cannot be read, they are larger than `limit_gb`
            or than the free space, or the folder cannot be written.
    """

    is_decoded = True

    def __init__(
        self, base: Dataset, folder: Path, *, limit_gb: float, progress: bool = True
    ) -> None:
        super().__init__(base, range(len(base)))
        if base.image_path(0) is None:
            raise InputError(
                f"data set '{base.name}' draws its images and has no files to decode; leave "
                "data.cache out"
            )
        self.file = folder / f"{_key(base)}.rgb"
        self._table = _ready(base, self.file, limit_gb, progress)
        self._pixels = np.memmap(self.file, np.uint8, "r", shape=(self._table["bytes"],))
        self._checked = np.zeros(len(base), bool)

    def fingerprint(self) -> str:
        """That of the data set whose images these are."""
        return self.base.fingerprint()

    def pixels(self, i: int) -> np.ndarray:
        """Image i as `[H, W, 3] uint8`, a copy.

        Raises:
            InputError: the cache file was changed since it was written.
        """
        height, width = self._table["sizes"][i]
        start = self._table["starts"][i]
        flat = self._pixels[start : start + 3 * height * width]
        if not self._checked[i]:
            if zlib.crc32(flat.data) != self._table["crc32"][i]:
                raise InputError(
                    f"{self.file}: image '{self.ids[i]}' is damaged in this cache; delete the "
                    "file, it is made anew"
                )
            self._checked[i] = True
        return np.array(flat).reshape(height, width, 3)

    def image(self, i: int) -> Image.Image:
        """Image i in RGB, as `Dataset.image` of the files."""
        return Image.fromarray(self.pixels(i))

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width of image i."""
        height, width = self._table["sizes"][i]
        return height, width


def _key(dataset: Dataset) -> str:
    """Hash of what the pixels follow from."""
    digest = hashlib.sha256(f"{_FORMAT} {Image.__version__}".encode())
    for i in range(len(dataset)):
        path = dataset.image_path(i)
        assert path is not None
        try:
            state = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        digest.update(json.dumps([str(path), state.st_size, state.st_mtime_ns]).encode())
    return digest.hexdigest()[:24]


def _ready(dataset: Dataset, file: Path, limit_gb: float, progress: bool) -> dict[str, Any]:
    """The table of a cache file, which is written unless it is there whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            table = _stored(file)
            return table if table is not None else _write(dataset, file, limit_gb, progress)
    except OSError as error:
        raise InputError(
            f"{file}: the cache cannot be written ({error.strerror}); choose another data.cache, "
            "or leave it out"
        ) from error


def _stored(file: Path) -> dict[str, Any] | None:
    """The table of a whole cache file, else None: a file cut short is written anew."""
    path = file.with_suffix(".json")
    if not path.is_file() or not file.is_file():
        return None
    try:
        table = read_json(path)
        checksum = table.pop("checksum")
    except (InputError, KeyError, AttributeError, TypeError):
        return None
    whole = checksum == _checksum(table) and file.stat().st_size == table["bytes"]
    return table if whole else None


def _checksum(table: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(table, sort_keys=True).encode())


def _write(dataset: Dataset, file: Path, limit_gb: float, progress: bool) -> dict[str, Any]:
    sizes = [dataset.image_size(i) for i in range(len(dataset))]
    ends = np.cumsum([3 * height * width for height, width in sizes], dtype=np.int64).tolist()
    needed, free = ends[-1], shutil.disk_usage(file.parent).free
    if needed > limit_gb * 1e9:
        raise InputError(
            f"the decoded images of '{dataset.split}' take {needed / 1e9:.2f} GB, data.cache_gb "
            f"allows {limit_gb:g}; raise it, or leave data.cache out"
        )
    if needed > free:
        raise InputError(
            f"the decoded images of '{dataset.split}' take {needed / 1e9:.2f} GB, {file.parent} "
            f"has {free / 1e9:.2f} GB free; choose another data.cache, or leave it out"
        )
    temporary = file.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        checks = _decode(dataset, temporary, sizes, progress)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    table = {"sizes": sizes, "starts": [0, *ends[:-1]], "crc32": checks, "bytes": needed}
    table = json.loads(json.dumps(table))
    text = json.dumps({**table, "checksum": _checksum(table)})
    try:
        temporary.write_text(text)
        os.replace(temporary, file.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)
    return table


def _decode(
    dataset: Dataset, target: Path, sizes: list[tuple[int, int]], progress: bool
) -> list[int]:
    """Write every image's pixels one after the other; returns their CRC-32."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("tqdm", "train", "decoding a data set") from error
    checks = []
    with open(target, "wb") as file:
        for i in tqdm(
            range(len(dataset)), desc="decode", unit="image", delay=1, disable=not progress
        ):
            pixels = dataset.pixels(i)
            if pixels.shape[:2] != sizes[i]:
                raise InputError(
                    f"{dataset.image_path(i)}: its header says {sizes[i]}, its pixels are "
                    f"{pixels.shape[:2]} (height, width)"
                )
            octets = np.ascontiguousarray(pixels).data.cast("B")
            file.write(octets)
            checks.append(zlib.crc32(octets))
        file.flush()
        os.fsync(file.fileno())
    return checks
