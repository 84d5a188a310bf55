"""Gaussian filtering of scattered values on the permutohedral lattice (Adams et al., 2010).

``out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j`` up to the lattice's approximation: values are splatted
onto the corners of the simplex around each point, blurred along the lattice's ``d + 1`` axes with
[1/2, 1, 1/2], and sliced back, times ``1 / (1 + 2^-d)``. Cost and memory grow with the points and
with the vertices that exist, never with pairs. The numbers are those of the densecrf library
(Kraehenbuehl and Koltun, 2011): unnormalised sums come out at about half of the true Gaussian's.

Sizes: ``B`` images, ``C`` channels of values, ``d`` features, ``c`` channels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsis import _lattice
from wsis._lattice import Lattice
from wsis.errors import InputError
from wsis.ops._lattice import allocator, driver, filter_op
from wsis.ops._native import num_threads
from wsis.ops.norms import as_float


def permutohedral_filter(
    values: Tensor,
    features: Tensor | None = None,
    *,
    normalization: str = "none",
    lattice: Lattice | None = None,
) -> Tensor:
    """Values filtered with a Gaussian of the distance between their points' features.

    Linear in the values; the gradient is the exact transpose (the axes blurred backwards), any
    number of times.

    Args:
        values: ``[B, C, *]`` floating point, any number of trailing dimensions, finite.
        features: ``[B or 1, d, *]`` floating point, divided by their widths; d from 1 to 32 (15 on
            CUDA). No gradient reaches them. None when a lattice is given.
        normalization: "none"; "symmetric" (divided by the square root of the filtered ones before
            and after), "before" or "after" (by the filtered ones themselves, once).
        lattice: from `feature_lattice`, `bilateral_lattice` or `gaussian_lattice`, to build it once
            for many calls.

    Returns:
        As the values; float32 for half precision.

    Raises:
        InputError: shapes or devices that do not fit, neither or both of features and lattice,
            features that are not finite or span too wide a range, an unknown normalization.

    Example:
        >>> points, values = torch.rand(1, 2, 50) * 3, torch.rand(1, 4, 50)
        >>> permutohedral_filter(values, points, normalization="after").shape
        torch.Size([1, 4, 50])
    """
    if values.ndim < 3 or not values.is_floating_point():
        raise InputError(f"values must be floating [B, C, ...], got {_describe(values)}")
    if (features is None) == (lattice is None):
        raise InputError("one of features and lattice must be given, got both or neither")
    if features is not None:
        if features.shape[2:] != values.shape[2:] or features.device != values.device:
            raise InputError(
                f"features must be [{values.shape[0]} or 1, d, {_sides(values)}] on "
                f"{values.device}, got {_describe(features)} on {features.device}"
            )
    flat = as_float(values).flatten(2)
    if values.numel() == 0:
        return flat.view(values.shape).clone()
    if features is not None:
        lattice = feature_lattice(features)
    assert lattice is not None
    if flat.shape[2] != lattice.height * lattice.width or lattice.batch not in (1, len(flat)):
        batch = "B" if lattice.batch == 1 else lattice.batch
        raise InputError(
            f"values must be [{batch}, C, {lattice.height}, {lattice.width}] for this lattice, "
            f"got {_describe(values)}"
        )
    before, after = normalisers(lattice, normalization, values.device)
    return filter_op(flat, lattice, before, after, False).view(values.shape)


def bilateral_filter(
    values: Tensor,
    image: Tensor,
    sigma_xy: float | tuple[float, float],
    sigma_rgb: float | Sequence[float],
    *,
    normalization: str = "after",
) -> Tensor:
    """Values filtered with a Gaussian of place and colour: neighbours that look alike share.

    Args:
        values: ``[B, C, H, W]`` floating point.
        image: ``[B or 1, c, H, W]`` uint8 or floating point, in the units of ``sigma_rgb``.
        sigma_xy: width in pixels, or one for x and one for y.
        sigma_rgb: width in the image's units, one number or one per channel.
        normalization: see `permutohedral_filter`; "after" gives weighted means.

    Returns:
        As the values; float32 for half precision. Differentiable in the values.

    Raises:
        InputError: as `permutohedral_filter`; widths that are not positive and finite.

    Example:
        >>> image = torch.randint(256, (1, 3, 20, 30), dtype=torch.uint8)
        >>> bilateral_filter(torch.rand(1, 4, 20, 30), image, 10, 13).shape
        torch.Size([1, 4, 20, 30])
    """
    if values.ndim != 4 or image.ndim != 4 or image.shape[2:] != values.shape[2:]:
        raise InputError(
            "values and image must be [B, C, H, W] and [B, c, H, W] of one size, got "
            f"{_describe(values)} and {_describe(image)}"
        )
    if values.numel() == 0:
        return as_float(values).clone()
    lattice = bilateral_lattice(image, sigma_xy, sigma_rgb)
    return permutohedral_filter(values, normalization=normalization, lattice=lattice)


def feature_lattice(features: Tensor) -> Lattice:
    """Lattice of any points.

    Args:
        features: ``[B, d, *]`` floating point, divided by their widths. With two trailing
            dimensions they are taken for the pixels of an image, which is faster.

    Raises:
        InputError: features not finite, or over too wide a range for the lattice's keys.

    Example:
        >>> feature_lattice(torch.rand(1, 5, 12, 16)).batch
        1
    """
    if features.ndim < 3 or not features.is_floating_point():
        raise InputError(f"features must be floating [B, d, ...], got {_describe(features)}")
    size = tuple(features.shape[2:]) if features.ndim == 4 else None
    flat = features.detach().to(torch.float32).flatten(2).contiguous()
    return driver(features.device).build(
        flat, allocator(features.device), size=size, threads=num_threads()
    )


def bilateral_lattice(
    image: Tensor,
    sigma_xy: float | tuple[float, float],
    sigma_rgb: float | Sequence[float],
) -> Lattice:
    """Lattice of pixels by place and colour: ``(x / sx, y / sy, channel_i / s_i)``.

    Args:
        image: ``[B, c, H, W]`` uint8 or floating point; usually colours from 0 to 255.
        sigma_xy: width in pixels, or ``(sx, sy)``.
        sigma_rgb: one width, or one per channel, in the image's units.

    Raises:
        InputError: widths that are not positive and finite, an image that is not finite or spans
            too wide a range.

    Example:
        >>> image = torch.randint(256, (2, 3, 12, 16), dtype=torch.uint8)
        >>> bilateral_lattice(image, 80, 13).batch
        2
    """
    if image.ndim != 4 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise InputError(f"image must be uint8 or floating [B, c, H, W], got {_describe(image)}")
    widths = [sigma_rgb] * image.shape[1] if isinstance(sigma_rgb, (int, float)) else sigma_rgb
    image = image.detach()
    image = image if image.dtype == torch.uint8 else image.to(torch.float32)
    height, width = image.shape[-2:]
    return driver(image.device).build_image(
        (height, width),
        allocator(image.device),
        spatial=_pair(sigma_xy),
        image=image.contiguous(),
        widths=[float(value) for value in widths],
        threads=num_threads(),
    )


def gaussian_lattice(
    size: tuple[int, int],
    sigma_xy: float | tuple[float, float],
    device: torch.device | str = "cpu",
) -> Lattice:
    """Lattice of pixels by place alone; one serves images of that size in any number.

    Args:
        size: ``(H, W)``.
        sigma_xy: width in pixels, or ``(sx, sy)``.
        device: where the values will be.

    Raises:
        InputError: widths that are not positive and finite.

    Example:
        >>> gaussian_lattice((12, 16), 3).batch
        1
    """
    device = torch.device(device)
    return driver(device).build_image(
        tuple(size), allocator(device), spatial=_pair(sigma_xy), threads=num_threads()
    )


# ---- parts -------------------------------------------------------------------------------------


def places(
    size: tuple[int, int], sigma_xy: float | tuple[float, float], normalization: str
) -> tuple[Lattice, Tensor | None, Tensor | None]:
    """`gaussian_lattice` on the CPU and its normalisers, kept: see `wsis._lattice.places`."""
    with torch.inference_mode(False):  # what is kept must serve a gradient too
        return _lattice.places(size, _pair(sigma_xy), normalization, _empty, num_threads())


_empty = allocator(torch.device("cpu"))


def normalisers(
    lattice: Lattice, normalization: str, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Factors before and after the filter, see `wsis._lattice.normalisers`."""
    if normalization == "none":
        return None, None
    return driver(device).normalisers(
        lattice, normalization, allocator(device), threads=num_threads()
    )


def _pair(sigma: float | tuple[float, float]) -> tuple[float, float]:
    return (
        (float(sigma),) * 2
        if isinstance(sigma, (int, float))
        else (float(sigma[0]), float(sigma[1]))
    )


def _sides(values: Tensor) -> str:
    return ", ".join(map(str, values.shape[2:]))


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
