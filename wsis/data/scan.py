"""Read every file of a split before hours are spent on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wsis.data.dataset import Dataset, Image
from wsis.errors import InputError, MissingExtraError

_EXIF_ORIENTATION = 0x0112
_PART = 256
_PLAIN_MODES = ("RGB", "L")
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        image: id of the image.
        message: what is wrong, with the file's name.
        fatal: training or evaluation would stop there, or its numbers would be wrong; otherwise
            something to know.
        kind: a word for what was found, a key of `wsis.data.check.CURES`.
        file: the file at fault, where it is one.
    """

    image: str
    message: str
    fatal: bool = True
    kind: str = "unreadable image"
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """What one image has to tell.

    Attributes:
        problems: what is wrong.
        size: height and width, None where it cannot be read.
        mode: Pillow's mode of the file; empty where it has none.
        pixels: ``[K + 1] int64`` mask pixels of background and each class; empty without a mask.
        digest: SHA-256 of the file; empty where there is none or it cannot be read.
    """

    problems: list[Problem] = field(default_factory=list)
    size: tuple[int, int] | None = None
    mode: str = ""
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    digest: bytes = b""


def scan(dataset: Dataset, *, masks: bool) -> list[Problem]:
    """Decode every image, and every mask on demand, and list what is wrong.

    Found are unreadable and truncated files, masks of another size or with values that are no
    class, and missing masks (fatal); images with an EXIF orientation, which is not applied, in
    another mode than RGB or grey or of another format than their name says, and masks with classes
    that the image-level labels lack or without one that they name (not fatal).

    Args:
        dataset: the data set.
        masks: also check masks.

    Returns:
        Problems in the order of the images; empty when all is well.

    Raises:
        MissingExtraError: tqdm is not installed.

    Example:
        >>> from wsis.data import open_dataset
        >>> scan(open_dataset("scenes", n_train=3), masks=True)
        []
    """
    return [problem for found in examine(dataset, masks=masks) for problem in found.problems]


def examine(
    dataset: Dataset,
    *,
    masks: bool,
    threads: int | None = None,
    positions: Sequence[int] | None = None,
) -> Iterator[Findings]:
    """Findings of every image, in their order; see `scan`.

    Args:
        dataset: the data set.
        masks: also check masks.
        threads: images decoded at a time (Pillow decodes outside Python's lock); None: one per
            processor.
        positions: of the images to look at; None: all.

    Raises:
        MissingExtraError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("tqdm", "train", "checking a data set") from error
    wanted = range(len(dataset)) if positions is None else positions
    threads = threads or os.cpu_count() or 1
    with (
        tqdm(total=len(wanted), desc=f"check {dataset.split}", unit="image", delay=1) as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="wsis-check") as pool,
    ):
        # By parts, so that results do not pile up where the reader is the slower one.
        for start in range(0, len(wanted), _PART):
            part = wanted[start : start + _PART]
            for found in pool.map(lambda i: _examine(dataset, i, masks), part):
                bar.update()
                yield found


def _examine(dataset: Dataset, i: int, masks: bool) -> Findings:
    problems, size, mode = _check_image(dataset, i)
    if size is None:
        return Findings(problems)
    pixels = np.zeros(0, np.int64)
    if masks:
        more, pixels = _check_mask(dataset, i)
        problems += more
    path = dataset.image_path(i)
    return Findings(problems, size, mode, pixels, b"" if path is None else _digest(path))


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b""


def _check_image(dataset: Dataset, i: int) -> tuple[list[Problem], tuple[int, int] | None, str]:
    name, path = dataset.ids[i], dataset.image_path(i)
    try:
        width, height = dataset.image(i).size
    except InputError as error:
        return [Problem(name, str(error), file=str(path))], None, ""
    problems = []

    def note(kind: str, message: str) -> None:
        problems.append(Problem(name, f"{path or name}: {message}", False, kind, str(path)))

    if path is None:
        return problems, (height, width), ""
    orientation, mode, kind = _header(path)
    if orientation is None:
        note("EXIF orientation", "EXIF data cannot be read; pixels are used as stored")
    elif orientation not in (0, 1):
        note(
            "EXIF orientation",
            f"EXIF orientation {orientation} is not applied; pixels are used as stored",
        )
    if mode not in _PLAIN_MODES:
        note("image mode", f"mode {mode}, converted to RGB")
    expected = _FORMATS.get(path.suffix.lower())
    if expected is not None and kind != expected:
        note("image format", f"holds {kind}, unlike its name")
    return problems, (height, width), mode


def _header(path: Path) -> tuple[Any, str, str]:
    """EXIF orientation (None: unreadable), mode and format of an image file."""
    with Image.open(path) as image:
        try:
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        except Exception:  # Pillow's reader of TIFF tags raises many kinds on damaged ones.
            orientation = None
        return orientation, image.mode, image.format or ""


def _check_mask(dataset: Dataset, i: int) -> tuple[list[Problem], np.ndarray]:
    name, path = dataset.ids[i], dataset.mask_path(i)
    file = None if path is None else str(path)
    try:
        mask = dataset.mask(i)
    except InputError as error:
        kind = "bad mask" if dataset.has_mask(i) else "missing mask"
        return [Problem(name, str(error), True, kind, file)], np.zeros(0, np.int64)
    pixels = np.bincount(mask.ravel(), minlength=256)[: len(dataset.classes) + 1]
    labels, where = dataset.labels[i].astype(bool), path or name
    problems = []
    for differing, what, kind in (
        ((pixels[1:] > 0) & ~labels, "the mask has", "class in mask, not in labels"),
        ((pixels[1:] == 0) & labels, "the mask lacks", "class in labels, not in mask"),
    ):
        if differing.any():
            classes = ", ".join(dataset.classes[c] for c in np.flatnonzero(differing))
            message = f"{where}: {what} {classes}, unlike the image-level labels"
            problems.append(Problem(name, message, False, kind, file))
    return problems, pixels
