"""Check every file of a data set before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsis.data.dataset import Dataset, Image
from wsis.errors import InputError, MissingExtraError

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        image: id of the image.
        message: what is wrong, with the file's name.
        fatal: training or evaluation would stop there; otherwise something to know.
    """

    image: str
    message: str
    fatal: bool = True


def scan(dataset: Dataset, *, masks: bool) -> list[Problem]:
    """Decode every image, and every mask on demand, and list what is wrong.

    Found are unreadable and truncated files, masks of another size or with values that are no
    class, and missing masks (fatal); images with an EXIF orientation, which is not applied, and
    masks with classes that the image-level labels lack or without one that they name (not fatal).

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
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("tqdm", "train", "checking a data set") from error
    problems = []
    for i in tqdm(range(len(dataset)), desc=f"check {dataset.split}", unit="image", delay=1):
        problems += _check_image(dataset, i)
        if masks:
            problems += _check_mask(dataset, i)
    return problems


def _check_image(dataset: Dataset, i: int) -> list[Problem]:
    try:
        dataset.image(i)
    except InputError as error:
        return [Problem(dataset.ids[i], str(error))]
    path = dataset.image_path(i)
    orientation = 1 if path is None else _orientation(path)
    if orientation in (0, 1):
        return []
    message = f"{path}: EXIF orientation {orientation} is not applied; pixels are used as stored"
    return [Problem(dataset.ids[i], message, fatal=False)]


def _orientation(path: Path) -> int:
    with Image.open(path) as image:
        return image.getexif().get(_EXIF_ORIENTATION, 1)


def _check_mask(dataset: Dataset, i: int) -> list[Problem]:
    name = dataset.ids[i]
    try:
        mask = dataset.mask(i)
    except InputError as error:
        return [Problem(name, str(error))]
    counts = np.bincount(mask.ravel(), minlength=256)[1 : len(dataset.classes) + 1]
    labels = dataset.labels[i].astype(bool)
    where = dataset.mask_path(i) or name
    problems = []
    for differing, what in (
        ((counts > 0) & ~labels, "the mask has"),
        ((counts == 0) & labels, "the mask lacks"),
    ):
        if differing.any():
            classes = ", ".join(dataset.classes[c] for c in np.flatnonzero(differing))
            message = f"{where}: {what} {classes}, unlike the image-level labels"
            problems.append(Problem(name, message, fatal=False))
    return problems
