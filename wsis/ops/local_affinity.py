"""Local mask refinement: PAMR, PAR and VARM.

Each pixel's mask value is replaced, several times, by a weighted mean over its neighbours: 8
directions x several dilations, ``P = 8 * len(dilations)``. The three methods differ in the weights
only. Weights come from the image alone, so they are computed once and carry no gradient.

Sizes: ``B`` batch, ``C`` mask channels, ``H W`` image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from wsis.errors import InputError
from wsis.ops.normalize import as_float

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["pamr", "par", "varm"]

DILATIONS = (1, 2, 4, 8, 12, 24)  # visinf/1-stage-wseg core/config.py; PAR and VARM alike
ITERATIONS = 10  # the same files
_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def pamr(
    image: Tensor,
    masks: Tensor,
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
) -> Tensor:
    """Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020; visinf/1-stage-wseg).

    Weights: softmax over neighbours of ``-mean_ch |I_i - I_p| / (1e-8 + 0.1 sigma)``; they sum
    to 1.

    Args:
        image: ``[B, 3, H, W]`` float; the weights do not depend on its scale (beyond 1e-8).
        masks: ``[B, C, h, w]`` float, resized to ``H, W`` first (bilinear, align_corners=True).
        iterations: how often the masks are propagated.
        dilations: distances of the neighbours, pixels.

    Returns:
        ``[B, C, H, W]`` float32 (float64 when the masks are); differentiable in ``masks``.

    Raises:
        InputError: wrong shapes or dilations.

    Example:
        >>> pamr(torch.rand(1, 3, 32, 32), torch.rand(1, 2, 8, 8)).shape
        torch.Size([1, 2, 32, 32])
    """
    return _refine(image, masks, "pamr", iterations, dilations)


def par(
    image: Tensor,
    masks: Tensor,
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
) -> Tensor:
    """Pixel-adaptive refinement (Ru et al., AFA, CVPR 2022; rulixiang/afa, rulixiang/ToCo).

    Weights: softmax of ``-mean_ch (|I_i - I_p| / (sigma + 1e-8) / 0.3)^2`` plus 0.01 times the same
    softmax over the distances; they sum to 1.01, so a constant mask grows by 1.01 per iteration.

    Args, returns, raises: as :func:`pamr`.
    """
    return _refine(image, masks, "par", iterations, dilations)


def varm(
    image: Tensor,
    masks: Tensor,
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
) -> Tensor:
    """Variation-aware refinement (Xu et al., SCD, AAAI 2023; ChunyanWang1/RTC network/VARM.py).

    Weights: softmax of ``-mean_ch (4 |I_i - I_p| / (sigma + 1e-8))^2`` minus 0.01 times the softmax
    of the neighbour's squared forward differences; they sum to 0.99 and may be slightly negative.

    Args, returns, raises: as :func:`pamr`, but ``image`` must be in [0, 1]: the second term is not
    scale free.
    """
    return _refine(image, masks, "varm", iterations, dilations)


def _refine(
    image: Tensor, masks: Tensor, kind: Kind, iterations: int, dilations: Sequence[int]
) -> Tensor:
    if masks.ndim != 4 or masks.shape[0] != image.shape[0]:
        raise InputError(
            f"masks must be [B, C, h, w] with the images' B={image.shape[0]}, "
            f"got {list(masks.shape)}"
        )
    weights = local_affinity(image, kind, dilations)
    masks = as_float(masks)
    if masks.shape[-2:] != image.shape[-2:]:
        masks = F.interpolate(masks, image.shape[-2:], mode="bilinear", align_corners=True)
    return propagate(masks, weights.to(masks.dtype), dilations, iterations)


def local_affinity(image: Tensor, kind: Kind, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Weights of every pixel's neighbours; see :func:`pamr`, :func:`par`, :func:`varm`.

    ``sigma`` is the unbiased standard deviation per channel over the neighbours; PAMR also counts
    the pixel itself, once per dilation. A flat region gives equal weights, never NaN. In float32,
    a channel with ``sigma = 0`` around a differing pixel outweighs the other channels entirely.

    Args:
        image: ``[B, 3, H, W]`` float (any channel count), in [0, 1] for ``varm``.
        kind: whose weights.
        dilations: distances of the neighbours, pixels; borders are replicated.

    Returns:
        ``[B, P, H, W]`` float32 (float64 for float64 images), for each dilation the 8 directions
        row by row. No gradient.

    Raises:
        InputError: image not 4-d, no or non-positive dilations, unknown kind.
    """
    if image.ndim != 4:
        raise InputError(f"image must be [B, 3, H, W], got {list(image.shape)}")
    if not dilations or min(dilations) < 1:
        raise InputError(f"dilations must be positive and at least one, got {tuple(dilations)}")
    if kind not in ("pamr", "par", "varm"):
        raise InputError(f"refinement must be pamr, par or varm, got {kind!r}")
    with torch.no_grad():
        image = as_float(image)
        padded = F.pad(image, [max(dilations)] * 4, mode="replicate")
        sigma = _neighbour_std(image, padded, dilations, with_centre=kind == "pamr")
        if kind == "pamr":
            inverse, power = 1 / (1e-8 + 0.1 * sigma), 1
        else:
            inverse, power = (4.0 if kind == "varm" else 1 / 0.3) / (sigma + 1e-8), 2

        count = 8 * len(dilations)
        weights = image.new_empty(image.shape[0], count, *image.shape[-2:])
        for p, neighbour in enumerate(_shifts(padded, dilations)):
            distance = (neighbour - image).mul_(inverse)
            distance = distance.abs_() if power == 1 else distance.square_()
            torch.mean(distance, dim=1, out=weights[:, p])
        weights = weights.neg_().softmax(dim=1)

        if kind == "par":
            weights += 0.01 * _position_weights(dilations).to(weights)[:, None, None]
        elif kind == "varm":
            weights.sub_(_variation(padded, dilations).softmax(dim=1), alpha=0.01)
        return weights


def propagate(
    masks: Tensor, weights: Tensor, dilations: Sequence[int] = DILATIONS, iterations: int = 10
) -> Tensor:
    """Average masks over neighbours: ``m_i <- sum_p weights_p(i) m(i + p)``, several times.

    Args:
        masks: ``[B, C, H, W]`` float32 or float64; borders are replicated.
        weights: ``[B, P, H, W]``, same dtype, from :func:`local_affinity` with these dilations.
        dilations: as for the weights.
        iterations: how often; 0 returns the masks.

    Returns:
        ``[B, C, H, W]``; differentiable in ``masks`` (and in ``weights`` if they need a gradient).

    Raises:
        InputError: shapes of masks and weights do not fit each other or the dilations.
    """
    expected = [masks.shape[0], 8 * len(dilations), *masks.shape[-2:]]
    if masks.ndim != 4 or list(weights.shape) != expected:
        raise InputError(
            f"weights must be {expected} for masks {list(masks.shape)} and dilations "
            f"{tuple(dilations)}, got {list(weights.shape)}"
        )
    per_shift = weights.unsqueeze(2).unbind(dim=1)
    in_graph = torch.is_grad_enabled() and (masks.requires_grad or weights.requires_grad)
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
    """Views ``[B, C, H, W]`` of an image padded by the largest dilation, one per neighbour."""
    pad = max(dilations)
    height, width = padded.shape[-2] - 2 * pad, padded.shape[-1] - 2 * pad
    for dilation in dilations:
        for dy, dx in _DIRECTIONS:
            y, x = pad + dilation * dy, pad + dilation * dx
            yield padded[..., y : y + height, x : x + width]


def _neighbour_std(
    image: Tensor, padded: Tensor, dilations: Sequence[int], *, with_centre: bool
) -> Tensor:
    """Unbiased standard deviation per channel over the neighbours, ``[B, 3, H, W]``.

    One pass over sums of ``d = sample - first sample``. Equal samples give exactly 0, which the
    weights of flat regions depend on; and as the reference is itself a sample, cancellation costs
    at most a factor of the sample count on the rounding error.
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
    """PAR's softmax over distances, ``[P]`` float64, sum 1."""
    distance = torch.tensor(
        [d * math.hypot(dy, dx) for d in dilations for dy, dx in _DIRECTIONS], dtype=torch.float64
    )
    return (-((distance / (distance.std() + 1e-8) / 0.3) ** 2)).softmax(dim=0)


def _variation(padded: Tensor, dilations: Sequence[int]) -> Tensor:
    """VARM's squared forward differences of each shifted image, ``[B, P, H, W]``.

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
