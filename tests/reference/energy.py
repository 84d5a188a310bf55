"""Dense energy losses with matrices, in float64: from the formulas, for tests.

The filter is a matrix ``A [N, N]`` per image: ``gaussian`` is the true one, ``lattice_matrix`` what
a filter really does. Resizes are matrices too, so that gradients are transposes.
"""

from __future__ import annotations

import math

import numpy as np


def resize_matrix(size: int, scale: float, recompute: bool, mode: str) -> np.ndarray:
    """``[out, size]``, the resize of ``F.interpolate(scale_factor=scale, align_corners=False)``."""
    out = math.floor(size * scale)
    ratio = size / out if recompute else 1 / scale
    matrix = np.zeros((out, size))
    for i in range(out):
        if mode == "nearest":
            matrix[i, min(math.floor(i * ratio), size - 1)] = 1
            continue
        at = max((i + 0.5) * ratio - 0.5, 0)
        low = min(math.floor(at), size - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, min(low + 1, size - 1)] += at - low
    return matrix


def resize(maps: np.ndarray, scale: float, recompute: bool, mode: str) -> np.ndarray:
    """``[..., H, W] -> [..., h, w]``."""
    rows, columns = (resize_matrix(n, scale, recompute, mode) for n in maps.shape[-2:])
    return rows @ maps.astype(np.float64) @ columns.T


def features(guide: np.ndarray, sigma_xy: float, sigma) -> np.ndarray:
    """``[c, h, w] -> [2 + c, N]``: places and guide over their widths."""
    _, height, width = guide.shape
    y, x = np.mgrid[:height, :width] / sigma_xy
    sigma = np.broadcast_to(np.asarray(sigma, np.float64), guide.shape[:1])[:, None, None]
    return np.concatenate([x[None], y[None], guide / sigma]).reshape(2 + len(guide), -1)


def gaussian(points: np.ndarray) -> np.ndarray:
    """``[d, N] -> [N, N]``, ``exp(-|f_i - f_j|^2 / 2)``."""
    difference = points[:, :, None] - points[:, None, :]
    return np.exp(-0.5 * (difference**2).sum(axis=0))


def lattice_matrix(apply, size: tuple[int, int]) -> np.ndarray:
    """``[N, N]`` of a filter of ``[N, h, w]`` maps: what it makes of every single pixel."""
    n = size[0] * size[1]
    return np.asarray(apply(np.eye(n).reshape(n, *size))).reshape(n, n).T


def energy(
    probs: np.ndarray,
    matrices: list[np.ndarray],
    roi: np.ndarray | None = None,
    unlabelled: np.ndarray | None = None,
    *,
    gated: bool = False,
    scale: float = 1.0,
    recompute: bool = True,
) -> tuple[float, np.ndarray]:
    """The loss, and the published gradient with respect to ``probs``.

    Args:
        probs: ``[B, K, H, W]``.
        matrices: one ``[h w, h w]`` per image, at the scaled size.
        roi: ``[B, H, W]``.
        unlabelled: ``[B, H, W]``, 1 where nothing is known.
        gated: whether unsure pixels alone count.
        scale: of the resizes.
        recompute: of the resizes.
    """
    batch = len(probs)
    loss, gradient = 0.0, np.zeros(probs.shape)
    for b in range(batch):
        s = resize(probs[b], scale, recompute, "bilinear")
        inside = np.ones(s.shape[1:])
        if roi is not None:
            inside = resize(roi[b], scale, recompute, "nearest")
        gate = np.ones_like(inside)
        if gated:
            gate = np.maximum(inside - s.max(axis=0), 0)
            if unlabelled is not None:
                gate[resize(unlabelled[b], scale, recompute, "nearest") > 0] = 1
        seen = s * inside
        filtered = (seen.reshape(len(s), -1) @ matrices[b].T).reshape(s.shape)
        loss -= (seen * gate * filtered).sum() / batch
        small = -2 * gate * filtered * inside / batch
        rows, columns = (resize_matrix(n, scale, recompute, "bilinear") for n in probs.shape[-2:])
        gradient[b] = rows.T @ small @ columns
    return loss, gradient
