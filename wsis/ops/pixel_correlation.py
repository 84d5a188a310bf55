"""Pixel correlation: class maps propagated by the cosine affinity of features (SEAM's PCM).

The ``h w x h w`` matrix of affinities exists only as tiles, in both directions: what is kept for
the gradients has the size of the maps. Memory grows with ``h w``, time with its square.

Results do not depend on the number of threads. A value that is not finite spoils its whole image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsis.errors import InputError
from wsis.ops._pixel_correlation import LOWEST_TEMPERATURE

EPS = 1e-5  # YudeWang/SEAM, ChunyanWang1/RTC


def pixel_correlation(
    cams: Tensor,
    features: Tensor | Sequence[Tensor],
    *,
    eps: float = EPS,
    temperature: float | None = None,
) -> Tensor:
    """Every pixel becomes the affinity-weighted mean of the class maps over all pixels.

    ``f_i = F_i / (|F_i| + eps)``, ``S_ij = relu(f_i . f_j)``,
    ``out_cj = sum_i a_ci S_ij / (sum_i S_ij + eps)``; with a temperature
    ``out_cj = sum_i a_ci softmax_i(f_i . f_j / temperature)``. Several feature maps give the mean
    of their results, as in RTC's cross-representation refinement. Gradients, of the first order,
    reach the maps and all features; the relu has slope 0 at 0.

    Defined at the edges: a pixel without features gets 0 (with a temperature the mean of the
    maps), equal features the mean of the maps (times ``n / (n + eps)``, ``n`` pixels).

    Example:
        >>> cams = torch.rand(2, 4, 5, 7)
        >>> shallow, deep = torch.randn(2, 16, 5, 7), torch.randn(2, 32, 5, 7)
        >>> pixel_correlation(cams, [shallow, deep]).shape
        torch.Size([2, 4, 5, 7])

    Args:
        cams: ``[B, C, h', w']`` float, any range; on another grid than the features it is resized
            to theirs first (bilinear, corners aligned).
        features: ``[B, D, h, w]`` float, or several of them on one grid, any ``D`` each. Half
            precision is computed in float32.
        eps: added to norms and column sums, positive; 1e-5 in YudeWang/SEAM and ChunyanWang1/RTC.
        temperature: of the softmax, at least 0.02; None for the relu of PCM.

    Returns:
        ``[B, C, h, w]``, float64 if an input is, else float32; inside the range of the maps
        extended by 0, because a column of weights sums to at most 1.

    Raises:
        InputError: an input is not 4-d floating point, there is no feature map, batch sizes,
            grids or devices differ, or a number is outside its range.
    """
    several = [features] if isinstance(features, Tensor) else list(features)
    _check(cams, several, eps, temperature)
    dtype = torch.float32
    for value in (cams, *several):
        dtype = torch.promote_types(dtype, value.dtype)
    with torch.autocast(cams.device.type, enabled=False):
        cams = cams.to(dtype)
        grid = several[0].shape[-2:]
        if cams.shape[-2:] != grid:
            cams = F.interpolate(cams, size=grid, mode="bilinear", align_corners=True)
        out, _saved = torch.ops.wsis.pixel_correlation(
            cams.flatten(2), [f.to(dtype).flatten(2) for f in several], eps, temperature or 0.0
        )
    return out.unflatten(2, grid)


def _check(cams: Tensor, features: list[Tensor], eps: float, temperature: float | None) -> None:
    if not features:
        raise InputError("features must be a [B, D, h, w] or several of them, got none")
    for name, value in (("cams", cams), *(("features", f) for f in features)):
        if value.dim() != 4 or not value.is_floating_point():
            raise InputError(
                f"{name} must be a floating [B, channels, h, w], "
                f"got {value.dtype} {list(value.shape)}"
            )
    for f in features:
        if cams.shape[0] != f.shape[0] or cams.device != f.device:
            raise InputError(
                f"cams and features must share batch and device, got {list(cams.shape)} on "
                f"{cams.device} and {list(f.shape)} on {f.device}"
            )
        if f.shape[-2:] != features[0].shape[-2:]:
            raise InputError(
                f"features must share a grid, got {list(features[0].shape)} and {list(f.shape)}"
            )
    if cams.shape[-2:].numel() == 0 and features[0].shape[-2:].numel():
        raise InputError(f"cams must not be empty, got {list(cams.shape)}")
    if not eps > 0:
        raise InputError(f"eps must be positive, got {eps}")
    if temperature is not None and not temperature >= LOWEST_TEMPERATURE:
        raise InputError(f"temperature must be at least {LOWEST_TEMPERATURE}, got {temperature}")


class PixelCorrelation(nn.Module):
    """See :func:`pixel_correlation`."""

    def __init__(self, *, eps: float = EPS, temperature: float | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.temperature = temperature

    def forward(self, cams: Tensor, features: Tensor | Sequence[Tensor]) -> Tensor:
        """See :func:`pixel_correlation`."""
        return pixel_correlation(cams, features, eps=self.eps, temperature=self.temperature)
