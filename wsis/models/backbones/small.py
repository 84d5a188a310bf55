"""A small residual network for training from scratch on small images."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from wsis.errors import InputError
from wsis.models.features import Backbone, Features
from wsis.models.weights import load_state, read_state


class _ResidualBlock(nn.Module):
    """BatchNorm-ReLU-3x3 twice, and a 1x1 shortcut where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(
            in_channels,
            out_channels,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            bias=False,
        )
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(
            out_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        return self.shortcut(y) + self.conv2(F.relu(self.norm2(self.conv1(y))))


class _Stage(nn.Sequential):
    """One residual block, then BatchNorm and ReLU, so that stages can be read as features."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__(
            _ResidualBlock(in_channels, out_channels, stride=stride, dilation=dilation),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class SmallNet(Backbone):
    """Half a million parameters; strides 4, 8, 8, 8; conv5 and conv6 dilated by 2 and 4."""

    channels = (32, 64, 96, 128)
    strides = (4, 8, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, stride=2, padding=2, bias=False)
        self.stage3 = _Stage(24, 32, stride=2)
        self.stage4 = _Stage(32, 64, stride=2)
        self.stage5 = _Stage(64, 96, dilation=2)
        self.stage6 = _Stage(96, 128, dilation=4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Features:
        """See :meth:`Backbone.forward`."""
        conv3 = self.stage3(self.stem(image))
        conv4 = self.stage4(conv3)
        conv5 = self.stage5(conv4)
        return Features(conv3, conv4, conv5, self.stage6(conv5))

    def frozen_modules(self) -> list[nn.Module]:
        """The stem."""
        return [self.stem]


def build(*, pretrained: str | Path | bool = False, output_stride: int | None = None) -> SmallNet:
    """The small network.

    Args:
        pretrained: False, or a file of its own weights; there are no public ones.
        output_stride: 8 or None.

    Raises:
        InputError: ``pretrained=True``, another output stride, or weights that do not fit.
    """
    if output_stride not in (None, 8):
        raise InputError(f"output_stride of small: expected 8, got {output_stride}")
    if pretrained is True:
        raise InputError(
            "backbone small has no public weights; train it from scratch (pretrained=False) "
            "or give the path of a weight file"
        )
    model = SmallNet()
    if pretrained:
        load_state(model, read_state(pretrained), source=pretrained)
    return model
