"""What flows between the rooms: a batch, the maps a network makes of it, a prediction.

Sizes: ``B`` batch, ``K`` foreground classes, ``C = K + 1`` with background at 0, ``D`` feature
channels, ``H W`` image, ``h w`` feature grid. ``cams [B, K, ..]`` never have a background channel;
``scores``, ``refined``, ``logits`` and ``probs`` ``[B, C, ..]`` always do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BACKGROUND = 0
IGNORE = 255


@dataclass(frozen=True)
class Batch:
    """Training images with their image-level labels.

    Attributes:
        image: ``[B, 3, H, W] float32``, normalised with the backbone's mean and std; exactly 0
            outside the valid box (padding is added after normalisation).
        label: ``[B, K] float32``, multi-hot, 1 where the class is in the image.
        valid_box: ``[B, 4] int64``, the part that is not padding: y0, y1, x0, x1, half open.
        index: ``[B] int64``, position of each image in its data set.
        mask: ``[B, H, W] int64`` class ids 0..K and 255, only when masks supervise; else None.
    """

    image: Tensor
    label: Tensor
    valid_box: Tensor
    index: Tensor
    mask: Tensor | None = None

    def to(self, device: object) -> Batch:
        """The same batch on another device (asynchronously where memory is pinned)."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Maps:
    """What the network makes of one view. No label has entered, no loss has left.

    Where the network was asked for M classes only, CAMs and refined CAMs have M and 1 + M channels.
    The logits of a decoder that knows only objects have 2.

    A segmentation network (`wsis.models.deeplab`) has no CAMs and no projected features: they have
    no channels there.

    Attributes:
        cams: ``[B, K, h, w]``, raw class activation maps A (before any ReLU).
        class_logits: ``[B, K]``, mean of the CAMs resized to the input size; of a segmentation
            network the largest lead of each class over all others at any pixel.
        features: ``[B, D, h, w]``, projected features X >= 0.
        refined: ``[B, C, h, w]``, refined CAM R of cross-representation refinement in [0, 1];
            None when the model is built without it.
        logits: ``[B, C, H/4, W/4]``, decoder output M; None where it was not asked for. Of a
            segmentation network: on its backbone's last grid.
    """

    cams: Tensor
    class_logits: Tensor
    features: Tensor
    refined: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """The answer for one image at its original size.

    Attributes:
        scores: ``[K, H, W] float32`` in [0, 1], foreground scores, mean over scales and flips.
        mask: ``[H, W] uint8``, class ids 0..K: argmax of background constant and scores.
        class_probs: ``[K] float32`` in [0, 1], image-level probabilities.
    """

    scores: Tensor
    mask: Tensor
    class_probs: Tensor
