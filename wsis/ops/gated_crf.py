"""The windowed Gated CRF loss, and the windowed Gaussian filter behind it.

The loss asks neighbours that look alike to have the same label. Published code takes the
``(2 r + 1)^2`` neighbours of every pixel apart, for features and for probabilities: gigabytes. Here
a weight is computed where it is used, and nothing beside one image with a border is made.

Sizes: ``B`` batch, ``C`` values or classes, ``F`` feature channels, ``H W`` image, ``r`` radius.

Results do not depend on the number of threads. NaN in a pixel's features spoils its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsis.errors import InputError
from wsis.ops._native import _C, cuda_function, num_parts, stream, view
from wsis.ops.norms import as_float

# Obukhov et al. 2019, section 4, and the authors' example; images in [0, 1].
KERNELS: tuple[Mapping[str, float], ...] = ({"weight": 1.0, "xy": 6.0, "rgb": 0.1},)
RADIUS = 5
MOST_KERNELS, MOST_RADIUS = 8, 32  # csrc/kernels/gated_crf.h


def window_filter(
    values: Tensor,
    modalities: Mapping[str, Tensor],
    kernels: Sequence[Mapping[str, float]] = KERNELS,
    radius: int = RADIUS,
) -> Tensor:
    """Sum over a window of neighbours, weighted by Gaussian kernels; the pixel itself is left out.

    ``out_i = sum_{j != i, in window and image} K_ij v_j``, with
    ``K_ij = sum_k w_k exp(-1/2 sum_m |f_m,i - f_m,j|^2 / sigma_k,m^2)`` over the kernels ``k`` and
    the modalities ``m`` of each; the place of a pixel, in pixels, is the modality ``xy``.

    Args:
        values: ``[B, C, H, W]`` float.
        modalities: by name, ``[B, c, H, W]`` float, finite: ``{"rgb": image}``, or an edge map, or
            features of any length.
        kernels: 1 to 8 of ``{"weight": w, name: sigma, ...}``; a name is ``xy`` or a modality's.
        radius: the window is ``2 radius + 1`` pixels wide, 1 to 32.

    Returns:
        ``[B, C, H, W]`` float32 (float64 when the values are). Differentiable in the values, any
        number of times: the filter is its own adjoint. No gradient to the modalities.

    Raises:
        InputError: shapes or devices that do not fit, an unknown modality, a sigma that is not
            positive, or a modality that requires a gradient.

    Example:
        >>> rgb = torch.rand(1, 3, 16, 16)
        >>> window_filter(torch.rand(1, 2, 16, 16), {"rgb": rgb}).shape
        torch.Size([1, 2, 16, 16])
    """
    values = _check_values("values", values)
    return _filter(values, *_packed_kernels(values, modalities, kernels), _check_radius(radius))


def gated_crf_loss(
    probs: Tensor,
    modalities: Mapping[str, Tensor],
    kernels: Sequence[Mapping[str, float]] = KERNELS,
    radius: int = RADIUS,
    *,
    mask_src: Tensor | None = None,
    mask_dst: Tensor | None = None,
    compatibility: Tensor | None = None,
) -> Tensor:
    """Gated CRF loss (Obukhov et al. 2019, arXiv 1906.04651).

    ``L = sum_i d_i sum_j K_ij s_j (1 - y_i . y_j) / Z`` over windows, ``K`` as in
    :func:`window_filter`, masks ``s`` (source) and ``d`` (destination). ``Z`` is the sum of ``d``,
    else of ``s``, at least 1, else the number of pixels. As published, the features outside the
    image are 0, the place too, so that without a source mask the pixels near a border also count
    ``K_i0`` for every place of their window that lies outside: a constant.

    Args:
        probs: ``[B, C, H, W]`` float, softmax over the classes.
        modalities: by name, ``[B, c, h, w]`` float; averaged down (or up) to ``H W`` by
            ``adaptive_avg_pool2d``. The published sigmas are for images in [0, 1].
        kernels: as for :func:`window_filter`.
        radius: as for :func:`window_filter`.
        mask_src: ``[B, 1, H, W]``; pixels that send. Below 1 (and NaN) counts as 0, as published.
        mask_dst: ``[B, 1, H, W]``; pixels that receive.
        compatibility: ``[C, C]``, at least 0, zero diagonal. With it, the loss is
            ``sum mu_ab y_i,a K_ij y_j,b / Z``, rows of ``mu`` scaled to the sum ``C - 1``. None is
            Potts, as above.

    Returns:
        A scalar, float32 (float64 when ``probs`` is), with the exact gradient in ``probs``.

    Raises:
        InputError: as :func:`window_filter`, or masks or a matrix that do not fit.

    Example:
        >>> probs = torch.rand(1, 4, 16, 16).softmax(dim=1).requires_grad_()
        >>> loss = gated_crf_loss(probs, {"rgb": torch.rand(1, 3, 32, 32)})
        >>> loss.shape, loss.backward()
        (torch.Size([]), None)
    """
    probs = _check_values("probs", probs)
    radius = _check_radius(radius)
    batch, _, height, width = probs.shape
    source, destination = (
        _check_mask(name, mask, probs)
        for name, mask in (("mask_src", mask_src), ("mask_dst", mask_dst))
    )
    mu = _check_compatibility(compatibility, probs)
    sized = {name: _resize(name, modality, probs) for name, modality in modalities.items()}
    packed = _packed_kernels(probs, sized, kernels)

    # The sum of the weights rides along as one more channel.
    sent = probs.new_ones(batch, 1, height, width) if source is None else source
    if mu is None:
        received = _filter(torch.cat([probs * sent, sent], dim=1), *packed, radius)
        energy = received[:, -1:] - (probs * received[:, :-1]).sum(dim=1, keepdim=True)
        if source is None:
            energy = energy + _outside(packed, radius, probs)
        energy = energy if destination is None else energy * destination
        total = _total(energy)
    else:
        received = _filter(probs * sent, *packed, radius)
        received = received if destination is None else received * destination
        pairs = torch.einsum("baij,bcij->bac", probs, received)
        total = (pairs * mu).sum()
    gate = destination if destination is not None else source
    pixels = batch * height * width
    return total / (max(pixels, 1) if gate is None else _total(gate).clamp(min=1))


def _total(maps: Tensor) -> Tensor:
    """Sum of ``[B, 1, H, W]``: rows first, so that torch's threads do not change it."""
    return maps.sum(dim=3).sum(dim=(0, 1, 2))


def _outside(packed: tuple[Any, ...], radius: int, like: Tensor) -> Tensor:
    """Weights towards what lies outside the image, where place and features are 0."""
    features, channels, weights, closeness = packed
    _, _, height, width = like.shape
    x, y = (torch.arange(size, device=like.device, dtype=like.dtype) for size in (width, height))
    inside = [
        (at + radius).clamp(max=size - 1) - (at - radius).clamp(min=0) + 1
        for at, size in ((y, height), (x, width))
    ]
    missing = (2 * radius + 1) ** 2 - inside[0][:, None] * inside[1]
    place = y[:, None] ** 2 + x**2
    sums = like.new_zeros(like.shape[0], 1, height, width)
    parts = features.split(channels, dim=1)
    for part, weight, close in zip(parts, weights, closeness, strict=True):
        far = (part * part).sum(dim=1, keepdim=True) + close * place
        sums = sums + weight * torch.exp(-0.5 * far)
    return sums * missing


# ---- checks ------------------------------------------------------------------------------------


def _check_values(name: str, values: Tensor) -> Tensor:
    if values.ndim != 4 or not values.is_floating_point():
        raise InputError(
            f"{name} must be a floating [B, C, H, W], got {values.dtype} {list(values.shape)}"
        )
    return as_float(values)


def _check_radius(radius: int) -> int:
    if int(radius) != radius or not 1 <= radius <= MOST_RADIUS:
        raise InputError(f"radius must be 1 to {MOST_RADIUS}, got {radius}")
    return int(radius)


def _check_mask(name: str, mask: Tensor | None, probs: Tensor) -> Tensor | None:
    if mask is None:
        return None
    expected = [probs.shape[0], 1, *probs.shape[-2:]]
    if list(mask.shape) != expected:
        raise InputError(f"{name} must be [B, 1, H, W] = {expected}, got {list(mask.shape)}")
    _check_device(name, mask, probs)
    mask = mask.detach().to(probs.dtype)
    return torch.where(mask >= 1, mask, torch.zeros_like(mask))  # NaN is not >= 1


def _check_compatibility(matrix: Tensor | None, probs: Tensor) -> Tensor | None:
    """The matrix with its rows scaled."""
    if matrix is None:
        return None
    classes = probs.shape[1]
    if list(matrix.shape) != [classes, classes]:
        raise InputError(
            f"compatibility must be [C, C] = {[classes, classes]}, got {list(matrix.shape)}"
        )
    # A matrix on a GPU is trusted: looking at it would wait for the device.
    if matrix.device.type == "cpu" and not bool(
        (matrix >= 0).all() and (matrix.diagonal() == 0).all()
    ):
        raise InputError("compatibility must be 0 on the diagonal and at least 0 elsewhere")
    return (classes - 1) * F.normalize(matrix.to(probs), p=1.0, dim=1)


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise InputError(f"{name} must be on {other.device} like the rest, got {tensor.device}")


def _resize(name: str, modality: Tensor, probs: Tensor) -> Tensor:
    if modality.ndim != 4 or modality.is_complex():
        raise InputError(f"modality {name} must be [B, c, h, w], got {list(modality.shape)}")
    if modality.shape[-2:] == probs.shape[-2:]:
        return modality
    if 0 in modality.shape or 0 in probs.shape[-2:]:
        raise InputError(f"modality {name} must not be empty, got {list(modality.shape)}")
    height, width = probs.shape[-2:]
    return F.adaptive_avg_pool2d(modality.to(probs.dtype), (height, width))


def _packed_kernels(
    values: Tensor, modalities: Mapping[str, Tensor], kernels: Sequence[Mapping[str, float]]
) -> tuple[Tensor, list[int], list[float], list[float]]:
    """Features ``[B, F, H, W]`` of all kernels divided by their sigmas, and what goes with them.

    Returns:
        The features, channels of each kernel, weights, and 1 / sigma_xy^2 (0 without).
    """
    if not 1 <= len(kernels) <= MOST_KERNELS:
        raise InputError(f"kernels must be 1 to {MOST_KERNELS}, got {len(kernels)}")
    batch, _, height, width = values.shape
    features, channels, weights, closeness = [values.new_empty(batch, 0, height, width)], [], [], []
    for kernel in kernels:
        if "weight" not in kernel or not math.isfinite(kernel["weight"]):
            raise InputError(f"every kernel must have a finite weight, got {dict(kernel)}")
        weights.append(float(kernel["weight"]))
        closeness.append(0.0)
        channels.append(0)
        for name, sigma in kernel.items():
            if name == "weight":
                continue
            if not (sigma > 0 and math.isfinite(sigma)):
                raise InputError(f"sigma of {name} must be positive and finite, got {sigma}")
            if name == "xy":
                closeness[-1] = 1.0 / float(sigma) ** 2
                continue
            if name not in modalities:
                known = ", ".join(["xy", *modalities])
                raise InputError(f"modality {name!r} must be one of {known}")
            features.append(_feature(name, modalities[name], values) / float(sigma))
            channels[-1] += features[-1].shape[1]
    return torch.cat(features, dim=1), channels, weights, closeness


def _feature(name: str, modality: Tensor, values: Tensor) -> Tensor:
    shape = [values.shape[0], *values.shape[-2:]]
    if modality.ndim != 4 or [modality.shape[0], *modality.shape[-2:]] != shape:
        raise InputError(
            f"modality {name} must be [B, c, H, W] with B, H, W = {shape}, "
            f"got {list(modality.shape)}"
        )
    if modality.requires_grad and torch.is_grad_enabled():
        raise InputError(f"modality {name} must not require a gradient, which is not computed")
    _check_device(f"modality {name}", modality, values)
    return modality.to(values.dtype)


# ---- the operator ------------------------------------------------------------------------------


def _filter(
    values: Tensor,
    features: Tensor,
    channels: list[int],
    weights: list[float],
    closeness: list[float],
    radius: int,
) -> Tensor:
    return torch.ops.wsis.window_filter(values, features, channels, weights, closeness, radius)


def _window_filter(
    values: Tensor,
    features: Tensor,
    channels: list[int],
    weights: list[float],
    closeness: list[float],
    radius: int,
) -> Tensor:
    result = torch.empty_like(values, memory_format=torch.contiguous_format)
    arrays = view(values.contiguous()), view(features.contiguous()), view(result)
    rest = (channels, weights, closeness, radius)
    if values.is_cuda:
        cuda_function("window_filter_cuda")(*arrays, *rest, stream(values))
        return result
    _, planes, height, width = values.shape
    size = _C.window_filter_scratch(planes, features.shape[1], height, width, radius)
    touched = result.numel() * (2 * radius + 1) ** 2 // 8
    _C.window_filter_cpu(*arrays, view(values.new_empty(size)), *rest, num_parts(touched))
    return result


_library = torch.library.Library("wsis", "FRAGMENT")
_library.define(
    "window_filter(Tensor values, Tensor features, int[] channels, float[] weights, "
    "float[] closeness, int radius) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _library.impl("window_filter", _window_filter, _device)


@torch.library.register_fake("wsis::window_filter", lib=_library)
def _(values: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, features, *ctx.rest = inputs
    ctx.save_for_backward(features)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (features,) = ctx.saved_tensors
    filtered = torch.ops.wsis.window_filter(gradient, features, *ctx.rest)
    return filtered, None, None, None, None, None


torch.library.register_autograd("wsis::window_filter", _backward, setup_context=_keep, lib=_library)
