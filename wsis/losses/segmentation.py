"""Pixel loss of the decoder on pseudo masks.

Sizes: ``B`` batch, ``K`` foreground classes, ``C = K + 1``, ``H W`` image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from wsis.ops.resize import resize
from wsis.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor


def segmentation_loss(
    logits: Tensor, masks: Tensor, label: Tensor, *, gate: bool = True, balance: bool = True
) -> Tensor:
    """Class-balanced cross-entropy on the images whose mask shows all their classes.

    ``(1/B) sum_n g_n (1/HW) sum_i w_{n,c} CE_i``; ignored pixels count as zeros in both means;
    ``w_{n,c} = (m_n - m_{n,c}) / (1 + m_n)`` with ``m_{n,c}`` pixels of class c and ``m_n``
    labelled pixels; ``g_n = 1`` iff the mask has as many classes, background included, as the
    label plus one (visinf/1-stage-wseg balanced_mask_loss_ce; ChunyanWang1/RTC alike).

    Args:
        logits: ``[B, C, h, w]`` float, resized to ``H W`` (bilinear, align_corners=True).
        masks: ``[B, H, W] int64``, 0..K and 255.
        label: ``[B, K]``, multi-hot.
        gate: False takes every image.
        balance: False weighs every labelled pixel 1.

    Returns:
        Scalar; 0, with a zero gradient, when no image takes part.
    """
    batch, channels = logits.shape[:2]
    pixels, logits_in = _class_pixels(masks, channels), logits
    if gate:
        chosen = (pixels > 0).sum(dim=1) == (label > 0).sum(dim=1) + 1
        if logits.is_cuda:  # to select would wait for the device
            masks = masks.masked_fill(~chosen[:, None, None], IGNORE)
        else:
            logits_in, masks, pixels = logits[chosen], masks[chosen], pixels[chosen]
    if len(logits_in) == 0:
        return logits.sum() * 0
    loss = F.cross_entropy(
        resize(logits_in, masks.shape[-2:]), masks, ignore_index=IGNORE, reduction="none"
    )
    if balance:
        labelled = pixels.sum(dim=1, keepdim=True)
        weight = (labelled - pixels).to(loss) / (1 + labelled)
        class_ids = masks.masked_fill(masks == IGNORE, 0)  # their loss is 0 already
        loss = loss * weight.gather(1, class_ids.flatten(1)).view_as(loss)
    return loss.mean(dim=(1, 2)).sum() / batch


def _class_pixels(masks: Tensor, channels: int) -> Tensor:
    """Pixels of each class, ``[B, C] int64``; ignored ones are not counted."""
    batch = len(masks)
    offset = torch.arange(batch, device=masks.device)[:, None] * channels
    ids = masks.flatten(1)
    slot = torch.where(ids == IGNORE, batch * channels, ids + offset)
    counts = slot.new_zeros(batch * channels + 1)  # bincount would wait for the device
    counts.scatter_add_(0, slot.flatten(), torch.ones_like(slot).flatten())
    return counts[:-1].view(batch, channels)
