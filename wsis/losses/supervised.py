"""Losses of networks that learn from masks: true ones, or those of a first stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from wsis.losses.classification import multilabel_soft_margin
from wsis.ops.normalize import as_float
from wsis.ops.resize import resize
from wsis.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

    from wsis.types import Maps


def supervised_losses(maps: Maps, label: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Multi-label soft margin on the class logits, cross-entropy on the decoder's logits.

    Args:
        maps: output of the network, with decoder logits.
        label: ``[B, K]``, multi-hot.
        masks: ``[B, H, W] int64``, 0..K and 255; the cross-entropy is the mean over other pixels.

    Returns:
        Scalars ``cls``, ``seg`` and their sum ``total``.
    """
    with torch.autocast(label.device.type, enabled=False):
        terms = {
            "cls": multilabel_soft_margin(as_float(maps.class_logits), label),
            "seg": _pixel_loss(maps, masks),
        }
        return terms | {"total": terms["cls"] + terms["seg"]}


def pixel_losses(maps: Maps, masks: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of a segmentation network on masks; image-level labels play no part.

    Args:
        maps: output of the network.
        masks: ``[B, H, W] int64``, 0..K and 255; the mean is over the other pixels.

    Returns:
        Scalars ``seg`` and ``total``, which are the same.
    """
    with torch.autocast(masks.device.type, enabled=False):
        seg = _pixel_loss(maps, masks)
        return {"seg": seg, "total": seg}


def _pixel_loss(maps: Maps, masks: Tensor) -> Tensor:
    assert maps.logits is not None
    logits = resize(as_float(maps.logits), masks.shape[-2:])
    pixels = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum")
    return pixels / (masks != IGNORE).sum().clamp(min=1)
