"""PAMR, PAR and VARM in plain torch with shifted views: every neighbour is a view of one padded
image, so nothing of the size of the masks times the neighbours is ever formed. Differentiable.

The good baseline of the benchmark, and a reference that is quick enough for real sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def refine(
    image: Tensor, masks: Tensor, kind: str, iterations: int, dilations: Sequence[int]
) -> Tensor:
    """image [B, 3, H, W], masks [B, C, H, W] of one dtype -> [B, C, H, W]."""
    return propagate(masks, local_affinity(image, kind, dilations), dilations, iterations)


@torch.no_grad()
def local_affinity(image: Tensor, kind: str, dilations: Sequence[int]) -> Tensor:
    """[B, 3, H, W] -> [B, P, H, W]."""
    padded = F.pad(image, [max(dilations)] * 4, mode="replicate")
    sigma = _neighbour_std(image, padded, dilations, with_centre=kind == "pamr")
    if kind == "pamr":
        inverse = 1 / (1e-8 + 0.1 * sigma)
    else:
        inverse = (4.0 if kind == "varm" else 1 / 0.3) / (sigma + 1e-8)
    weights = image.new_empty(image.shape[0], 8 * len(dilations), *image.shape[-2:])
    for p, neighbour in enumerate(_shifts(padded, dilations)):
        distance = (neighbour - image).mul_(inverse)
        distance = distance.abs_() if kind == "pamr" else distance.square_()
        torch.mean(distance, dim=1, out=weights[:, p])
    weights = weights.neg_().softmax(dim=1)
    if kind == "par":
        weights += 0.01 * _position_weights(dilations).to(weights)[:, None, None]
    elif kind == "varm":
        weights.sub_(_variation(padded, dilations).softmax(dim=1), alpha=0.01)
    return weights


def propagate(masks: Tensor, weights: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """masks [B, C, H, W], weights [B, P, H, W] -> [B, C, H, W]."""
    per_shift = weights.unsqueeze(2).unbind(dim=1)
    in_graph = torch.is_grad_enabled() and masks.requires_grad
    for _ in range(iterations):
        padded = F.pad(masks, [max(dilations)] * 4, mode="replicate")
        masks = torch.zeros_like(masks)
        for weight, neighbour in zip(per_shift, _shifts(padded, dilations), strict=True):
            if in_graph:
                masks = torch.addcmul(masks, neighbour, weight)
            else:
                masks.addcmul_(neighbour, weight)
    return masks


def _shifts(padded: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Views [B, C, H, W] of an image padded by the largest dilation, one per neighbour."""
    pad = max(dilations)
    height, width = padded.shape[-2] - 2 * pad, padded.shape[-1] - 2 * pad
    for dilation in dilations:
        for dy, dx in DIRECTIONS:
            y, x = pad + dilation * dy, pad + dilation * dx
            yield padded[..., y : y + height, x : x + width]


def _neighbour_std(
    image: Tensor, padded: Tensor, dilations: Sequence[int], *, with_centre: bool
) -> Tensor:
    """Unbiased standard deviation per channel over the neighbours, [B, 3, H, W].

    One pass over sums of d = sample - first sample: equal samples give exactly 0.
    """
    shifts = _shifts(padded, dilations)
    reference = next(shifts)
    total, squares = torch.zeros_like(image), torch.zeros_like(image)
    for neighbour in shifts:
        difference = neighbour - reference
        total += difference
        squares.addcmul_(difference, difference)
    count = 8 * len(dilations)
    if with_centre:
        difference = image - reference
        total.add_(difference, alpha=len(dilations))
        squares.addcmul_(difference, difference, value=len(dilations))
        count += len(dilations)
    variance = (squares - total.square() / count) / (count - 1)
    return variance.clamp_(min=0).sqrt_()


def _position_weights(dilations: Sequence[int]) -> Tensor:
    """PAR's softmax over distances, [P] float64, sum 1."""
    distance = torch.tensor(
        [d * math.hypot(dy, dx) for d in dilations for dy, dx in DIRECTIONS], dtype=torch.float64
    )
    return (-((distance / (distance.std() + 1e-8) / 0.3) ** 2)).softmax(dim=0)


def _variation(padded: Tensor, dilations: Sequence[int]) -> Tensor:
    """VARM's squared forward differences of each shifted image, [B, P, H, W].

    They are taken inside the frame of the shifted image, whose last row and column are repeated:
    the vertical difference of the last row and the horizontal one of the last column are 0.
    """
    down = F.pad(padded.diff(dim=2).square().mean(dim=1, keepdim=True), (0, 0, 0, 1))
    right = F.pad(padded.diff(dim=3).square().mean(dim=1, keepdim=True), (0, 1, 0, 0))
    height, width = padded.shape[-2] - 2 * max(dilations), padded.shape[-1] - 2 * max(dilations)
    variation = padded.new_empty(padded.shape[0], 8 * len(dilations), height, width)
    shifts = zip(_shifts(down, dilations), _shifts(right, dilations), strict=True)
    for p, (rows, columns) in enumerate(shifts):
        target = variation[:, p : p + 1]
        target.copy_(rows)
        target[..., -1:, :] = 0
        target[..., :-1] += columns[..., :-1]
    return variation
