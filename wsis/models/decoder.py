"""The segmentation decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsis.models.features import Features
from wsis.ops.resize import resize


class Decoder(nn.Module):
    """From conv6, on conv3's grid, to class logits (RTC's decoder).

    ``e1 = W2 * W1 * conv6`` (3x3 convolutions of dilation 12, nothing between them),
    ``e2 = W3 * conv6`` (3x3), ``u = W4 [e1 | e2]`` resized to conv3's grid,
    ``s = W5 * conv3`` (3x3), ``g = relu(W6 [u | s])``, ``M = W7 g``.

    Args:
        channels: ``(c3, c4, c5, c6)`` of the backbone.
        num_classes: K foreground classes; the logits have K + 1 channels. 1 tells an object from
            background, whatever its class.
        dims: ``(m, n, s, d)``: outputs of W1, of W2 and W3, of W5, of W4 and W6;
            (512, 256, 48, 256) in RTC.
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int],
        num_classes: int,
        *,
        dims: tuple[int, int, int, int],
    ) -> None:
        super().__init__()
        c3, _, _, c6 = channels
        wide, context, skip, out = dims
        self.wide = nn.Conv2d(c6, wide, 3, padding=12, dilation=12)
        self.context = nn.Conv2d(wide, context, 3, padding=12, dilation=12)
        self.local = nn.Conv2d(c6, context, 3, padding=1, bias=False)
        self.merge = nn.Conv2d(2 * context, out, 1, bias=False)
        self.skip = nn.Conv2d(c3, skip, 3, padding=1, bias=False)
        self.fuse = nn.Conv2d(out + skip, out, 1, bias=False)
        self.classifier = nn.Conv2d(out, num_classes + 1, 1, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: Features) -> Tensor:
        """Logits ``[B, K + 1, h3, w3]`` of a backbone's features."""
        conv3, conv6 = features.conv3, features.conv6
        coarse = self.merge(torch.cat([self.context(self.wide(conv6)), self.local(conv6)], 1))
        coarse = resize(coarse, conv3.shape[-2:])
        fine = torch.cat([coarse, self.skip(conv3)], 1)
        return self.classifier(F.relu(self.fuse(fine)))
