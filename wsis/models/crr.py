"""Cross-representation refinement (CRR) of class activation maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsis.models.features import Features
from wsis.ops.normalize import one_hot_max, seed_scores
from wsis.ops.pixel_correlation import pixel_correlation
from wsis.ops.resize import resize


class CrossRefinement(nn.Module):
    """Refines the CAM seed with two affinities and averages: ``R = (PCM(a, Fs) + PCM(a, Fd)) / 2``.

    ``Fs = Ws [image | relu(W4 conv4)]`` is shallow, ``Fd = Wd [relu(W5 conv5) | relu(W6 conv6)]``
    deep; all W are 1x1 without bias. The seed ``a`` and every input are detached: only the five
    weights learn. Method: RTC (arXiv 2309.00871); initial values: ChunyanWang1/RTC.

    Args:
        channels: ``(c3, c4, c5, c6)`` of the backbone.
        dims: outputs of W4 (and Ws), W5, W6, Wd; (64, 128, 128, 128) in RTC.
    """

    def __init__(
        self, channels: tuple[int, int, int, int], *, dims: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        _, c4, c5, c6 = channels
        d4, d5, d6, deep = dims
        self.reduce4 = nn.Conv2d(c4, d4, 1, bias=False)
        self.reduce5 = nn.Conv2d(c5, d5, 1, bias=False)
        self.reduce6 = nn.Conv2d(c6, d6, 1, bias=False)
        self.shallow = nn.Conv2d(3 + d4, d4, 1, bias=False)
        self.deep = nn.Conv2d(d5 + d6, deep, 1, bias=False)
        for layer in (self.reduce4, self.reduce5, self.reduce6):
            nn.init.kaiming_normal_(layer.weight)
        nn.init.xavier_uniform_(self.shallow.weight)
        nn.init.xavier_uniform_(self.deep.weight, gain=4)

    def forward(self, cams: Tensor, image: Tensor, features: Features) -> Tensor:
        """Refined CAMs.

        Args:
            cams: ``[B, K, h, w]`` raw.
            image: ``[B, 3, H, W]`` normalised.
            features: of the same image; maps on another grid than the CAMs are resized to it.

        Returns:
            ``[B, K + 1, h, w] float32`` in [0, 1].
        """
        return self.refine(one_hot_max(seed_scores(cams.detach())), image, features)

    def refine(self, seed: Tensor, image: Tensor, features: Features) -> Tensor:
        """Refined CAMs ``[B, M, h, w] float32`` of a seed ``[B, M, h, w]``, channel by channel."""
        grid = seed.shape[-2:]
        picture = resize(image.detach(), grid)
        conv4, conv5, conv6 = (
            resize(f.detach(), grid) for f in (features.conv4, features.conv5, features.conv6)
        )
        shallow = self.shallow(torch.cat([picture, F.relu(self.reduce4(conv4))], 1))
        deep = self.deep(torch.cat([F.relu(self.reduce5(conv5)), F.relu(self.reduce6(conv6))], 1))
        return pixel_correlation(seed, [shallow, deep])
