"""Boxes around what a score map shows, at every threshold in one pass: for localization metrics.

The rules are those of the field's evaluator (Choe et al. 2020, arXiv 2007.04178; wsolevaluation,
whose boxes come from OpenCV's ``findContours`` with the tree of all contours). numpy only.

A map is cut above ``int(t * max)`` of its 256 levels. Contours lie around components of 8
neighbours and around the holes in them. A contour's box is ``[x, y, min(x + w, W - 1),
min(y + h, H - 1)]`` of its rectangle: one pixel more than the last pixel, but at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsis.errors import InputError
from wsis.ops._native import _C, num_parts

Contours = Literal["all", "largest"]

_TOUCHES = 64  # what a pixel costs, in elements that another operator touches


def score_boxes(scores: Any, threshold: float, contours: Contours = "all") -> NDArray[np.int32]:
    """Boxes found in one map at one threshold.

    Args:
        scores: ``[H, W]`` float in [0, 1], or uint8 levels; 1 to 8192 rows and columns.
        threshold: t in [0, 1]; pixels above ``int(t * max)`` are taken, of ``floor(255 scores)``.
        contours: ``all`` (MaxBoxAccV2), or the one of the ``largest`` polygon (MaxBoxAcc); of equal
            ones the one that begins last in reading order, as OpenCV lists them.

    Returns:
        ``[n, 4]`` int32, ``x0 y0 x1 y1`` with both corners inside, in ascending order; ``0 0 0 0``
        where nothing is found.

    Raises:
        InputError: another shape or dtype, a score outside [0, 1] or not a number.

    Example:
        >>> scores = np.zeros((5, 6)); scores[1:3, 2:4] = 1
        >>> score_boxes(scores, 0.5)
        array([[2, 1, 4, 3]], dtype=int32)
    """
    levels = _check_levels(scores, 2)
    height, width = levels.shape
    found = np.empty((height * width, 4), np.int32)
    scratch = np.empty(_C.score_boxes_words(height, width), np.int32)
    level = int(_check_thresholds([threshold])[0] * levels.max())
    count = _C.score_boxes_cpu(levels, found, scratch, level, _is_largest(contours))
    boxes = found[:count] if count else np.zeros((1, 4), np.int32)
    return boxes[np.lexsort(boxes.T[::-1])]


def box_overlaps(
    scores: Any,
    boxes: Any,
    owner: Any,
    thresholds: Sequence[float],
    contours: Contours = "all",
) -> NDArray[np.float64]:
    """Largest overlap of a true box with a box found, for every map and threshold.

    Every box of a map is looked at once for all thresholds at which it stands.

    Args:
        scores: ``[N, H, W]`` as for :func:`score_boxes`.
        boxes: ``[M, 4]`` integer, true boxes ``x0 y0 x1 y1`` in pixels of the maps.
        owner: ``[M]`` integer in [0, N), the map of each box.
        thresholds: T numbers in [0, 1].
        contours: as for :func:`score_boxes`.

    Returns:
        ``[N, T]`` float64, intersection over union with both corners inside; 0 for a map without
        a true box.

    Raises:
        InputError: as :func:`score_boxes`, boxes that do not fit, or an owner out of range.

    Example:
        >>> scores = np.zeros((1, 5, 6)); scores[0, 1:3, 2:4] = 1
        >>> box_overlaps(scores, [[2, 1, 4, 3]], [0], [0.5])
        array([[1.]])
    """
    levels = _check_levels(scores, 3)
    maps, height, width = levels.shape
    truth, owner = _check_boxes(boxes), np.asarray(owner)
    if owner.shape != truth.shape[:1] or not np.issubdtype(owner.dtype, np.integer):
        raise InputError(f"owner must be [{len(truth)}] integer, got {owner.dtype}{owner.shape}")
    if len(owner) and (owner.min() < 0 or owner.max() >= maps):
        raise InputError(f"owner must be in [0, {maps}), got {owner.min()} to {owner.max()}")
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=maps)).astype(np.int64)
    parts = min(num_parts(levels.size * _TOUCHES), max(maps, 1))
    scratch = np.empty((parts, _C.score_boxes_words(height, width)), np.int32)
    best = np.empty((maps, 256))
    _C.score_box_overlaps_cpu(levels, truth[order], ends, best, scratch, _is_largest(contours))
    tops = levels.max(axis=(1, 2)).astype(np.float64)
    cuts = (_check_thresholds(thresholds) * tops[:, None]).astype(np.int64)
    return np.take_along_axis(best, cuts, axis=1)


def box_iou(a: Any, b: Any) -> NDArray[np.float64]:
    """Overlap of every box of ``a`` with every box of ``b``, both corners inside.

    Args:
        a: ``[A, 4]`` integer, ``x0 y0 x1 y1``.
        b: ``[B, 4]`` likewise.

    Returns:
        ``[A, B]`` float64, intersection over union; 0 where the union is empty.

    Raises:
        InputError: other shapes, a corner below 0 or ``x1 < x0``.

    Example:
        >>> box_iou([[0, 0, 1, 1]], [[1, 1, 2, 2]]).round(3)
        array([[0.143]])
    """
    first, second = (_check_boxes(x).astype(np.int64) for x in (a, b))

    def area(low: Any, high: Any) -> Any:
        return np.clip(high - low + 1, 0, None).prod(axis=-1)

    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = area(low, high)
    either = area(first[:, :2], first[:, 2:])[:, None] + area(second[:, :2], second[:, 2:]) - both
    return np.where(either > 0, both / np.maximum(either, 1), 0.0)


# ---- checks ------------------------------------------------------------------------------------


def _check_levels(scores: Any, ndim: int) -> NDArray[np.uint8]:
    array = np.asarray(scores)
    wanted = "[H, W]" if ndim == 2 else "[N, H, W]"
    if array.ndim != ndim or not all(1 <= n <= 8192 for n in array.shape[-2:]):
        raise InputError(
            f"scores must be {wanted} with 1 to 8192 rows and columns, got {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"scores must be float or uint8, got {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() <= 1):  # NaN fails both
        raise InputError(f"scores must be in [0, 1], got {array.min()} to {array.max()}")
    return np.ascontiguousarray((array * 255).astype(np.uint8))


def _check_boxes(boxes: Any) -> NDArray[np.int32]:
    array = np.asarray(boxes)
    if array.size == 0:
        return np.empty((0, 4), np.int32)
    if array.ndim != 2 or array.shape[1] != 4 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"boxes must be [M, 4] integer, got {array.dtype}{list(array.shape)}")
    bad = (array.min(axis=1) < 0) | (array[:, 2:] < array[:, :2]).any(axis=1)
    if bad.any() or array.max() >= 2**31:
        raise InputError(
            "boxes must be x0 y0 x1 y1 with 0 <= x0 <= x1 and 0 <= y0 <= y1, got "
            f"{array[np.argmax(bad)].tolist()}"
        )
    return np.ascontiguousarray(array.astype(np.int32))


def _check_thresholds(thresholds: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(thresholds, np.float64)
    if array.ndim != 1 or not ((array >= 0) & (array <= 1)).all():
        raise InputError(f"thresholds must be numbers in [0, 1], got {thresholds}")
    return array


def _is_largest(contours: str) -> bool:
    if contours not in ("all", "largest"):
        raise InputError(f"contours must be 'all' or 'largest', got {contours!r}")
    return contours == "largest"
