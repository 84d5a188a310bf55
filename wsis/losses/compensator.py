"""Compensator: CAMs completed with what the best positions of the class attend to.

Sizes: as in ``contrast``; ``s`` the common grid of the equivariance losses, ``P`` most classes of
one image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wsis.losses.equivariance import hardest_mean, on_common_grid, take_channels
from wsis.ops.normalize import add_background, one_hot_max

if TYPE_CHECKING:
    from torch import Tensor

    from wsis.losses.contrast import TopPositions


@torch.no_grad()
def compensate(
    scores: Tensor,
    top: TopPositions,
    features: Tensor,
    pool: Tensor,
    classes: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Add to each position the scores of the class's best positions, by feature similarity.

    ``C_c(i) = S_c(i) + sum_t softmax_t( z_i . z_t / temperature ) s_t`` (ChunyanWang1/RTC, where
    the temperature is 1).

    Args:
        scores: ``[B, C, h, w]`` float of this view.
        top: best positions of this view, in the batch of all processes.
        features: ``[n, D]`` float of the other view, unit length.
        pool: the same of all processes, which the positions count through.
        classes: ``[M] int64``, the channels to complete; others stay as they are.
        temperature: of the attention.

    Returns:
        ``[B, C, h, w]`` float. No gradient.
    """
    keys = pool[top.index[classes]]  # [M, T, D]
    similarity = (features @ keys.flatten(0, 1).T).unflatten(1, keys.shape[:2])  # [n, M, T]
    added = ((similarity / temperature).softmax(dim=2) * top.value[classes]).sum(dim=2)
    batch, _, height, width = scores.shape
    completed = scores.clone()
    completed[:, classes] += added.view(batch, height, width, -1).permute(0, 3, 1, 2)
    return completed


def compensation(
    cams: Tensor,
    completed: Tensor,
    index: Tensor,
    label: Tensor,
    classes: int,
    keep: float = 0.8,
) -> Tensor:
    """CAM of one view against the one-hot maximum of its completed scores, ``L_com``.

    Mean over the ``floor(keep * K * s * s)`` largest entries per image of
    ``|G - H(B)|`` without background, ``G = H( resize(M(C)) * y )`` (ChunyanWang1/RTC).

    Args:
        cams: ``[B, P, s, s]`` float, normalised and masked by the label; gets the gradient.
        completed: ``[B, C, h, w]`` float, from :func:`compensate`.
        index: ``[B, P] int64``, foreground class (0..K-1) of each channel of ``cams``.
        label: ``[B, P]``, 0 where ``cams`` is padded.
        classes: K, number of foreground classes in the mean.
        keep: part of the entries kept, in (0, 1].

    Returns:
        Scalar.
    """
    with torch.no_grad():
        size = (cams.shape[-2], cams.shape[-1])
        target = on_common_grid(take_channels(completed, index + 1), label, size)
        target = one_hot_max(add_background(target, "complement"))[:, 1:]
    kept = one_hot_max(add_background(cams, "complement"))[:, 1:]
    return hardest_mean((target - kept).abs(), classes, keep)
