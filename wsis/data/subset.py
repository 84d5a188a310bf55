"""A part of a data set that is a data set itself; the images with one label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsis.data.compact import OneHotRows
from wsis.data.dataset import Dataset
from wsis.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


class Subset(Dataset):
    """The images of a data set at some positions, in the order given.

    Args:
        base: the data set.
        kept: positions in it, each once.
        labels: of the images kept; those of `base` by default.

    Raises:
        InputError: nothing is kept.

    Example:
        >>> from wsis.data import open_dataset
        >>> data = open_dataset("scenes", split="val", n_val=4)
        >>> part = Subset(data, [3, 1])
        >>> part.ids == (data.ids[3], data.ids[1]), part.image(0) == data.image(3)
        (True, True)
    """

    def __init__(
        self, base: Dataset, kept: Sequence[int], labels: OneHotRows | None = None
    ) -> None:
        self.base = base
        self.kept = tuple(kept)
        if labels is None and base.class_ids is not None:
            labels = OneHotRows(base.class_ids[list(self.kept)], len(base.classes))
        super().__init__(
            name=base.name,
            root=base.root,
            split=base.split,
            classes=base.classes,
            mask_ids=base.mask_ids,
            ids=[base.ids[i] for i in self.kept],
            labels=base.labels[list(self.kept)] if labels is None else labels,
        )

    @property
    def has_masks(self) -> bool:
        """Whether a place for masks exists."""
        return self.base.has_masks

    @property
    def mask_source(self) -> str:
        """Where ground truth comes from, for reports."""
        return self.base.mask_source

    def image_path(self, i: int) -> Path | None:
        """File of image i; None where images are generated."""
        return self.base.image_path(self.kept[i])

    def mask_path(self, i: int) -> Path | None:
        """File of mask i; None where masks do not come from single files, or there is none."""
        return self.base.mask_path(self.kept[i])

    def has_mask(self, i: int) -> bool:
        """Whether image i has ground truth."""
        return self.base.has_mask(self.kept[i])

    def image(self, i: int) -> Image:
        """Image i in RGB as stored; see `Dataset.image`."""
        return self.base.image(self.kept[i])

    def pixels(self, i: int) -> np.ndarray:
        """Image i as `[H, W, 3] uint8`."""
        return self.base.pixels(self.kept[i])

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width of image i."""
        return self.base.image_size(self.kept[i])

    def mask(self, i: int) -> np.ndarray:
        """Ground truth of image i; see `Dataset.mask`."""
        return self.base.mask(self.kept[i])


def one_label(dataset: Dataset) -> Dataset:
    """The images that have exactly one label, known to be so (`Dataset.class_ids`).

    Raises:
        InputError: there is none.
    """
    if dataset.class_ids is not None:
        return dataset
    kept = np.flatnonzero(dataset.labels.sum(axis=1) == 1)
    if not len(kept):
        raise InputError(
            f"data set '{dataset.name}' at {dataset.root or '(built in)'}, split "
            f"'{dataset.split}': no image has exactly one label"
        )
    class_ids = np.asarray(dataset.labels[kept]).argmax(axis=1)
    return Subset(dataset, kept.tolist(), OneHotRows(class_ids, len(dataset.classes)))
