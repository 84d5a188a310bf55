"""Pixel correlation: class maps propagated by cosine affinity (SEAM's PCM)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsis.errors import InputError


def pixel_correlation(cams: Tensor, features: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Every pixel becomes the affinity-weighted mean of the class maps over all pixels.

    ``f_i = F_i / (|F_i| + eps)``, ``S_ij = relu(f_i . f_j)``,
    ``out_cj = sum_i a_ci S_ij / (sum_i S_ij + eps)``. Gradients reach both inputs.

    Example:
        >>> cams, features = torch.rand(2, 4, 5, 7), torch.randn(2, 16, 5, 7)
        >>> pixel_correlation(cams, features).shape
        torch.Size([2, 4, 5, 7])

    Args:
        cams: ``[B, C, h', w'] float``, any range; on another grid than the features it is resized
            to theirs first (bilinear, corners aligned).
        features: ``[B, D, h, w] float``.
        eps: added to norms and column sums; 1e-5 in YudeWang/SEAM and ChunyanWang1/RTC.

    Returns:
        ``[B, C, h, w]``, float64 if an input is, else float32; inside the range of the maps
        extended by 0, because a column of weights sums to at most 1.

    Raises:
        InputError: an input is not 4-d floating point, or batch sizes or devices differ.
    """
    for name, value in (("cams", cams), ("features", features)):
        if value.dim() != 4 or not value.is_floating_point():
            raise InputError(
                f"{name} must be a floating [B, channels, h, w], "
                f"got {value.dtype} {list(value.shape)}"
            )
    if cams.shape[0] != features.shape[0] or cams.device != features.device:
        raise InputError(
            f"cams and features must share batch and device, got {list(cams.shape)} on "
            f"{cams.device} and {list(features.shape)} on {features.device}"
        )
    dtype = torch.promote_types(torch.promote_types(cams.dtype, features.dtype), torch.float32)
    # sums over thousands of pixels overflow or drown in half precision
    with torch.autocast(cams.device.type, enabled=False):
        cams, features = cams.to(dtype), features.to(dtype)
        grid = features.shape[-2:]
        if cams.shape[-2:] != grid:
            cams = F.interpolate(cams, size=grid, mode="bilinear", align_corners=True)
        unit = features.flatten(2)
        unit = unit / (unit.norm(dim=1, keepdim=True) + eps)
        affinity = F.relu(unit.transpose(1, 2) @ unit)
        # dividing the product instead of the matrix saves a second pass over (h w)^2 numbers
        propagated = cams.flatten(2) @ affinity / (affinity.sum(1, keepdim=True) + eps)
    return propagated.unflatten(2, grid)


class PixelCorrelation(nn.Module):
    """See :func:`pixel_correlation`."""

    def __init__(self, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, cams: Tensor, features: Tensor) -> Tensor:
        """See :func:`pixel_correlation`."""
        return pixel_correlation(cams, features, eps=self.eps)
