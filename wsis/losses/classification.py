"""Image-level losses: for several labels or one, and minimum pooling of the refined CAM.

Sizes: ``B`` batch, ``K`` foreground classes, ``P`` any selection of them, ``H W`` image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def multilabel_soft_margin(class_logits: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoids, mean over classes and batch.

    Args:
        class_logits: ``[B, K]`` float.
        label: ``[B, K]``, multi-hot.

    Returns:
        Scalar.
    """
    return F.multilabel_soft_margin_loss(class_logits, label.to(class_logits))


def single_label(class_logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of the one class of each image, mean over the batch.

    Args:
        class_logits: ``[B, K]`` float.
        label: ``[B, K]``, one-hot.

    Returns:
        Scalar.
    """
    return F.cross_entropy(class_logits, label.argmax(dim=1))


def min_pooling(refined_up: Tensor, label: Tensor, fraction: float = 0.25) -> Tensor:
    """Push the weakest part of each image down to zero: some part of it is background.

    Mean over the ``floor(fraction * H * W)`` smallest values of ``[max_c R_c y_c]+`` per image
    (YudeWang/SEAM adaptive_min_pooling_loss; ChunyanWang1/RTC alike).

    Args:
        refined_up: ``[B, P, H, W]`` float, refined CAM at input size, foreground only.
        label: ``[B, P]``, 1 where the channel's class is in the image.
        fraction: part of the positions taken, in (0, 1].

    Returns:
        Scalar.
    """
    strongest = (refined_up * label.to(refined_up)[..., None, None]).max(dim=1).values
    strongest = strongest.flatten(1).relu()
    count = max(int(fraction * strongest.shape[1]), 1)
    return strongest.topk(count, dim=1, largest=False, sorted=False).values.mean()
