"""Cross-transform regularisation: pixel-to-prototype contrast between two views.

Sizes: ``B`` batch, ``K`` foreground classes, ``C = K + 1`` with background at 0, ``D`` feature
channels, ``h w`` grid of view 2, ``n = B h w`` positions of the batch in order (image, row,
column), ``T`` positions per prototype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from wsis.global_batch import mean_over_processes, place

if TYPE_CHECKING:
    from torch import Tensor

BackgroundPrototype = Literal["ties", "confident"]


@dataclass(frozen=True)
class TopPositions:
    """The best positions of every class over the batch.

    Attributes:
        index: ``[C, T] int64``, positions in ``0..n-1``, best first, ties to the lowest.
        value: ``[C, T]`` float, their scores.
        valid: ``[C] bool``, False for a class that has no position to offer.
    """

    index: Tensor
    value: Tensor
    valid: Tensor


def batch_positions(maps: Tensor) -> Tensor:
    """``[B, D, h, w]`` to ``[n, D]``: all positions of the batch in one list.

    Prototypes are drawn from this list.
    """
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def pixel_labels(scores: Tensor, label: Tensor) -> Tensor:
    """Class of each position: the best score among the image's classes; ties go to background.

    Args:
        scores: ``[B, C, h, w]`` float, background in channel 0.
        label: ``[B, K]``, multi-hot.

    Returns:
        ``[n] int64`` in 0..K.
    """
    best, index = (scores[:, 1:] * label[..., None, None]).max(dim=1)
    return torch.where(best > scores[:, 0], index + 1, 0).flatten()


def top_positions(
    scores: Tensor,
    label: Tensor,
    count: int,
    *,
    background: BackgroundPrototype = "ties",
    mask_by_label: bool = False,
) -> TopPositions:
    """The ``count`` positions of the batch with the largest scores, per class.

    Args:
        scores: ``[B, C, h, w]`` float, background in channel 0.
        label: ``[B, K]``, multi-hot.
        count: positions per class, at most ``h w``.
        background: ``ties`` ranks background by channel 0, in RTC a constant, so its lowest
            positions win; ``confident`` ranks and weighs it by ``1 - max_c S_c y_c``.
        mask_by_label: only images of a class offer positions for it; absent classes are invalid.
            RTC's released code does not mask.

    Returns:
        The positions, their scores and which classes have any.
    """
    present = label > 0
    channels, foreground = scores[:, :1], scores[:, 1:]
    if background == "confident":
        masked = foreground * present[..., None, None]
        channels = 1 - masked.amax(dim=1, keepdim=True)
    valid = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    if mask_by_label:
        foreground = foreground.masked_fill(~present[..., None, None], float("-inf"))
        valid[1:] = present.any(dim=0)
    ranked = batch_positions(torch.cat([channels, foreground], dim=1)).T
    value, index = ranked.sort(dim=1, descending=True, stable=True)
    value = value[:, :count].masked_fill(~valid[:, None], 0)
    return TopPositions(index[:, :count], value, valid)


def prototypes(top: TopPositions, features: Tensor) -> tuple[Tensor, Tensor]:
    """Score-weighted mean feature of each class's positions, unit length.

    ``p_c = norm( sum_t s_t x_t / sum_t s_t )``; with the other view's features these are RTC's
    cross-view prototypes.

    Args:
        top: positions and scores.
        features: ``[n, D]`` float.

    Returns:
        ``[C, D]`` float, and ``[C] bool``: False where there is no prototype (an invalid class, or
        scores that sum to 0).
    """
    weight = top.value.sum(dim=1)
    valid = top.valid & (weight != 0)
    total = torch.einsum("ct,ctd->cd", top.value, features[top.index])
    mean = total / torch.where(valid, weight, torch.ones_like(weight))[:, None]
    return F.normalize(mean, dim=1), valid


def prototype_nce(
    features: Tensor, prototypes: Tensor, valid: Tensor, labels: Tensor, tau: float = 0.1
) -> Tensor:
    """Cross-entropy of cosine similarities to the prototypes, ``-log softmax(z P^T / tau)_label``.

    Args:
        features: ``[n, D]`` float, unit length.
        prototypes: ``[C, D]`` float, unit length.
        valid: ``[C] bool``; other classes are left out of the denominator, and positions labelled
            with them out of the mean.
        labels: ``[n] int64`` in 0..K.
        tau: temperature, 0.1 in usr922/wseg and ChunyanWang1/RTC.

    Returns:
        Scalar, mean over the positions; 0 when none has a prototype.
    """
    logits = (features @ prototypes.T / tau).masked_fill(~valid, float("-inf"))
    usable = valid[labels]
    labels = torch.where(usable, labels, -1)
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    # Processes have different counts, and their gradients are averaged: divide by the mean count.
    return total / mean_over_processes(usable.sum()).clamp(min=1 / place()[1])
