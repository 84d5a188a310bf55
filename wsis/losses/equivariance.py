"""Equivariance: the maps of both views must agree on a common grid.

Maps are multiplied by the label, so channels of absent classes are zero on both sides and add
nothing. They are dropped first (:func:`present_classes`), which makes the cost follow the classes
in an image instead of the data set's; every mean still counts them.

Sizes: ``B`` batch, ``K`` foreground classes, ``C = K + 1``, ``P`` most classes of one image,
``s`` common grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from wsis.ops.normalize import add_background, max_norm, one_hot_max
from wsis.ops.resize import resize

if TYPE_CHECKING:
    from torch import Tensor


class ClassCounts(NamedTuple):
    """How many classes a batch has: sizes that losses need before they can be computed.

    Attributes:
        image: classes of the fullest image, ``P``.
        batch: classes of all images together.
    """

    image: int
    batch: int


def count_classes(label: Tensor) -> ClassCounts:
    """Counts of a label ``[B, K]``, multi-hot; waits for its device where it is not on the CPU."""
    present = label > 0
    both = torch.stack([present.sum(dim=1).amax(), present.any(dim=0).sum()])
    return ClassCounts(*both.tolist())


def present_classes(label: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Channels that occur in each image, in ascending order, padded to the fullest image.

    Args:
        label: ``[B, K]``, multi-hot.
        most: ``ClassCounts.image`` of this label; counted by default.

    Returns:
        Channel indices ``[B, P] int64`` and their labels ``[B, P]`` (0 where padded), ``P >= 1``.
    """
    most = count_classes(label).image if most is None else most
    index = _ones_first(label)[:, : max(most, 1)]
    return index, label.gather(1, index)


def classes_of_batch(label: Tensor, count: int | None = None) -> Tensor:
    """Channels ``[M] int64`` that occur in any image, in ascending order.

    Args:
        label: ``[B, K]``, multi-hot.
        count: ``ClassCounts.batch`` of this label; counted by default.
    """
    count = count_classes(label).batch if count is None else count
    return _ones_first(label.amax(dim=0))[:count]


def _ones_first(label: Tensor) -> Tensor:
    """Order of the last axis that puts what is present first, each part in ascending order."""
    return (label > 0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)


def take_channels(maps: Tensor, index: Tensor) -> Tensor:
    """``maps [B, C, h, w]`` and ``index [B, P]`` to ``[B, P, h, w]``."""
    return maps[torch.arange(len(maps), device=maps.device)[:, None], index]


def on_common_grid(maps_up: Tensor, label: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalise maps at their view's size, bring them to the common grid, mask by the label.

    ``resize(M(maps)) * y`` with ``M`` the training norm.

    Args:
        maps_up: ``[B, P, H, W]`` float, at the size of their view.
        label: ``[B, P]``.
        size: the common grid.

    Returns:
        ``[B, P, *size]`` float in [0, 1].
    """
    return resize(max_norm(maps_up), size) * label[..., None, None]


def equivariance(cams1: Tensor, cams2: Tensor, classes: int) -> Tensor:
    """Mean absolute difference of both views' normalised CAMs, ``L_er``.

    Args:
        cams1: ``[B, P, s, s]`` float, from :func:`on_common_grid`.
        cams2: the same of view 2.
        classes: K, number of foreground classes in the mean.

    Returns:
        Scalar.
    """
    positions = cams1.shape[0] * classes * cams1.shape[-2] * cams1.shape[-1]
    return (cams1 - cams2).abs().sum() / positions


def cross_refinement(cams: Tensor, refined: Tensor, classes: int, keep: float = 0.2) -> Tensor:
    """Refined CAM of one view against the one-hot maximum of the other view's CAM.

    Mean over the ``floor(keep * C * s * s)`` largest entries per image of
    ``|H([1 - max B, B]) - Q|``; ``L_ecr`` is the sum over both directions (ChunyanWang1/RTC;
    YudeWang/SEAM alike).

    Args:
        cams: ``[B, P, s, s]`` float, B of one view, from :func:`on_common_grid`; no gradient.
        refined: ``[B, 1 + P, s, s]`` float, Q of the other view, with background in channel 0.
        classes: K, number of foreground classes.
        keep: part of the entries kept, in (0, 1].

    Returns:
        Scalar.
    """
    target = one_hot_max(add_background(cams.detach(), "complement"))
    return hardest_mean((target - refined).abs(), classes + 1, keep)


def hardest_mean(difference: Tensor, channels: int, keep: float) -> Tensor:
    """Mean of the largest entries per image, counting channels that were dropped as zeros.

    Args:
        difference: ``[B, P, s, s]`` float, non-negative.
        channels: how many channels there would be, ``>= P`` but for padding.
        keep: ``floor(keep * channels * s * s)`` entries per image are averaged.

    Returns:
        Scalar.
    """
    batch, *_, height, width = difference.shape
    count = max(int(keep * channels * height * width), 1)
    flat = difference.flatten(1)
    if count < flat.shape[1]:
        flat = flat.topk(count, dim=1, sorted=False).values
    return flat.sum() / (batch * count)
