"""Losses that teach affinities: AffinityNet (PSA), IRN with its displacements, AFA's attention.

Sizes: ``B`` batch, ``K`` offsets of a half disc, ``h w`` grid of the features, ``N = h w``. Pairs
are kept per offset, ``[B, K, h, w]``, as in `wsis.ops.affinity_labels`. AFA's attention is ``N x
N`` by nature; its labels are compared a block of rows at a time and never stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsis.errors import InputError
from wsis.ops.affinity_labels import (
    DIFFERENT,
    SAME_BACKGROUND,
    SAME_FOREGROUND,
    affinity_labels,
    offset_list,
)
from wsis.ops.stencil_affinity import disc_offsets, pair_affinity, path_affinity
from wsis.types import IGNORE

EPS = 1e-5
"""Inside the logarithms and beside the counts (jiwoon-ahn/psa train_aff.py, irn train_irn.py)."""

_BLOCK = 1 << 20  # elements of a temporary: 4 MB in float32, inside the cache of a core or close


class AffinityLoss(NamedTuple):
    """Scalars, each the mean over its own pairs.

    Attributes:
        background: pairs of background.
        foreground: pairs of one foreground class.
        negative: pairs of two classes.
        total: ``background / 4 + foreground / 4 + negative / 2``.
    """

    background: Tensor
    foreground: Tensor
    negative: Tensor
    total: Tensor


class IrnLoss(NamedTuple):
    """Scalars of IRN's training.

    Attributes:
        affinity: of the boundary map.
        displacement_foreground: towards the offset, on pairs of one foreground class.
        displacement_background: towards 0, on pairs of background.
        total: ``affinity.total + (displacement_foreground + displacement_background) / 2``.
    """

    affinity: AffinityLoss
    displacement_foreground: Tensor
    displacement_background: Tensor
    total: Tensor


def affinity_loss(affinity: Tensor, labels: Tensor, *, eps: float = EPS) -> AffinityLoss:
    """Cross-entropy of affinities in three groups: ``-log(a + eps)``, ``-log(1 + eps - a)``.

    Each group is divided by its count + eps, so that a group without pairs gives 0. The formula is
    that of jiwoon-ahn/psa train_aff.py; ``(pos + neg) / 2`` of jiwoon-ahn/irn is the same.

    Args:
        affinity: ``[B, K, h, w]`` float in [0, 1], differentiable.
        labels: ``[B, K, h, w] uint8`` of `wsis.ops.affinity_labels`.
        eps: positive.

    Returns:
        The three means and their total, in the dtype of the affinities (float32 for half).

    Raises:
        InputError: shapes that differ, or a dtype that does not fit.

    Example:
        >>> labels = affinity_labels(torch.zeros(1, 9, 9, dtype=torch.uint8))
        >>> round(float(affinity_loss(torch.full((1, 34, 9, 9), 0.5), labels).background), 4)
        0.6931
    """
    if affinity.shape != labels.shape or not affinity.is_floating_point():
        raise InputError(
            f"affinity must be a floating {list(labels.shape)} like its labels, got "
            f"{affinity.dtype} {list(affinity.shape)}"
        )
    if labels.dtype != torch.uint8:
        raise InputError(f"labels must be uint8 (wsis.ops.affinity_labels), got {labels.dtype}")
    if not eps > 0:
        raise InputError(f"eps must be positive, got {eps}")
    wide = affinity if affinity.dtype == torch.float64 else affinity.float()
    background, foreground, negative = _AffinityLoss.apply(wide, labels, eps).unbind()
    total = background / 4 + foreground / 4 + negative / 2
    return AffinityLoss(background, foreground, negative, total)


_GROUPS = (SAME_BACKGROUND, SAME_FOREGROUND, DIFFERENT)


class _AffinityLoss(torch.autograd.Function):
    """Three means ``[3]``. Kept for the gradient: the inputs, and nothing of their size."""

    @staticmethod
    def forward(ctx: Any, affinity: Tensor, labels: Tensor, eps: float) -> Tensor:
        sums = affinity.new_zeros(3, dtype=torch.float64)
        counts = torch.zeros_like(sums)
        for a, label in _blocks(affinity, labels):
            loss = -_shifted(a, label == DIFFERENT, eps).log()
            for group, value in enumerate(_GROUPS):
                chosen = label == value
                sums[group] += torch.where(chosen, loss, 0).sum()
                counts[group] += torch.count_nonzero(chosen)
        ctx.save_for_backward(affinity, labels, counts)
        ctx.eps = eps
        return (sums / (counts + eps)).to(affinity.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        affinity, labels, counts = ctx.saved_tensors
        share = (upstream / (counts + ctx.eps)).to(affinity.dtype)
        grad = torch.empty_like(affinity)
        for a, label, out in _blocks(affinity, labels, grad):
            different = label == DIFFERENT
            scale = torch.where(different, share[2], 0)
            for group in (0, 1):
                scale = torch.where(label == _GROUPS[group], -share[group], scale)
            torch.div(scale, _shifted(a, different, ctx.eps), out=out)
        return grad, None, None


def _shifted(affinity: Tensor, different: Tensor, eps: float) -> Tensor:
    """What the logarithms are taken of. ``1 - a`` first, which is exact near 1."""
    return torch.where(different, 1 - affinity, affinity).add_(eps)


def _blocks(*tensors: Tensor) -> Any:
    """The same slices of several ``[B, K, h, w]``, of about `_BLOCK` elements."""
    batch, offsets, height, width = tensors[0].shape
    step = max(1, _BLOCK // max(1, height * width))
    for b in range(batch):
        for k in range(0, offsets, step):
            yield tuple(t[b, k : k + step] for t in tensors)


def psa_losses(
    features: Tensor, masks: Tensor, *, radius: int = 5, ignore_index: int = IGNORE
) -> AffinityLoss:
    """AffinityNet's loss (jiwoon-ahn/psa): ``a = exp(-mean |f_i - f_j|)``, then `affinity_loss`.

    Args:
        features: ``[B, F, h, w]`` float, differentiable.
        masks: ``[B, h, w]`` integer class ids on the same grid.
        radius: of the half disc, 5 there.
        ignore_index: label of unknown pixels.

    Raises:
        InputError: grids or dtypes that do not fit.

    Example:
        >>> masks = torch.randint(0, 3, (1, 12, 12))
        >>> sorted(psa_losses(torch.rand(1, 4, 12, 12), masks)._fields)
        ['background', 'foreground', 'negative', 'total']
    """
    _same_grid("features", features, masks)
    labels = affinity_labels(masks, radius, ignore_index=ignore_index)
    return affinity_loss(pair_affinity(features, radius), labels)


def irn_losses(
    edges: Tensor,
    displacement: Tensor,
    masks: Tensor,
    *,
    radius: int = 10,
    ignore_index: int = IGNORE,
) -> IrnLoss:
    """IRN's losses (jiwoon-ahn/irn): boundaries by path maxima, displacements to the centroid.

    Args:
        edges: ``[B, 1, h, w]`` float in [0, 1], after the sigmoid; differentiable.
        displacement: ``[B, 2, h, w]`` float, (dy, dx); differentiable.
        masks: ``[B, h, w]`` integer class ids on the same grid.
        radius: of the half disc, 10 there.
        ignore_index: label of unknown pixels.

    Raises:
        InputError: grids or dtypes that do not fit.

    Example:
        >>> masks = torch.randint(0, 3, (1, 12, 12))
        >>> loss = irn_losses(torch.rand(1, 1, 12, 12), torch.rand(1, 2, 12, 12), masks, radius=3)
        >>> loss.total.shape
        torch.Size([])
    """
    _same_grid("edges", edges, masks)
    offsets = disc_offsets(radius)
    labels = affinity_labels(masks, offsets=offsets, ignore_index=ignore_index)
    pairs = affinity_loss(path_affinity(edges, radius), labels)
    foreground, background = displacement_loss(displacement, labels, offsets)
    total = pairs.total + (foreground + background) / 2
    return IrnLoss(pairs, foreground, background, total)


def displacement_loss(
    displacement: Tensor, labels: Tensor, offsets: Tensor, *, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """IRN's displacement losses: differences of the field should be the offset, or 0.

    ``sum |d_i - d_j - offset| / (2 count + eps)`` over pairs of one foreground class, and ``sum
    |d_i - d_j| / (2 count + eps)`` over pairs of background, both components. Pairs are visited
    offset by offset: memory is that of the field.

    Args:
        displacement: ``[B, 2, h, w]`` float, (dy, dx); differentiable.
        labels: ``[B, K, h, w] uint8`` of `wsis.ops.affinity_labels` with these offsets.
        offsets: ``[K, 2]`` integer (dy, dx).
        eps: positive.

    Returns:
        Foreground and background scalar, in the field's dtype (float32 for half).

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> offsets = disc_offsets(3)
        >>> labels = affinity_labels(torch.zeros(1, 8, 8, dtype=torch.uint8), 3)
        >>> displacement_loss(torch.ones(1, 2, 8, 8), labels, offsets)[1]
        tensor(0.)
    """
    steps = offset_list(offsets)
    batch, height, width = len(labels), *labels.shape[-2:]
    if displacement.shape != (batch, 2, height, width) or not displacement.is_floating_point():
        raise InputError(
            f"displacement must be a floating [{batch}, 2, {height}, {width}] for labels "
            f"{list(labels.shape)}, got {displacement.dtype} {list(displacement.shape)}"
        )
    if labels.shape[1] != len(steps) or labels.dtype != torch.uint8:
        raise InputError(
            f"labels must be uint8 [B, {len(steps)}, h, w] for as many offsets, got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    wide = displacement if displacement.dtype == torch.float64 else displacement.float()
    return _Displacement.apply(wide, labels, steps, eps)


class _Displacement(torch.autograd.Function):
    """Foreground and background scalar; their gradients are summed along with the losses."""

    @staticmethod
    def forward(
        ctx: Any, field: Tensor, labels: Tensor, steps: list[tuple[int, int]], eps: float
    ) -> tuple[Tensor, Tensor]:
        kinds = (SAME_FOREGROUND, SAME_BACKGROUND)
        grads = [torch.zeros_like(field) if ctx.needs_input_grad[0] else None for _ in kinds]
        sums = field.new_zeros(2, dtype=torch.float64)
        targets = torch.tensor(steps, dtype=field.dtype, device=field.device)[..., None, None]
        for k, ((dy, dx), target) in enumerate(zip(steps, targets, strict=True)):
            here, there = _windows(field.shape[2], field.shape[3], dy, dx)
            difference = field[here] - field[there]
            for group, (kind, grad) in enumerate(zip(kinds, grads, strict=True)):
                chosen = (labels[:, k : k + 1] == kind)[here]
                off = torch.where(chosen, difference - target if group == 0 else difference, 0)
                sums[group] += off.abs().sum()
                if grad is not None:
                    sign = off.sign_()
                    grad[here] += sign
                    grad[there] -= sign
        counts = torch.stack([torch.count_nonzero(labels == kind) for kind in kinds])
        divisors = 2 * counts.double() + eps
        ctx.save_for_backward(divisors, *(g for g in grads if g is not None))
        foreground, background = (sums / divisors).to(field.dtype)
        return foreground, background

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, foreground: Tensor, background: Tensor
    ) -> tuple[Tensor, None, None, None]:
        divisors, grad_f, grad_b = ctx.saved_tensors
        share = divisors.to(grad_f.dtype).reciprocal()
        return grad_f * (foreground * share[0]) + grad_b * (background * share[1]), None, None, None


def _windows(height: int, width: int, dy: int, dx: int) -> tuple[Any, Any]:
    """Index of the pixels of a map that have a partner at (dy, dx), and of the partners."""

    def span(size: int, step: int) -> tuple[slice, slice]:
        first, last = max(0, -step), max(size - max(0, step), max(0, -step))
        first, last = min(first, size), min(last, size)
        return slice(first, last), slice(first + step, first + step + (last - first))

    (y, y_there), (x, x_there) = span(height, dy), span(width, dx)
    return (..., y, x), (..., y_there, x_there)


def _same_grid(name: str, maps: Tensor, masks: Tensor) -> None:
    if maps.dim() != 4 or masks.dim() != 3 or (len(maps), *maps.shape[2:]) != tuple(masks.shape):
        raise InputError(
            f"{name} must be [B, channels, h, w] and masks [B, h, w] on the same grid, got "
            f"{list(maps.shape)} and {list(masks.shape)}"
        )
