"""Confusion matrices, at one threshold or at all of them in a single read of the pixels.

numpy arrays and torch tensors alike; torch is not needed for the former. Counts are 64-bit integers
and exact: the result does not depend on threads, device or memory layout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import pairwise
from math import isnan
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from wsis.errors import InputError
from wsis.ops._native import _C, cuda_function, is_tensor, num_parts, stream, view
from wsis.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

ArrayT = TypeVar("ArrayT", "np.ndarray[Any, Any]", "Tensor")

_INTEGERS = ("uint8", "int16", "int32", "int64")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_MOST_CLASSES = 46340  # the cells of a matrix are numbered with 31 bits
_MOST_CELLS = 2**31 - 1


def confusion_matrix(
    pred: ArrayT, target: ArrayT, num_classes: int, *, ignore_index: int = IGNORE
) -> ArrayT:
    """Counts pixels by class: ``counts[t, p] = #{i : target_i = t, pred_i = p}``.

    Pixels whose target is ``ignore_index`` are skipped, whatever their prediction. On CUDA the
    check of the values waits for the result.

    Args:
        pred: any shape, uint8, int16, int32 or int64, in [0, C) wherever the target counts.
        target: same shape and device, one of the same dtypes, in [0, C) or ``ignore_index``.
        num_classes: C, from 1 to 46340.
        ignore_index: target value that is not counted. 255 is the void label of Pascal VOC.

    Returns:
        ``[C, C]`` int64, rows target, columns prediction, same kind and device as ``pred``.

    Raises:
        InputError: kinds, shapes, devices or dtypes that do not fit, or a value out of range.

    Example:
        >>> import numpy as np
        >>> confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 255]), 2)
        array([[1, 0],
               [0, 1]])
    """
    _check_kinds(pred=pred, target=target)
    _check_dtype("pred", pred, _INTEGERS)
    _check_target(target, num_classes)
    if pred.shape != target.shape:
        raise InputError(
            f"pred and target must have one shape, got {list(pred.shape)} and {list(target.shape)}"
        )
    if is_tensor(pred):
        _register_torch()
        tally = sys.modules["torch"].ops.wsis.confusion_matrix(
            pred, target, num_classes, ignore_index
        )
    else:
        pred_n, target_n = _flat(pred), _flat(target)
        tally, scratch = _new_tally(pred_n, num_classes**2, num_classes**2, pred_n.size)
        _C.confusion_matrix_cpu(pred_n, target_n, tally, scratch, num_classes, ignore_index)
    _check_values(tally[-2:], target, num_classes, pred)
    return tally[:-2].reshape(num_classes, num_classes)


def threshold_curve(
    scores: ArrayT,
    target: ArrayT,
    thresholds: Iterable[float],
    *,
    class_ids: Iterable[int] | None = None,
    num_classes: int,
    ignore_index: int = IGNORE,
) -> ArrayT:
    """Confusion matrices of ``argmax(t, scores_1, .., scores_K)`` for every background score t.

    A pixel is foreground at t where its best score is strictly above t (a tie is background), and
    of two equal scores the lower channel wins. NaN never wins: a channel that is NaN is left out,
    a pixel without a number is background. Pixels are read once for all thresholds: best channel
    and ``b = #{t : t < best}`` per pixel, a histogram by (target, channel, b), its suffix sums.

    Args:
        scores: ``[K, H, W]`` or ``[B, K, H, W]``, foreground scores, float64, float32, or half
            precision, which is compared in float32.
        target: ``[H, W]`` or ``[B, H, W]``, same kind and device, uint8, int16, int32 or int64, in
            [0, C) or ``ignore_index``.
        thresholds: T >= 1 numbers that do not descend, rounded to the dtype of the comparison.
        class_ids: K ids in [0, C), class of each channel; None means 1 .. K.
        num_classes: C with background, which is class 0.
        ignore_index: target value that is not counted.

    Returns:
        ``[T, C, C]`` int64, rows target, columns prediction, of the kind and on the device of
        ``scores``.

    Raises:
        InputError: kinds, shapes, devices or dtypes that do not fit, or a value out of range.

    Example:
        >>> import numpy as np
        >>> scores = np.array([[[0.2, 0.8]]], np.float32)
        >>> threshold_curve(scores, np.array([[0, 1]]), [0.1, 0.5], num_classes=2)[:, 0, 0]
        array([0, 1])
    """
    _check_kinds(scores=scores, target=target)
    _check_dtype("scores", scores, _FLOATS)
    _check_target(target, num_classes)
    if scores.ndim not in (3, 4) or scores.shape[-3] < 1:
        raise InputError(f"scores must be [K, H, W] or [B, K, H, W], got {list(scores.shape)}")
    if (*scores.shape[:-3], *scores.shape[-2:]) != tuple(target.shape):
        raise InputError(
            f"target must be scores' shape without K, got {list(target.shape)} for scores "
            f"{list(scores.shape)}"
        )
    if scores.ndim == 3:
        scores, target = scores[None], target[None]
    limits = _check_thresholds(thresholds)
    ids = _check_class_ids(class_ids, scores.shape[1], num_classes)
    if num_classes * len(ids) * (len(limits) + 1) > _MOST_CELLS:
        raise InputError(
            f"num_classes * K * (T + 1) must be below 2^31, got {num_classes} * {len(ids)} * "
            f"{len(limits) + 1}; give fewer thresholds at a time"
        )
    if is_tensor(scores):
        _register_torch()
        tally = sys.modules["torch"].ops.wsis.threshold_curve(
            scores, target, limits, ids, num_classes, ignore_index
        )
    else:
        scores_n, target_n = _planes(_wide(scores)), _planes(target)
        cells = num_classes * len(ids) * (len(limits) + 1)
        tally, scratch = _new_tally(scores_n, len(limits) * num_classes**2, cells, scores_n.size)
        limits_t, ids_k = np.array(limits, scores_n.dtype), np.array(ids, np.int64)
        _C.threshold_curve_cpu(
            scores_n, target_n, limits_t, ids_k, tally, scratch, num_classes, ignore_index
        )
    _check_values(tally[-2:], target, num_classes)
    return tally[:-2].reshape(len(limits), num_classes, num_classes)


# ---- checks ------------------------------------------------------------------------------------


def _check_kinds(**arrays: Any) -> None:
    kinds = ["tensor" if is_tensor(a) else type(a).__name__ for a in arrays.values()]
    names = " and ".join(arrays)
    if set(kinds) not in ({"tensor"}, {"ndarray"}):
        raise InputError(
            f"{names} must both be torch tensors or both numpy arrays, got {' and '.join(kinds)}"
        )
    devices = {str(a.device) for a in arrays.values()} if is_tensor(arrays["target"]) else {"cpu"}
    if len(devices) > 1:
        raise InputError(f"{names} must be on one device, got {' and '.join(sorted(devices))}")


def _check_dtype(name: str, array: Any, dtypes: tuple[str, ...]) -> None:
    got = str(array.dtype).removeprefix("torch.")
    if got not in dtypes:
        raise InputError(f"{name} must be one of {', '.join(dtypes)}, got {got}")


def _check_target(target: Any, num_classes: int) -> None:
    _check_dtype("target", target, _INTEGERS)
    if not 1 <= num_classes <= _MOST_CLASSES:
        raise InputError(f"num_classes must be in [1, {_MOST_CLASSES}], got {num_classes}")


def _check_thresholds(thresholds: Iterable[float]) -> list[float]:
    limits = [float(t) for t in thresholds]
    if not limits or any(isnan(t) for t in limits) or any(a > b for a, b in pairwise(limits)):
        raise InputError(f"thresholds must be one or more ascending numbers, got {limits[:8]}")
    return limits


def _check_class_ids(class_ids: Iterable[int] | None, channels: int, num_classes: int) -> list[int]:
    ids = list(range(1, channels + 1)) if class_ids is None else [int(i) for i in class_ids]
    if len(ids) != channels or min(ids) < 0 or max(ids) >= num_classes:
        raise InputError(
            f"class_ids must be {channels} ids in [0, {num_classes}), one per channel of scores, "
            f"got {ids}"
        )
    return ids


def _check_values(status: Any, target: Any, num_classes: int, pred: Any = None) -> None:
    """Raises if an operator met a class out of range; status as in csrc/cpu/confusion.h."""
    if is_tensor(status) and _must_not_wait(status):
        sys.modules["torch"]._assert_async(
            status[0] == 0, f"a class is outside [0, {num_classes}): bad prediction or target"
        )
        return
    count, left = status.tolist()
    if not count:
        return
    index = np.unravel_index(int(np.prod(target.shape)) - left, tuple(target.shape))
    where = f"at {[int(i) for i in index]}" + (f" and at {count - 1} more" if count > 1 else "")
    value = int(target[index])
    if 0 <= value < num_classes:
        raise InputError(
            f"pred must be in [0, {num_classes}) wherever target counts, got {int(pred[index])} "
            f"{where}"
        )
    raise InputError(f"target must be in [0, {num_classes}) or ignore_index, got {value} {where}")


def _must_not_wait(status: Tensor) -> bool:
    """Whether torch.compile traces or a CUDA graph records: no value can be looked at."""
    torch = sys.modules["torch"]
    return torch.compiler.is_compiling() or (
        status.is_cuda and torch.cuda.is_current_stream_capturing()
    )


# ---- layouts and memory ------------------------------------------------------------------------


def _wide(scores: Any) -> Any:
    """Half precision in float32, the rest as it is."""
    if is_tensor(scores):
        return scores.float() if scores.itemsize < 4 else scores
    return scores.astype(np.float32) if scores.itemsize < 4 else scores


def _contiguous(array: Any) -> Any:
    return array.contiguous() if is_tensor(array) else np.ascontiguousarray(array)


def _flat(array: Any) -> Any:
    """``[n]``, contiguous."""
    return _contiguous(array).reshape(-1)


def _planes(array: Any) -> Any:
    """``[B, K, H, W] -> [B, K, H * W]`` and ``[B, H, W] -> [B, H * W]``, contiguous."""
    shape = (*array.shape[:-2], array.shape[-2] * array.shape[-1])
    return _contiguous(array).reshape(shape)


def _new_tally(like: Any, counts: int, cells: int, touched: int) -> tuple[Any, Any]:
    """Result ``[counts + 2]`` and scratch ``[parts, cells + 2]`` on the CPU, uninitialised."""
    parts = num_parts(touched)
    if is_tensor(like):
        long = sys.modules["torch"].int64
        return like.new_empty(counts + 2, dtype=long), like.new_empty(
            (parts, cells + 2), dtype=long
        )
    return np.empty(counts + 2, np.int64), np.empty((parts, cells + 2), np.int64)


# ---- torch -------------------------------------------------------------------------------------

_library: Any = None


def _register_torch() -> None:
    """Registers ``torch.ops.wsis.confusion_matrix`` and ``threshold_curve``, once."""
    global _library
    if _library is not None:
        return
    import torch

    library = torch.library.Library("wsis", "FRAGMENT")
    library.define(
        "confusion_matrix(Tensor pred, Tensor target, int num_classes, int ignore_index) -> Tensor"
    )
    library.define(
        "threshold_curve(Tensor scores, Tensor target, float[] thresholds, int[] class_ids, "
        "int num_classes, int ignore_index) -> Tensor"
    )
    library.impl("confusion_matrix", _confusion_matrix_cpu, "CPU")
    library.impl("confusion_matrix", _confusion_matrix_cuda, "CUDA")
    library.impl("threshold_curve", _threshold_curve_cpu, "CPU")
    library.impl("threshold_curve", _threshold_curve_cuda, "CUDA")

    @torch.library.register_fake("wsis::confusion_matrix", lib=library)
    def _(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
        return pred.new_empty(num_classes**2 + 2, dtype=torch.int64)

    @torch.library.register_fake("wsis::threshold_curve", lib=library)
    def _(
        scores: Tensor,
        target: Tensor,
        thresholds: list[float],
        class_ids: list[int],
        num_classes: int,
        ignore_index: int,
    ) -> Tensor:
        return scores.new_empty(len(thresholds) * num_classes**2 + 2, dtype=torch.int64)

    _library = library


def _confusion_matrix_cpu(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    pred_n, target_n = _flat(pred), _flat(target)
    cells = num_classes**2
    tally, scratch = _new_tally(pred_n, cells, cells, pred_n.numel())
    arrays = map(view, (pred_n, target_n, tally, scratch))
    _C.confusion_matrix_cpu(*arrays, num_classes, ignore_index)
    return tally


def _confusion_matrix_cuda(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    kernel = cuda_function("confusion_matrix_cuda")
    pred_n, target_n = _flat(pred), _flat(target)
    tally = pred_n.new_zeros(num_classes**2 + 2, dtype=sys.modules["torch"].int64)
    kernel(*map(view, (pred_n, target_n, tally)), num_classes, ignore_index, stream(tally))
    return tally


def _threshold_curve_cpu(
    scores: Tensor,
    target: Tensor,
    thresholds: list[float],
    class_ids: list[int],
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    scores_n, target_n = _planes(_wide(scores)), _planes(target)
    cells = num_classes * len(class_ids) * (len(thresholds) + 1)
    tally, scratch = _new_tally(scores_n, len(thresholds) * num_classes**2, cells, scores_n.numel())
    limits = scores_n.new_tensor(thresholds)
    ids = target_n.new_tensor(class_ids, dtype=tally.dtype)
    arrays = map(view, (scores_n, target_n, limits, ids, tally, scratch))
    _C.threshold_curve_cpu(*arrays, num_classes, ignore_index)
    return tally


def _threshold_curve_cuda(
    scores: Tensor,
    target: Tensor,
    thresholds: list[float],
    class_ids: list[int],
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    kernel = cuda_function("threshold_curve_cuda")
    torch = sys.modules["torch"]
    scores_n, target_n = _planes(_wide(scores)), _planes(target)

    def upload(values: list[Any], dtype: Any) -> Tensor:
        # From pinned memory, so that the host does not wait for the stream.
        return torch.tensor(values, dtype=dtype).pin_memory().to(scores.device, non_blocking=True)

    limits, ids = upload(thresholds, scores_n.dtype), upload(class_ids, torch.int64)
    cells = num_classes * len(class_ids) * (len(thresholds) + 1)
    histogram = scores_n.new_zeros(cells, dtype=torch.int64)
    tally = scores_n.new_zeros(len(thresholds) * num_classes**2 + 2, dtype=torch.int64)
    arrays = map(view, (scores_n, target_n, limits, ids, tally, histogram))
    kernel(*arrays, num_classes, ignore_index, stream(tally))
    return tally


# torch.compile cannot trace a registration, so it happens here where torch is already loaded; else
# the first tensor that comes along triggers it.
if sys.modules.get("torch"):
    _register_torch()
