"""The second view of the siamese network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


def second_view(image: Tensor, size: int, *, flip: bool = False) -> Tensor:
    """Resize the augmented first view to a small square; nothing else changes.

    RTC takes 128 for a first view of 448 (repository ChunyanWang1/RTC, contrast_train.py).

    Args:
        image: `[B, 3, H, W] float`, the first view after normalisation and padding.
        size: side of the second view in pixels.
        flip: also mirror it left to right; the view's maps must then be mirrored back.

    Returns:
        `[B, 3, size, size]`, bilinear with aligned corners.

    Example:
        >>> import torch
        >>> second_view(torch.zeros(2, 3, 64, 64), 16).shape
        torch.Size([2, 3, 16, 16])
    """
    view = functional.interpolate(image, (size, size), mode="bilinear", align_corners=True)
    return view.flip(-1) if flip else view
