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
    with torch.no_grad():
        small = _Scale(scale, recompute_scale)
        guide = small(guide.detach(), guide_resize).to(probs.device, torch.float32)
        inside = None if roi is None else small(roi.detach()[:, None]).to(probs)
        unlabelled = None
        if gated and labels is not None:
            unlabelled = small((labels == IGNORE)[:, None]).to(probs.device) > 0
        lattice = bilateral_lattice(guide, sigma_xy * scale, widths)
    segmentation = _Scale(scale, recompute_scale)(probs, "bilinear")
    return _energy(segmentation, lattice, inside, unlabelled, gated, exact) / len(probs)


class _Scale:
    """Maps ``[B, c, H, W]`` scaled by one factor, placed as the published codes place them."""

    def __init__(self, factor: float, recompute: bool) -> None:
        self.factor, self.recompute = float(factor), recompute

    def __call__(self, maps: Tensor, mode: str = "nearest") -> Tensor:
        if self.factor == 1:
            return maps
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


def _energy(
    probs: Tensor,
    lattice: Lattice,
    roi: Tensor | None,
    unlabelled: Tensor | None,
    gated: bool,
    exact: bool,
) -> Tensor:
    """``-<S, G A S>``, maps at one scale, ``roi`` and ``unlabelled`` ``[B, 1, h, w]``."""
    if exact:
        seen = probs if roi is None else probs * roi
        field = _filter(seen, lattice)
        return -_total(seen * (field * _gate(probs, roi, unlabelled) if gated else field))
    with torch.no_grad():
        field = _filter(probs.detach() if roi is None else probs * roi, lattice)
        # Maps of one channel first: the field, as large as the probabilities, is passed over once.
        factor = _gate(probs, roi, unlabelled) if gated else None
        if roi is not None:
            factor = roi if factor is None else factor * roi
        if factor is not None:
            field *= factor
    return _Parity.apply(probs, field)


def _filter(values: Tensor, lattice: Lattice) -> Tensor:
    return permutohedral_filter(values, lattice=lattice)


def _gate(probs: Tensor, roi: Tensor | None, unlabelled: Tensor | None) -> Tensor:
    """``[B, 1, h, w]``: how unsure each pixel is."""
    confidence = probs.amax(dim=1, keepdim=True)
    gate = ((1 if roi is None else roi) - confidence).clamp(min=0)
    return gate if unlabelled is None else gate.masked_fill(unlabelled, 1)


class _Parity(torch.autograd.Function):
    """``-<P, roi G A S>`` whose gradient takes ``A`` for symmetric and ``G`` for a constant."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, field: Tensor) -> Tensor:
        """Keeps the field alone."""
        ctx.save_for_backward(field)
        return -_total(probs * field)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """``-2 field``."""
        (field,) = ctx.saved_tensors
        return field * (-2 * gradient), None


def _total(maps: Tensor) -> Tensor:
    """Sum of ``[B, K, h, w]``: planes first, so that torch's threads do not change it."""
    return maps.sum(dim=(2, 3)).sum(dim=1).sum()


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
