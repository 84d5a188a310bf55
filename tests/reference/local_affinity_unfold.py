"""PAMR and PAR the way they are published: for every dilation a 3 x 3 convolution with one-hot
kernels takes the neighbours apart, they are joined, multiplied with the weights and summed.

Written from that description; the other baseline of the benchmark. Every step holds a tensor of
masks x neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.local_affinity_shifted import DIRECTIONS, _position_weights


def neighbours(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """[B, C, H, W] -> [B, C, P, H, W], the border repeated."""
    batch, channels, height, width = x.shape
    kernel = x.new_zeros(8, 1, 3, 3)
    for k, (dy, dx) in enumerate(DIRECTIONS):
        kernel[k, 0, 1 + dy, 1 + dx] = 1
    planes = x.reshape(batch * channels, 1, height, width)
    parts = [
        F.conv2d(F.pad(planes, [d] * 4, mode="replicate"), kernel, dilation=d) for d in dilations
    ]
    return torch.cat(parts, dim=1).view(batch, channels, -1, height, width)


@torch.no_grad()
def refine(
    image: Tensor, masks: Tensor, kind: str, iterations: int, dilations: Sequence[int]
) -> Tensor:
    """image [B, 3, H, W], masks [B, C, H, W]; kind "pamr" or "par" -> [B, C, H, W]."""
    around, centre = neighbours(image, dilations), image.unsqueeze(2)
    difference = (around - centre).abs()
    if kind == "pamr":
        samples = torch.cat([around, centre.expand(-1, -1, len(dilations), -1, -1)], dim=2)
        logits = -difference / (1e-8 + 0.1 * samples.std(dim=2, keepdim=True))
    else:
        logits = -((difference / (around.std(dim=2, keepdim=True) + 1e-8) / 0.3) ** 2)
    weights = logits.mean(dim=1, keepdim=True).softmax(dim=2)
    if kind == "par":
        weights = weights + 0.01 * _position_weights(dilations).to(weights)[:, None, None]
    for _ in range(iterations):
        masks = (neighbours(masks, dilations) * weights).sum(dim=2)
    return masks
