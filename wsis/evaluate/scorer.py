"""Localization scores of maps of several kinds, gathered image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsis.data.dataset import read_mask
from wsis.data.localization import Localization
from wsis.errors import InputError
from wsis.evaluate.localization import (
    TOP,
    BoxTally,
    PixelTally,
    mask_truth,
    scale_boxes,
)

_CHUNK = 32  # maps handed to the threads at once


class Scorer:
    """Scores every kind of map of each image of a list, in its order.

    Args:
        truth: boxes, or masks.
        fixed: kinds of maps, and the threshold of GT-known localization of each.
        step: between thresholds.
        masks: position in the list -> ``[224, 224]`` truth of PxAP, beside boxes.

    Attributes:
        boxes: kind -> its tally; empty where the truth is masks.
    """

    def __init__(
        self,
        truth: Localization,
        fixed: Mapping[str, float],
        *,
        step: float,
        masks: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        self.truth = truth
        self.kinds = tuple(fixed)
        self.images = 0
        self.boxes = {} if truth.masks else {k: BoxTally(step, at) for k, at in fixed.items()}
        self._masks = self._metadata_mask if truth.masks else masks
        self._pixels = {kind: PixelTally(step) for kind in fixed if self._masks is not None}
        self._scaled = scale_boxes(truth.boxes, truth.sizes[truth.owner])
        self._ranks: list[int | None] = []
        self._waiting: list[Mapping[str, NDArray[Any]]] = []
        self._top = dict.fromkeys(TOP, 0)
        self._ranked = 0

    def add(self, maps: Mapping[str, NDArray[Any]], rank: int | None = None) -> None:
        """Count the next image.

        Args:
            maps: kind -> ``[224, 224]`` in [0, 1].
            rank: classes that the network holds more likely than the true one, if known.
        """
        if self._masks is not None:
            truth = self._masks(self.images)
            for kind, pixels in self._pixels.items():
                pixels.add(maps[kind], truth)
        if rank is not None:
            self._ranked += 1
            for count in TOP:
                self._top[count] += rank < count
        self.images += 1
        self._waiting.append(maps)
        self._ranks.append(rank)
        if len(self._waiting) == _CHUNK:
            self.flush()

    def flush(self) -> None:
        """Score what waits for a full chunk."""
        waiting, ranks = self._waiting, self._ranks
        self._waiting, self._ranks = [], []
        if not waiting or not self.boxes:
            return
        start = self.images - len(waiting)
        owner = self.truth.owner - start
        mine = (owner >= 0) & (owner < len(waiting))
        for kind, tally in self.boxes.items():
            tally.add(
                np.stack([maps[kind] for maps in waiting]),
                self._scaled[mine],
                owner[mine],
                None if None in ranks else ranks,
            )

    def scores(self) -> dict[str, dict[str, Any]]:
        """Kind -> its scores, JSON-ready; ``PxAP`` is None without masks."""
        self.flush()
        if self.images != len(self.truth.ids):
            raise InputError(f"{len(self.truth.ids)} images are to be scored, got {self.images}")
        return {
            kind: (self.boxes[kind].scores() if self.boxes else {"images": self.images})
            | {"PxAP": self._pixels[kind].pxap() if self._pixels else None}
            for kind in self.kinds
        }

    def classification(self) -> dict[str, float] | None:
        """``Top-1 Cls`` and ``Top-5 Cls`` in percent; None where ranks are not known."""
        if not self._ranked or self._ranked != self.images:
            return None
        return {f"Top-{count} Cls": 100 * hits / self.images for count, hits in self._top.items()}

    def _metadata_mask(self, n: int) -> NDArray[np.uint8]:
        masks, ignore = self.truth.masks[n]
        return mask_truth(map(read_mask, masks), None if ignore is None else read_mask(ignore))
