"""Losses over all pairs of tokens: AFA's affinity from attention, ToCo's token contrast.

Sizes: ``B`` batch, ``h w`` grid of tokens, ``N = h w``. The predictions are over ``N x N`` pairs by
nature. Labels of pairs are compared a block of rows at a time, forward and backward: the 8-byte
label matrices of the repositories and their masked copies are not made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsis.errors import InputError
from wsis.types import IGNORE

_BLOCK = 1 << 20  # elements of a temporary


class PairLoss(NamedTuple):
    """A loss over pairs.

    Attributes:
        loss: scalar.
        positives: pairs of one class plus 1, as they divide the loss; a scalar tensor.
        negatives: pairs of two classes plus 1.
    """

    loss: Tensor
    positives: Tensor
    negatives: Tensor


def afa_affinity_loss(
    attention: Tensor, labels: Tensor, *, radius: int | None = None, ignore_index: int = IGNORE
) -> PairLoss:
    """AFA's affinity loss (rulixiang/afa utils/losses.py), from labels of the tokens.

    ``(1/2) sum_pos (1 - a) / (n_pos + 1) + (1/2) sum_neg a / (n_neg + 1)`` over the whole batch. A
    token is a pair with itself; pairs with an unknown token, or farther apart than the radius in a
    row or column, take no part.

    Args:
        attention: ``[B, N, N]`` float in [0, 1], differentiable.
        labels: ``[B, h, w]`` integer class ids of the tokens, ``h w = N``.
        radius: half the side of a square window; 8 in rulixiang/afa. None takes all pairs.
        ignore_index: label of unknown tokens.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> labels = torch.tensor([[[0, 1]]])
        >>> afa_affinity_loss(torch.full((1, 2, 2), 0.5), labels).positives
        tensor(3)
    """
    _check_labels(labels)
    batch, tokens = len(labels), labels.shape[1] * labels.shape[2]
    if attention.shape != (batch, tokens, tokens) or not attention.is_floating_point():
        raise InputError(
            f"attention must be a floating [{batch}, {tokens}, {tokens}] for labels "
            f"{list(labels.shape)}, got {attention.dtype} {list(attention.shape)}"
        )
    if radius is not None and radius < 0:
        raise InputError(f"radius must be 0 or more, got {radius}")
    wide = attention if attention.dtype == torch.float64 else attention.float()
    return PairLoss(*_AttentionLoss.apply(wide, labels, radius, ignore_index))


class _AttentionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attention: Tensor, labels: Tensor, radius: int | None, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = attention.new_zeros(2, dtype=torch.float64)
        counts = torch.ones(2, dtype=torch.int64, device=attention.device)
        for b, rows, taken, same in _pairs(labels, radius, ignore_index, diagonal=True):
            a = attention[b, rows]
            _add(sums, counts, a, taken, same)
        # 1 - a of each positive; the counts have a 1 of their own.
        sums[0] = counts[0] - 1 - sums[0]
        ctx.save_for_backward(labels, counts)
        ctx.like, ctx.window = attention.new_empty(0), (radius, ignore_index)
        positives, negatives = counts.unbind()
        ctx.mark_non_differentiable(positives, negatives)
        return (sums / counts).mean().to(attention.dtype), positives, negatives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        labels, counts = ctx.saved_tensors
        tokens = labels.shape[1] * labels.shape[2]
        share = upstream / (2 * counts.to(upstream.dtype))
        grad = ctx.like.new_empty(len(labels), tokens, tokens)
        for b, rows, taken, same in _pairs(labels, *ctx.window, diagonal=True):
            grad[b, rows] = torch.where(same, -share[0], taken * share[1])
        return grad, None, None, None


def token_contrast_loss(
    features: Tensor, labels: Tensor, *, ignore_index: int = IGNORE
) -> PairLoss:
    """ToCo's patch token contrast (rulixiang/ToCo model/losses.py): like tokens alike, others not.

    ``(1/2) (1 - sum_pos |cos| / (n_pos + 1)) + (1/2) sum_neg |cos| / (n_neg + 1)`` over the whole
    batch, a token not paired with itself. The cosines exist a block of rows at a time.

    Args:
        features: ``[B, D, h, w]`` float, differentiable.
        labels: ``[B, h, w]`` integer class ids of the tokens.
        ignore_index: label of unknown tokens.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> labels = torch.tensor([[[0, 1]]])
        >>> loss = token_contrast_loss(torch.ones(1, 3, 1, 2), labels).loss  # alike, but should not
        >>> round(float(loss), 4)
        0.8333
    """
    _check_labels(labels)
    shape = (len(labels), *labels.shape[1:])
    if (
        features.dim() != 4
        or (len(features), *features.shape[2:]) != shape
        or not features.is_floating_point()
    ):
        raise InputError(
            f"features must be a floating [B, D, h, w] on the grid of the labels "
            f"{list(labels.shape)}, got {features.dtype} {list(features.shape)}"
        )
    wide = features if features.dtype == torch.float64 else features.float()
    with torch.autocast(features.device.type, enabled=False):
        # 1e-8 as there: a token of zeros stays 0.
        unit = F.normalize(wide.flatten(2), dim=1, eps=1e-8)
        return PairLoss(*_TokenContrast.apply(unit, labels, ignore_index))


class _TokenContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, labels: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = unit.new_zeros(2, dtype=torch.float64)
        counts = torch.ones(2, dtype=torch.int64, device=unit.device)
        for b, rows, taken, same in _pairs(labels, None, ignore_index, diagonal=False):
            cosine = (unit[b, :, rows].T @ unit[b]).abs_()
            _add(sums, counts, cosine, taken, same)
        ctx.save_for_backward(unit, labels, counts)
        ctx.ignore_index = ignore_index
        positives, negatives = counts.unbind()
        ctx.mark_non_differentiable(positives, negatives)
        mean = sums / counts
        return ((1 - mean[0] + mean[1]) / 2).to(unit.dtype), positives, negatives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        unit, labels, counts = ctx.saved_tensors
        # Twice a half: every pair stands in two rows, and each of its tokens gets both.
        share = upstream / counts.to(upstream.dtype)
        grad = torch.empty_like(unit)
        for b, rows, taken, same in _pairs(labels, None, ctx.ignore_index, diagonal=False):
            sign = (unit[b, :, rows].T @ unit[b]).sign_()
            weight = torch.where(same, -share[0], taken * share[1])
            grad[b, :, rows] = unit[b] @ (sign * weight).T
        return grad, None, None


def _add(sums: Tensor, counts: Tensor, values: Tensor, taken: Tensor, same: Tensor) -> None:
    """Adds the values of pairs of one class, and of two, and how many there are."""
    # Not all less those of one class: a few pairs would drown in the rounding of many.
    groups = (same, taken ^ same)
    sums += torch.stack([torch.where(pairs, values, 0).sum() for pairs in groups])
    counts += torch.stack([torch.count_nonzero(pairs) for pairs in groups])


def _pairs(
    labels: Tensor, radius: int | None, ignore_index: int, *, diagonal: bool
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Image, rows, and ``[rows, N] bool`` twice: pairs that take part, and those of one class."""
    batch, height, width = labels.shape
    tokens = height * width
    flat = labels.flatten(1)
    known = flat != ignore_index
    place = torch.arange(tokens, device=labels.device)
    y, x = place // width, place % width
    step = max(1, _BLOCK // max(1, tokens))
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        near = None if diagonal else place[rows, None] != place
        if radius is not None:
            window = (y[rows, None] - y).abs() <= radius
            window &= (x[rows, None] - x).abs() <= radius
            near = window if near is None else near & window
        for b in range(batch):
            taken = known[b, rows, None] & known[b]
            taken = taken if near is None else taken.logical_and_(near)
            yield b, rows, taken, (flat[b, rows, None] == flat[b]).logical_and_(taken)


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 3 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"labels must be integers [B, h, w], got {labels.dtype} {list(labels.shape)}"
        )
