"""Dense energy losses: segmentations that follow the image, or any other map, at every distance.

The energy of a segmentation ``S`` is ``-<S, A S>``: every pair of pixels that look alike and lie
near each other lowers it by the product of their probabilities. ``A`` is Gaussian,
``A_ij = exp(-|p_i - p_j|^2 / (2 sigma_xy^2) - |g_i - g_j|^2 / (2 sigma^2))``, filtered on one
permutohedral lattice per image for all classes together; the pixel itself counts. The sums are the
lattice's, unnormalised, about half of the true Gaussian's; the published weights were found so.

Sizes: ``B`` batch, ``K`` classes, ``H W`` image, ``h w`` after scaling.

Results do not depend on the number of threads. Nothing waits for the device but the making of the
lattice, and no argument is changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wsis.errors import InputError
from wsis.ops._lattice import filter_op
from wsis.ops._native import prefer_huge_pages
from wsis.ops.norms import as_float
from wsis.ops.permutohedral import Lattice, bilateral_lattice, permutohedral_filter

IGNORE = 255  # of labels: pixels without one

# rloss pytorch/pytorch-deeplab_v3_plus, RRM and ToCo alike; images from 0 to 255.
SIGMA_RGB, SIGMA_XY, SCALE = 15.0, 100.0, 0.5


def dense_energy_loss(
    probs: Tensor,
    guide: Tensor,
    *,
    sigma: float | Sequence[float] = SIGMA_RGB,
    sigma_xy: float = SIGMA_XY,
    scale: float = SCALE,
    roi: Tensor | None = None,
    labels: Tensor | None = None,
    gated: bool = False,
    exact: bool = False,
    recompute_scale: bool = True,
    guide_resize: Literal["nearest", "area"] = "nearest",
) -> Tensor:
    """Energy of a segmentation on a lattice of places and colours (or edges, or features).

    Plain (Tang et al., ECCV 2018; meng-tang/rloss): ``L = -<S, A S> / B`` with ``S = probs * roi``.
    Gated (Zhang et al., RRM, AAAI 2020; zbf1991/RRM, rulixiang/ToCo): ``L = -<S, G A S> / B`` with
    ``G = max(roi - max_k probs, 0)``, and 1 where the label is 255: sure pixels are left alone.
    Everything is scaled first: ``probs`` bilinear (align_corners=False), ``roi`` and ``labels``
    nearest, ``guide`` as ``guide_resize`` says, ``sigma_xy`` with the scale. Those projects
    multiply the loss with 2e-9 (plain) or 1e-7 (gated); here the caller does.

    The gradient is theirs by default: ``-2 G (A S) roi / B``, which takes ``A`` for symmetric and
    ``G`` for a constant, and costs no second filter. ``exact=True`` gives the derivative of the
    number that is returned: lattice filters are only nearly symmetric, and ``G`` depends on
    ``probs``.

    The guide need not be an image. An edge map ``[B, 1, H, W]`` in [0, 1] with ``sigma`` 0.1, or a
    feature map of any length, keeps pixels apart that it tells apart; to use several, lay
    them side by side and give a sigma for each channel. Edges thinner than a pixel of the scaled
    image survive with ``guide_resize="area"``.

    Args:
        probs: ``[B, K, H, W]`` float, 0 to 1, usually a softmax.
        guide: ``[B, c, H, W]`` uint8 or float, finite: an image from 0 to 255 for the published
            constants. On any device; only what is left after scaling moves to that of ``probs``.
        sigma: width in the units of the guide, positive; one number, or one per channel.
        sigma_xy: width in pixels of the unscaled image, positive.
        scale: everything is scaled by it; 1 leaves it as it is.
        roi: ``[B, H, W]`` of any real dtype, 1 inside the valid crop, 0 outside; None: 1.
        labels: ``[B, H, W]`` or ``[B, 1, H, W]``; only where they are 255 matters, and only to the
            gated form.
        gated: whether ``A S`` is multiplied with ``G``.
        exact: whether the gradient is the exact one. It filters a second time.
        recompute_scale: with sizes that the scale does not divide, the true ratio of sizes places
            the samples (ToCo and its kin), or ``scale`` itself (rloss, RRM).
        guide_resize: ``nearest``, as published, or ``area``, the mean.

    Returns:
        A scalar on the device of ``probs``, float32 (float64 when ``probs`` is), 0 or negative.
        Differentiable in ``probs``; a second time only with ``exact``.

    Raises:
        InputError: shapes that do not fit, sigmas or a scale that are not positive, a guide that
            requires a gradient or is not finite.

    Example:
        >>> probs = torch.rand(2, 4, 32, 32).softmax(dim=1).requires_grad_()
        >>> loss = dense_energy_loss(probs, torch.randint(256, (2, 3, 32, 32)).float())
        >>> edges = torch.rand(2, 1, 32, 32)
        >>> loss = loss + dense_energy_loss(probs, edges, sigma=0.1, guide_resize="area")
        >>> loss.backward()
        >>> probs.grad.shape
        torch.Size([2, 4, 32, 32])
    """
    probs = _check_probs(probs)
    _check_guide(guide, probs, guide_resize)
    widths = _check_widths(sigma, guide.shape[1])
    _check_positive(sigma_xy=sigma_xy, scale=scale)
    _check_map("roi", roi, probs)
    labels = labels[:, 0] if labels is not None and labels.ndim == 4 else labels
    _check_map("labels", labels, probs)

    size = [math.floor(side * scale) for side in probs.shape[-2:]]
    if 0 in size and 0 not in probs.shape:
        raise InputError(
            f"scale must leave at least one pixel of {list(probs.shape[-2:])}, got {scale}"
        )
    if 0 in probs.shape:
        return _total(probs)
    resize = _Scale(scale, recompute_scale)
    with torch.no_grad():
        guide = resize(guide.detach(), guide_resize).to(probs.device, torch.float32)
        inside = None if roi is None else resize(roi.detach()[:, None]).to(probs)
        unlabelled = None
        if gated and labels is not None:
            ignored = (labels == IGNORE)[:, None].view(torch.uint8)
            unlabelled = resize(ignored).to(probs.device).view(torch.bool)
        lattice = bilateral_lattice(guide, sigma_xy * scale, widths)
    if exact:
        return _exact(resize(probs, "bilinear"), lattice, inside, unlabelled, gated) / len(probs)
    halved = resize.halves(probs)
    if halved:
        with torch.no_grad():
            scaled = _mean_of_four(probs)
    else:
        scaled = resize(probs, "bilinear")
    with torch.no_grad():
        field = _published(scaled, lattice, inside, unlabelled, gated)
    return _Parity.apply(probs if halved else scaled, scaled.detach(), field) / len(probs)


class _Scale:
    """Maps ``[B, c, H, W]`` scaled by one factor, placed as the published codes place them."""

    def __init__(self, factor: float, recompute: bool) -> None:
        self.factor, self.recompute = float(factor), recompute

    def __call__(self, maps: Tensor, mode: str = "nearest") -> Tensor:
        if self.factor == 1:
            return maps
        if mode == "nearest" and self.halves(maps):
            return maps[..., ::2, ::2]
        if maps.dtype not in (torch.uint8, torch.float32, torch.float64) or mode == "area":
            maps = as_float(maps)
        if mode == "area":
            height, width = (math.floor(side * self.factor) for side in maps.shape[-2:])
            return F.adaptive_avg_pool2d(maps, (height, width))
        return F.interpolate(
            maps,
            scale_factor=self.factor,
            mode=mode,
            align_corners=False if mode == "bilinear" else None,
            recompute_scale_factor=self.recompute,
        )

    def halves(self, maps: Tensor) -> bool:
        """Whether a pixel of the scaled maps is exactly four of theirs."""
        return self.factor == 0.5 and not any(side % 2 for side in maps.shape[-2:])


def _exact(
    probs: Tensor, lattice: Lattice, roi: Tensor | None, unlabelled: Tensor | None, gated: bool
) -> Tensor:
    """``-<S, G A S>``, maps at one scale, ``roi`` and ``unlabelled`` ``[B, 1, h, w]``."""
    seen = probs if roi is None else probs * roi
    field = _filter(seen, lattice)
    return -_total(seen * (field * _gate(probs, roi, unlabelled) if gated else field))


def _published(
    probs: Tensor, lattice: Lattice, roi: Tensor | None, unlabelled: Tensor | None, gated: bool
) -> Tensor:
    """``roi G A S``, ``[B, K, h, w]`` as the probabilities."""
    factor = _gate(probs, roi, unlabelled) if gated else None
    if roi is not None:
        factor = roi if factor is None else factor * roi
    return _filter(probs, lattice, roi, factor)


def _filter(
    values: Tensor, lattice: Lattice, before: Tensor | None = None, after: Tensor | None = None
) -> Tensor:
    """``after * (A (before * values))``, the factors ``[B, 1, h, w]``; gradient to the values.

    With float32 the filter applies them where it reads and writes: no further pass.
    """
    if values.dtype == torch.float32:
        first, last = (None if x is None else x.flatten(1).contiguous() for x in (before, after))
        return filter_op(values.flatten(2), lattice, first, last, False).view(values.shape)
    field = permutohedral_filter(values if before is None else values * before, lattice=lattice)
    return field if after is None else field * after


def _gate(probs: Tensor, roi: Tensor | None, unlabelled: Tensor | None) -> Tensor:
    """``[B, 1, h, w]``: how unsure each pixel is."""
    confidence = probs.amax(dim=1, keepdim=True)
    gate = ((1 if roi is None else roi) - confidence).clamp(min=0)
    return gate if unlabelled is None else gate.masked_fill(unlabelled, 1)


class _Parity(torch.autograd.Function):
    """``-<P, roi G A S>`` whose gradient takes ``A`` for symmetric and ``G`` for a constant.

    ``probs`` are the probabilities that the gradient is for: ``scaled`` itself, or, twice as high
    and wide, those whose squares of four ``scaled`` is the mean of.
    """

    @staticmethod
    def forward(ctx: Any, probs: Tensor, scaled: Tensor, field: Tensor) -> Tensor:
        """Keeps the field alone."""
        ctx.save_for_backward(field)
        ctx.halved = probs.shape != scaled.shape
        return -_inner(scaled, field)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """``-2 field``, a quarter of it to each of four pixels if halved."""
        (field,) = ctx.saved_tensors
        if ctx.halved:
            return _four_of_each(field, -0.5 * gradient), None, None
        return field * (-2 * gradient), None, None


# Scaling by a half, the published codes' scale: for even sizes the mean of four pixels. torch takes
# longer for it, and much longer for the adjoint: it clears the result, then adds four times.


def _mean_of_four(maps: Tensor) -> Tensor:
    """``[B, K, 2 h, 2 w] -> [B, K, h, w]``."""
    if maps.device.type != "cpu" or not maps.is_contiguous():
        return F.interpolate(maps, scale_factor=0.5, mode="bilinear", align_corners=False)
    batch, classes, height, width = (*maps.shape[:2], *(side // 2 for side in maps.shape[2:]))
    rows = maps.view(batch * classes, height, 2, 2 * width)
    out = rows.new_empty(len(rows), height, width)
    planes = _planes_at_once(rows)
    sums = rows.new_empty(planes, height, 2 * width)
    for some, mean in zip(rows.split(planes), out.split(planes), strict=True):
        part = torch.add(some[:, :, 0], some[:, :, 1], out=sums[: len(some)]).mul_(0.25)
        torch.add(part[..., ::2], part[..., 1::2], out=mean)
    return out.view(batch, classes, height, width)


def _four_of_each(maps: Tensor, factor: Tensor) -> Tensor:
    """``[B, K, h, w] -> [B, K, 2 h, 2 w]``, each value times the factor at its four pixels.

    Two floats beside each other are one complex number, so that rows are written without strides.
    """
    batch, classes, height, width = maps.shape
    flat = maps.flatten(0, 1)
    pairs = flat.new_empty(len(flat), height, 2, width, dtype=maps.dtype.to_complex())
    values = torch.view_as_real(pairs)
    prefer_huge_pages(values)
    planes = _planes_at_once(flat)
    products = flat.new_empty(planes, height, width)
    for some, out in zip(flat.split(planes), pairs.split(planes), strict=True):
        part = torch.mul(some, factor, out=products[: len(some)])[:, :, None].expand(out.shape)
        torch.complex(part, part, out=out)
    return values.view(batch, classes, 2 * height, 2 * width)


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the products of two ``[B, K, h, w]``, which are never all in memory."""
    one, other = one.flatten(0, 1), other.flatten(0, 1)
    planes = _planes_at_once(one)
    products = other.new_empty(planes, *other.shape[1:])
    sums = []
    for some, others in zip(one.split(planes), other.split(planes), strict=True):
        part = torch.mul(some, others, out=products[: len(some)])
        sums.append(part.sum(dim=-1).sum(dim=-1))
    return torch.cat(sums).sum()


def _planes_at_once(maps: Tensor) -> int:
    """How many of some planes ``[n, ...]`` to take together.

    On a CPU as many as stay in its cache, elsewhere a quarter, for the memory.
    """
    if maps.device.type != "cpu":
        return -(-len(maps) // 4)
    return min(len(maps), max(1, (1 << 18) * torch.get_num_threads() // maps[0].numel()))


def _total(maps: Tensor) -> Tensor:
    """Sum of ``[B, K, h, w]``: rows first, so that torch's threads do not change it."""
    return maps.sum(dim=-1).sum(dim=-1).sum()


# ---- checks ------------------------------------------------------------------------------------


def _check_probs(probs: Tensor) -> Tensor:
    if probs.ndim != 4 or not probs.is_floating_point():
        raise InputError(
            f"probs must be a floating [B, K, H, W], got {probs.dtype} {list(probs.shape)}"
        )
    return as_float(probs)


def _check_guide(guide: Tensor, probs: Tensor, resize: str) -> None:
    shape = [probs.shape[0], *probs.shape[-2:]]
    if guide.ndim != 4 or [guide.shape[0], *guide.shape[-2:]] != shape or guide.shape[1] < 1:
        raise InputError(
            f"guide must be [B, c, H, W] with the B, H, W of probs = {shape}, "
            f"got {list(guide.shape)}"
        )
    if guide.is_complex():
        raise InputError(f"guide must be real, got {guide.dtype}")
    if resize not in ("nearest", "area"):
        raise InputError(f"guide_resize must be nearest or area, got {resize!r}")
    if guide.requires_grad and torch.is_grad_enabled():
        raise InputError("guide must not require a gradient, which is not computed; detach it")


def _check_widths(sigma: float | Sequence[float], channels: int) -> list[float]:
    widths = [float(sigma)] * channels if isinstance(sigma, (int, float)) else list(sigma)
    if len(widths) != channels:
        raise InputError(f"sigma must be one number or one per channel ({channels}), got {sigma}")
    if not all(math.isfinite(width) and width > 0 for width in widths):
        raise InputError(f"sigma must be positive and finite, got {sigma}")
    return widths


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be positive and finite, got {value}")


def _check_map(name: str, maps: Tensor | None, probs: Tensor) -> None:
    expected = [probs.shape[0], *probs.shape[-2:]]
    if maps is not None and list(maps.shape) != expected:
        raise InputError(f"{name} must be [B, H, W] = {expected}, got {list(maps.shape)}")
