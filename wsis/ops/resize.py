"""The resize of networks and losses: bilinear with corners aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """``maps [B, C, h, w]`` on another grid ``(H, W)``, align_corners=True; itself if it fits."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)
