"""Which pairs of neighbouring pixels have one class: what AffinityNet and IRN learn from.

Pairs are kept per offset, ``[B, K, h, w]``: entry ``k`` of a pixel speaks of the pixel and its
partner at ``offsets[k]``. That is 34 numbers a pixel at radius 5, never ``N x N``.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wsis.errors import InputError
from wsis.ops.stencil_affinity import disc_offsets
from wsis.types import BACKGROUND, IGNORE

DIFFERENT = 0
SAME_FOREGROUND = 1
SAME_BACKGROUND = 2
UNKNOWN = IGNORE

Sources = Literal["interior", "all"]


def affinity_labels(
    labels: Tensor,
    radius: int = 5,
    *,
    offsets: Tensor | None = None,
    sources: Sources = "interior",
    ignore_index: int = IGNORE,
) -> Tensor:
    """Whether a pixel and each of its partners have one class.

    Args:
        labels: ``[B, h, w]`` integer class ids on the grid of the features, 0 background.
        radius: partners are those of `wsis.ops.disc_offsets`; 5 in jiwoon-ahn/psa, 10 in the
            training of jiwoon-ahn/irn.
        offsets: ``[K, 2]`` integer (dy, dx) of the partners, instead of a radius.
        sources: ``interior`` takes the pairs of pixels all of whose partners lie on the grid, as
            both repositories do; ``all`` takes every pair that lies on it.
        ignore_index: label of pixels of which nothing is known.

    Returns:
        ``[B, K, h, w] uint8`` on the device of the labels: 0 different classes, 1 the same class, 2
        both background, 255 unknown, or no such pair.

    Raises:
        InputError: labels that are not ``[B, h, w]`` integers, or offsets that are not ``[K, 2]``.

    Example:
        >>> affinity_labels(torch.tensor([[[0, 0, 3]]]), 2, sources="all")[0, 0]
        tensor([[  2,   0, 255]], dtype=torch.uint8)
    """
    if labels.dim() != 3 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"labels must be integers [B, h, w], got {labels.dtype} {list(labels.shape)}"
        )
    if sources not in ("interior", "all"):
        raise InputError(f"sources must be 'interior' or 'all', got {sources!r}")
    steps = offset_list(disc_offsets(radius) if offsets is None else offsets)
    # Four bytes hold every class id, and the partners below are K times as many.
    own = labels.int() if labels.dtype == torch.int64 else labels
    height, width = own.shape[1:]
    reach_y, reach_x = (max(abs(step[axis]) for step in steps) for axis in (0, 1))
    padded = F.pad(own, (reach_x, reach_x, reach_y, reach_y), value=ignore_index)
    partner = torch.stack(
        [
            padded[:, reach_y + dy : reach_y + dy + height, reach_x + dx : reach_x + dx + width]
            for dy, dx in steps
        ],
        dim=1,
    )
    own = own[:, None]
    same = torch.where(own == BACKGROUND, SAME_BACKGROUND, SAME_FOREGROUND).to(torch.uint8)
    pairs = torch.where(own == partner, same, torch.zeros_like(same))
    pairs.masked_fill_((own == ignore_index) | (partner == ignore_index), UNKNOWN)
    if sources == "interior":
        pairs.masked_fill_(~interior(height, width, steps, labels.device), UNKNOWN)
    return pairs


def offset_list(offsets: Tensor) -> list[tuple[int, int]]:
    """The (dy, dx) of ``[K, 2]`` as Python integers; InputError for anything else."""
    if offsets.dim() != 2 or offsets.shape[1] != 2 or not len(offsets):
        raise InputError(f"offsets must be [K, 2] with K >= 1, got {list(offsets.shape)}")
    return [(int(dy), int(dx)) for dy, dx in offsets.tolist()]


def interior(
    height: int, width: int, offsets: list[tuple[int, int]], device: torch.device | None = None
) -> Tensor:
    """``[h, w] bool``: the pixels all of whose partners lie on the grid."""
    inside = torch.zeros(height, width, dtype=torch.bool, device=device)
    down, right = (max(0, *(step[axis] for step in offsets)) for axis in (0, 1))
    up, left = (max(0, *(-step[axis] for step in offsets)) for axis in (0, 1))
    inside[up : max(height - down, 0), left : max(width - right, 0)] = True
    return inside
