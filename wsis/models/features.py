"""What every backbone promises: four named feature maps and the image statistics it wants."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Features:
    """Four stages of a backbone, shallow to deep, in RTC's names.

    Attributes:
        conv3: ``[B, c3, h3, w3] float``, the decoder's fine map (stride about 4).
        conv4: ``[B, c4, h4, w4] float``, joins the image in the shallow affinity of CRR.
        conv5: ``[B, c5, h5, w5] float``, half of CRR's deep affinity.
        conv6: ``[B, c6, h, w] float``, the last map: CAM head and decoder read it.
    """

    conv3: Tensor
    conv4: Tensor
    conv5: Tensor
    conv6: Tensor


class Backbone(nn.Module):
    """Base of all backbones: a module from an image to :class:`Features`.

    Attributes:
        mean: per channel, subtracted from images in [0, 1] before they enter.
        std: per channel, divides what is left.
        channels: ``(c3, c4, c5, c6)``.
        strides: strides of the four maps against the image; a map's side is
            ``ceil(side / stride)``.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channels: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]

    def forward(self, image: Tensor) -> Features:
        """The four stages of ``image [B, 3, H, W]``, normalised with ``mean`` and ``std``."""
        raise NotImplementedError

    def frozen_modules(self) -> list[nn.Module]:
        """The stages before conv3's stage starts; RTC keeps them as pretrained."""
        raise NotImplementedError
