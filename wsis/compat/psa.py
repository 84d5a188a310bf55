"""AffinityNet as jiwoon-ahn/psa, YudeWang/SEAM and MCTformer have it, without its dense matrix.

`to_affinity` is the end of ``Net.forward`` in ``network/resnet38_aff.py``; `random_walk` replaces
the power, normalisation, squarings and product of ``infer_aff.py``.

Sizes: ``F`` channels, ``h w`` grid, ``D`` offsets, ``P`` pairs per offset, ``N = h w``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsis.compat.irn import affinity_sparse2dense, random_walk
from wsis.errors import InputError
from wsis.losses.affinity import affinity_loss
from wsis.ops.affinity_labels import UNKNOWN, affinity_labels, interior, offset_list
from wsis.ops.stencil_affinity import disc_offsets, pair_affinity

__all__ = [
    "ExtractAffinityLabelInRadius",
    "get_affinity_loss",
    "get_indices_of_pairs",
    "random_walk",
    "to_affinity",
]

Array = np.ndarray[Any, Any]


def get_indices_of_pairs(radius: int, size: tuple[int, int]) -> tuple[Array, Array]:
    """Flat indices of pairs (tool/pyutils.py); made once per size, do not write to them.

    Args:
        radius: pairs lie less than this apart.
        size: ``(h, w)`` of the grid.

    Returns:
        ``ind_from [P] int64`` and ``ind_to [D * P] int64``, offset after offset.

    Raises:
        InputError: a radius below 2.

    Example:
        >>> ind_from, ind_to = get_indices_of_pairs(5, (12, 14))
        >>> ind_from.shape, ind_to.shape
        ((48,), (1632,))
    """
    return _indices(int(radius), (int(size[0]), int(size[1])))


@lru_cache(maxsize=8)
def _indices(radius: int, size: tuple[int, int]) -> tuple[Array, Array]:
    offsets = disc_offsets(radius)
    grid = np.arange(size[0] * size[1], dtype=np.int64).reshape(size)
    sources = grid[interior(*size, offset_list(offsets)).numpy()]
    steps = offsets.numpy() @ np.array([size[1], 1])
    return sources, (sources + steps[:, None]).reshape(-1)


def to_affinity(x: Tensor, to_dense: bool = False, radius: int = 5) -> Tensor:
    """Affinities of features: what ``Net.forward(x, to_dense)`` returns for its last feature map.

        def forward(self, x, to_dense=False):
            ...
            x = F.elu(self.f9(torch.cat([f8_3, f8_4, f8_5], dim=1)))
            return wsis.compat.psa.to_affinity(x, to_dense)

    Args:
        x: ``[B, F, h, w]`` float.
        to_dense: the symmetric matrix of the first image instead of the pairs; ``N x N``, for
            parity only: `random_walk` takes the pairs.
        radius: pairs lie less than this apart.

    Returns:
        ``[B, D, P]`` ``exp(-mean |f_i - f_j|)``, differentiable; dense ``[N, N]``.

    Raises:
        InputError: features that are not 4-d, or several images for a dense matrix.

    Example:
        >>> to_affinity(torch.rand(1, 8, 12, 14)).shape
        torch.Size([1, 34, 48])
    """
    if x.dim() != 4 or (to_dense and len(x) != 1):
        raise InputError(f"x must be [{'1' if to_dense else 'B'}, F, h, w], got {list(x.shape)}")
    height, width = x.shape[2:]
    edge = radius - 1
    # The pairs of PSA: those of pixels that have all their partners.
    pairs = pair_affinity(x, radius)[
        :, :, : max(height - edge, 0), edge : max(width - edge, edge)
    ].flatten(2)
    if not to_dense:
        return pairs
    ind_from, ind_to = get_indices_of_pairs(radius, (height, width))
    return affinity_sparse2dense(
        pairs, ind_from, ind_to.reshape(pairs.shape[1], -1), height * width
    )


class ExtractAffinityLabelInRadius:
    """Labels of pairs from a mask (voc12/data.py).

    Args:
        cropsize: side of the square mask.
        radius: pairs lie less than this apart.

    Attributes:
        search_dist: list of (dy, dx).

    Example:
        >>> extract = ExtractAffinityLabelInRadius(cropsize=13, radius=5)
        >>> [x.shape for x in extract(np.zeros((13, 13), np.uint8))]
        [(34, 45), (34, 45), (34, 45)]
    """

    def __init__(self, cropsize: int, radius: int = 5) -> None:
        self.radius = radius
        self.radius_floor = radius - 1
        self.crop_height = cropsize - self.radius_floor
        self.crop_width = cropsize - 2 * self.radius_floor
        self.search_dist = offset_list(disc_offsets(radius))

    def __call__(self, label: Any) -> tuple[Array, Array, Array]:
        """Background, foreground and negative labels, each ``[D, P] float32`` of 0 and 1."""
        mask = np.ascontiguousarray(label)
        if mask.ndim != 2 or mask.dtype.kind not in "iu":
            raise InputError(f"label must be [h, w] integers, got {list(mask.shape)} {mask.dtype}")
        pairs = affinity_labels(torch.from_numpy(mask)[None], self.radius)[0].numpy()
        edge = self.radius_floor
        pairs = pairs[:, : max(mask.shape[0] - edge, 0), edge : max(mask.shape[1] - edge, edge)]
        pairs = pairs.reshape(len(pairs), -1)
        background, foreground, negative = (
            (pairs == kind).astype(np.float32) for kind in (2, 1, 0)
        )
        return background, foreground, negative


def get_affinity_loss(
    aff: Tensor, bg_label: Tensor, fg_label: Tensor, neg_label: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of ``train_aff.py``, which is written out there in its loop.

    Args:
        aff: ``[B, D, P]`` float in [0, 1], differentiable.
        bg_label: ``[B, D, P]`` of 0 and 1, pairs of background.
        fg_label: the same, pairs of one foreground class.
        neg_label: the same, pairs of two classes.

    Returns:
        ``loss, bg_loss, fg_loss, neg_loss``, scalars; ``loss = bg / 4 + fg / 4 + neg / 2``.
    """
    if not aff.shape == bg_label.shape == fg_label.shape == neg_label.shape or aff.dim() != 3:
        shapes = [list(x.shape) for x in (aff, bg_label, fg_label, neg_label)]
        raise InputError(f"aff and the labels must be [B, D, P] of one shape, got {shapes}")
    labels = torch.full(aff.shape, UNKNOWN, dtype=torch.uint8, device=aff.device)
    for kind, label in ((2, bg_label), (1, fg_label), (0, neg_label)):
        labels.masked_fill_(label.to(aff.device) > 0, kind)
    loss = affinity_loss(aff[..., None], labels[..., None])
    return loss.total, loss.background, loss.foreground, loss.negative
