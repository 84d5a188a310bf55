"""Unary energies and pairwise features, as ``pydensecrf.utils`` makes them.

Sizes: ``L`` labels, ``N`` points (pixels, row by row), ``D`` features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wsis.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def unary_from_labels(
    labels: NDArray[Any], n_labels: int, gt_prob: float, zero_unsure: bool = True
) -> Floats:
    """Energies of a label map that is right with probability ``gt_prob``.

    ``-log(gt_prob)`` for the label of a pixel, ``-log((1 - gt_prob) / (n_labels - 1))`` for the
    others; ``-log(1 / n_labels)`` for all labels of a pixel that nothing is known of.

    Args:
        labels: any shape, integer: ``0..n_labels - 1``, or with ``zero_unsure`` ``1..n_labels``
            and 0 where nothing is known.
        n_labels: L; with ``zero_unsure`` the 0 does not count.
        gt_prob: in (0, 1).
        zero_unsure: whether 0 means "could be anything".

    Returns:
        ``[L, N] float32``.

    Raises:
        InputError: ``gt_prob`` outside (0, 1), labels that are no integers or outside the range.

    Example:
        >>> unary_from_labels(np.array([[0, 1]]), 2, 0.75, zero_unsure=False).round(3)
        array([[0.288, 1.386],
               [1.386, 0.288]], dtype=float32)
    """
    labels = np.asarray(labels)
    if not np.all((np.asarray(gt_prob) > 0) & (np.asarray(gt_prob) < 1)):
        raise InputError(f"`gt_prob` must be in (0,1), got {gt_prob}")
    if labels.dtype.kind not in "iub":
        raise InputError(f"labels must be integers, got {labels.dtype}")
    if n_labels < 1:
        raise InputError(f"n_labels must be at least 1, got {n_labels}")
    first, known = int(zero_unsure), labels.reshape(-1).astype(np.int64)
    if known.size and not (0 <= known.min() and known.max() < n_labels + first):
        bad = known[(known < 0) | (known >= n_labels + first)][0]
        raise InputError(f"labels must be 0..{n_labels + first - 1}, got {bad}")
    gt_prob = float(np.asarray(gt_prob).item())
    # One label is certain; there is no other to share the rest.
    others = -np.log((1 - gt_prob) / (n_labels - 1)) if n_labels > 1 else 0.0
    energies = np.full((n_labels, known.size), others, np.float32)
    at = np.flatnonzero(known) if zero_unsure else np.arange(known.size)
    energies[known[at] - first, at] = -np.log(gt_prob)
    if zero_unsure:
        energies[:, known == 0] = -np.log(1 / n_labels)
    return energies


def compute_unary(labels: NDArray[Any], M: int, GT_PROB: float = 0.5) -> Floats:
    """Deprecated name of :func:`unary_from_labels`, with ``zero_unsure``."""
    logging.warning("pydensecrf.compute_unary is deprecated, use unary_from_labels instead.")
    return unary_from_labels(labels, M, GT_PROB)


def unary_from_softmax(
    sm: NDArray[Any], scale: float | None = None, clip: float | None = 1e-5
) -> Floats:
    """Energies of probabilities: ``-log(clip(p, clip, 1))``.

    Args:
        sm: ``[L, ...]`` float, probabilities; they need not sum to 1. Not changed.
        scale: in (0, 1]: how much the probabilities are trusted; first
            ``p = scale p + (1 - scale) / L``.
        clip: smallest probability; None clips nothing.

    Returns:
        ``[L, N] float32``, C-contiguous.

    Raises:
        InputError: ``scale`` outside (0, 1], or not at least one axis.

    Example:
        >>> unary_from_softmax(np.array([[1.0, 0.0], [0.0, 1.0]])).round(2)
        array([[-0.  , 11.51],
               [11.51, -0.  ]], dtype=float32)
    """
    sm = np.asarray(sm)
    if sm.ndim < 1 or sm.shape[0] < 1:
        raise InputError(f"sm must be [L, ...] with L of at least 1, got {list(sm.shape)}")
    if sm.dtype.kind != "f":
        sm = sm.astype(np.float64)
    if scale is not None:
        if not 0 < scale <= 1:
            raise InputError(f"`scale` needs to be in (0,1], got {scale}")
        sm = scale * sm + (1 - scale) / sm.shape[0]
    # One fresh array, C-ordered, and every step in it: 81 labels at 480 x 640 are 100 MB.
    if clip is None:
        energies = np.array(sm, order="C")
    else:
        energies = np.clip(sm, clip, 1.0, out=np.empty(sm.shape, sm.dtype))
    np.negative(np.log(energies, out=energies), out=energies)
    return energies.reshape(sm.shape[0], -1).astype(np.float32, copy=False)


def softmax_to_unary(sm: NDArray[Any], GT_PROB: float = 1) -> Floats:
    """Deprecated name of :func:`unary_from_softmax`; ``GT_PROB`` is its ``scale``."""
    logging.warning("pydensecrf.softmax_to_unary is deprecated, use unary_from_softmax instead.")
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB)


def create_pairwise_gaussian(sdims: Sequence[float], shape: Sequence[int]) -> Floats:
    """Features of points on a grid: their coordinates over the widths, in the order of the axes.

    (``DenseCRF2D.addPairwiseGaussian`` has x before y.)

    Args:
        sdims: width along each axis, > 0.
        shape: the grid.

    Returns:
        ``[D, N] float32``.

    Raises:
        InputError: not one positive width per axis.

    Example:
        >>> create_pairwise_gaussian((1, 2), (2, 2))
        array([[0. , 0. , 1. , 1. ],
               [0. , 0.5, 0. , 0.5]], dtype=float32)
    """
    widths = _widths("sdims", sdims, len(shape))
    grid = np.empty((len(shape), *shape), np.float32)
    for axis, (size, width) in enumerate(zip(shape, widths, strict=True)):
        along = [1] * len(shape)
        along[axis] = size
        grid[axis] = (np.arange(size, dtype=np.float32) / width).reshape(along)
    return grid.reshape(len(shape), -1)


def create_pairwise_bilateral(
    sdims: Sequence[float], schan: Sequence[float] | float, img: NDArray[Any], chdim: int = -1
) -> Floats:
    """Features of the pixels of an image: coordinates and channels, each over its width.

    Args:
        sdims: width along each axis of the image without its channels, > 0.
        schan: width of each channel, or one for all, > 0.
        img: image of any number of axes and any dtype.
        chdim: axis of the channels; -1 for an image without such an axis (so the last axis must be
            counted from the front).

    Returns:
        ``[D, N] float32``: the coordinates in the order of the axes, then the channels.

    Raises:
        InputError: widths that do not fit, or no such axis.

    Example:
        >>> create_pairwise_bilateral((1, 1), (10,), np.full((1, 2), 5.0))
        array([[0. , 0. ],
               [0. , 1. ],
               [0.5, 0.5]], dtype=float32)
    """
    img = np.asarray(img)
    if chdim == -1:
        channels = img[np.newaxis]
    elif -img.ndim <= chdim < img.ndim:
        channels = np.moveaxis(img, chdim, 0)
    else:
        raise InputError(f"chdim must be an axis of img {list(img.shape)} or -1, got {chdim}")
    shape, count = channels.shape[1:], channels.shape[0]
    axes, widths = _widths("sdims", sdims, len(shape)), _widths("schan", schan, count)
    features = np.empty((len(shape) + count, *shape), np.float32)
    features[: len(shape)] = create_pairwise_gaussian(axes, shape).reshape(len(shape), *shape)
    for channel, width, out in zip(channels, widths, features[len(shape) :], strict=True):
        np.divide(channel, width, out=out, dtype=np.float32, casting="unsafe")
    return features.reshape(len(features), -1)


def _widths(name: str, given: Any, count: int) -> list[float]:
    """``count`` positive widths; a number stands for all of them."""
    values = np.asarray(given, np.float64)
    if values.ndim == 0:
        values = np.full(count, float(values))
    if values.shape != (count,):
        raise InputError(f"{name} must be {count} widths, got {given}")
    # `not >` also refuses NaN.
    if not (values > 0).all() or not np.isfinite(values).all():
        raise InputError(f"{name} must be positive, got {given}")
    return values.tolist()
