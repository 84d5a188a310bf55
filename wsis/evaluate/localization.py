"""Localization metrics of score maps: MaxBoxAcc, MaxBoxAccV2, PxAP, GT-known localization.

As Choe et al. 2020 (arXiv 2007.04178) and their wsolevaluation define them. Maps are of 224 x 224
pixels in [0, 1]; true boxes are scaled to that size with truncation.

- ``BoxAcc(t, d)``: share of images where a box found at threshold t overlaps a true one by d.
- MaxBoxAcc: largest over t, d = 0.5, the box of the largest contour.
- MaxBoxAccV2: mean over d = 0.3, 0.5, 0.7 of the largest over t, boxes of all contours.
- GT-known: BoxAcc at one threshold, d = 0.5, the box of the largest contour.
- Top-1, Top-5 Loc: the true class is among the one or five likeliest, and the box of its map, as
  for GT-known, overlaps by more than 0.5.
- PxAP: area under precision and recall of the pixels of all images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsis.errors import InputError
from wsis.ops.score_boxes import box_overlaps

SIZE = 224
OVERLAPS = (0.3, 0.5, 0.7)
TOP = (1, 5)
FIXED = 0.2  # threshold of GT-known where a method names none


def thresholds(step: float) -> NDArray[np.float64]:
    """0, step, .. below 1. The evaluator uses 0.001 in training and 0.01 on its command line."""
    if not 0 < step <= 1:
        raise InputError(f"the step of the thresholds must be in (0, 1], got {step}")
    return np.arange(0, 1, step)


def normalize_scores(scores: NDArray[Any]) -> NDArray[np.float64]:
    """A map scaled to [0, 1]; zeros where it is constant or holds NaN.

    Args:
        scores: ``[H, W]`` float.

    Example:
        >>> normalize_scores(np.array([[1.0, 3.0]]))
        array([[0., 1.]])
    """
    low, high = scores.min(), scores.max()
    if not np.isfinite([low, high]).all() or low == high:
        return np.zeros(scores.shape)
    shifted = scores.astype(np.float64) - float(low)
    return shifted / shifted.max()


def resize_scores(scores: NDArray[Any], size: int = SIZE) -> NDArray[np.float64]:
    """Bicubic (a = -0.75, as OpenCV's) to ``[size, size]`` in float64.

    Args:
        scores: ``[H, W]`` float.
        size: rows and columns.
    """
    import torch
    import torch.nn.functional as F

    plane = torch.from_numpy(np.ascontiguousarray(scores, np.float64))[None, None]
    return F.interpolate(plane, (size, size), mode="bicubic", align_corners=False)[0, 0].numpy()


def scale_boxes(
    boxes: NDArray[np.float64], sizes: NDArray[np.int64], size: int = SIZE
) -> NDArray[np.int64]:
    """Boxes in pixels of maps of ``size``: ``int(x * size / width)``.

    Args:
        boxes: ``[M, 4]``.
        sizes: ``[M, 2]``, width and height of each box's image.
        size: rows and columns of the maps.
    """
    return (boxes * size / np.concatenate([sizes, sizes], axis=1)).astype(np.int64)


class BoxTally:
    """Counts images localized by boxes.

    Args:
        step: between thresholds.
        fixed: threshold of GT-known, Top-1 and Top-5 localization.

    Raises:
        InputError: the fixed threshold is not in [0, 1).
    """

    def __init__(self, step: float = 0.001, fixed: float = FIXED) -> None:
        if not 0 <= fixed < 1:
            raise InputError(f"the threshold of GT-known must be in [0, 1), got {fixed}")
        self.thresholds = thresholds(step)
        self.fixed = fixed
        self.images = self.known = self.ranked = 0
        self.top = dict.fromkeys(TOP, 0)
        shape = (len(OVERLAPS), len(self.thresholds))
        self.correct = {rule: np.zeros(shape, np.int64) for rule in ("all", "largest")}

    def add(self, scores: Any, boxes: Any, owner: Any, ranks: Any = None) -> None:
        """Count images.

        Args:
            scores: ``[N, 224, 224]`` in [0, 1].
            boxes: ``[M, 4]`` true boxes in pixels of the maps.
            owner: ``[M]``, the map of each.
            ranks: ``[N]``, classes held more likely than the true one, where they are known.
        """
        levels = np.concatenate([self.thresholds, [self.fixed]])
        for rule, correct in self.correct.items():
            best = box_overlaps(scores, boxes, owner, levels, rule)  # type: ignore[arg-type]
            for row, overlap in enumerate(OVERLAPS):
                correct[row] += (best[:, :-1] >= overlap).sum(axis=0)
            if rule == "largest":
                self.known += int((best[:, -1] >= 0.5).sum())
                if ranks is not None:
                    self.ranked += len(scores)
                    for count in TOP:
                        hit = (best[:, -1] > 0.5) & (np.asarray(ranks) < count)
                        self.top[count] += int(hit.sum())
        self.images += len(scores)

    def scores(self) -> dict[str, Any]:
        """Percentages, JSON-ready, with the threshold at which each was reached."""
        if not self.images:
            raise InputError("no image was scored")
        result: dict[str, Any] = {"images": self.images, "thresholds": len(self.thresholds)}
        for name, rule in (("MaxBoxAccV2", "all"), ("MaxBoxAcc", "largest")):
            share = 100 * self.correct[rule] / self.images
            best = share.max(axis=1).tolist()
            result[name] = float(np.mean(best)) if rule == "all" else best[OVERLAPS.index(0.5)]
            result[f"{name} by overlap"] = {
                f"{overlap:g}": {"accuracy": value, "threshold": float(self.thresholds[at])}
                for overlap, value, at in zip(OVERLAPS, best, share.argmax(axis=1), strict=True)
            }
        result["GT-known"] = 100 * self.known / self.images
        result["GT-known threshold"] = self.fixed
        if self.ranked == self.images:
            for count, hits in self.top.items():
                result[f"Top-{count} Loc"] = 100 * hits / self.images
        return result

    def best_threshold(self) -> float:
        """The lowest threshold at which most images are localized as GT-known asks."""
        return float(self.thresholds[self.correct["largest"][OVERLAPS.index(0.5)].argmax()])


class PixelTally:
    """Counts pixels by score, for PxAP.

    Args:
        step: width of the bins of the scores.
    """

    def __init__(self, step: float = 0.001) -> None:
        self.edges = np.append(thresholds(step), [1, 2, 3])
        self.positive = np.zeros(len(self.edges) - 1, np.int64)
        self.negative = self.positive.copy()

    def add(self, scores: Any, truth: Any) -> None:
        """Count one image: ``[H, W]`` in [0, 1], and 1 object, 0 background, 255 left out."""
        scores, truth = np.asarray(scores, np.float64), np.asarray(truth)
        if scores.shape != truth.shape:
            raise InputError(
                f"scores and truth must have one shape, got {list(scores.shape)} and "
                f"{list(truth.shape)}"
            )
        for value, counts in ((1, self.positive), (0, self.negative)):
            counts += np.histogram(scores[truth == value], bins=self.edges)[0]

    def pxap(self) -> float | None:
        """In percent; None without object pixels."""
        true, false = (np.cumsum(c[::-1]) for c in (self.positive, self.negative))
        if not len(true) or not true[-1]:
            return None
        some = true + false > 0
        precision = true[some] / (true + false)[some]
        recall = true[some] / true[-1]
        return float(100 * (precision[1:] * np.diff(recall)).sum() + 100 * precision[0] * recall[0])


def mask_truth(
    masks: Iterable[NDArray[Any]], ignore: NDArray[Any] | None, size: int = SIZE
) -> NDArray[np.uint8]:
    """Truth of PxAP from instance masks: 1 on an object, 255 where ignored and on none, else 0.

    Args:
        masks: ``[H, W]`` each, an object where not 0.
        ignore: likewise, or None.
        size: rows and columns of the result; nearest neighbour, ``floor(i * H / size)``.
    """
    truth = np.zeros((size, size), np.uint8)
    if ignore is not None:
        truth[_nearest(ignore, size)] = 255
    for mask in masks:
        truth[_nearest(mask, size)] = 1
    return truth


def _nearest(mask: NDArray[Any], size: int) -> NDArray[np.bool_]:
    rows, columns = (np.arange(size) * n // size for n in mask.shape)
    return mask[np.ix_(rows, columns)] > 0
