"""WideResNet38, pre-activation, output stride 8: the backbone of PSA, SEAM and RTC.

Parameter names are those of the public checkpoints (``b3_1.conv_branch2a.weight``), so that these
load unchanged. Architecture: Wu et al., *Wider or Deeper* (arXiv 1611.10080), model A1.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from wsis.errors import InputError
from wsis.global_batch import ChannelDropout
from wsis.models.convert import rename_mxnet_state
from wsis.models.features import Backbone, Features
from wsis.models.weights import load_state, read_state


class _Block(nn.Module):
    """BN-ReLU-3x3-BN-ReLU-3x3, with a 1x1 shortcut from the first ReLU if shapes change."""

    def __init__(
        self,
        in_channels: int,
        middle: int,
        out_channels: int,
        *,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(
            in_channels,
            middle,
            3,
            stride=stride,
            padding=first_dilation,
            dilation=first_dilation,
            bias=False,
        )
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(
            middle, out_channels, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.conv_branch1 = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            if in_channels != out_channels or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the BN-ReLU input that the backbone reads as a feature."""
        entry = F.relu(self.bn_branch2a(x))
        y = self.conv_branch2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(entry))))
        return y + (x if self.conv_branch1 is None else self.conv_branch1(entry)), entry


class _Bottleneck(nn.Module):
    """1x1 to out/4, dilated 3x3 to out/2, 1x1 to out; dropout before the second and the third."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dilation: int, dropout: float
    ) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, out_channels // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(out_channels // 4)
        self.conv_branch2b1 = nn.Conv2d(
            out_channels // 4,
            out_channels // 2,
            3,
            padding=dilation,
            dilation=dilation,
            bias=False,
        )
        self.bn_branch2b2 = nn.BatchNorm2d(out_channels // 2)
        self.conv_branch2b2 = nn.Conv2d(out_channels // 2, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.dropout = ChannelDropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the BN-ReLU input that the backbone reads as a feature."""
        entry = F.relu(self.bn_branch2a(x))
        y = F.relu(self.bn_branch2b1(self.conv_branch2a(entry)))
        y = self.conv_branch2b1(self.dropout(y))
        y = self.conv_branch2b2(self.dropout(F.relu(self.bn_branch2b2(y))))
        return y + self.conv_branch1(entry), entry


class WideResNet38(Backbone):
    """WideResNet38 with conv3 at stride 4, conv4 to conv6 at stride 8 (104 M parameters).

    conv3, conv4, conv5 are the BN-ReLU inputs of blocks b4, b5, b6; conv6 is the last BN-ReLU.
    """

    channels = (256, 512, 1024, 4096)
    strides = (4, 8, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.b2 = _Block(64, 128, 128, stride=2)
        self.b2_1 = _Block(128, 128, 128)
        self.b2_2 = _Block(128, 128, 128)
        self.b3 = _Block(128, 256, 256, stride=2)
        self.b3_1 = _Block(256, 256, 256)
        self.b3_2 = _Block(256, 256, 256)
        self.b4 = _Block(256, 512, 512, stride=2)
        for i in range(1, 6):
            setattr(self, f"b4_{i}", _Block(512, 512, 512))
        self.b5 = _Block(512, 512, 1024, first_dilation=1, dilation=2)
        self.b5_1 = _Block(1024, 512, 1024, first_dilation=2, dilation=2)
        self.b5_2 = _Block(1024, 512, 1024, first_dilation=2, dilation=2)
        self.b6 = _Bottleneck(1024, 2048, dilation=4, dropout=0.3)
        self.b7 = _Bottleneck(2048, 4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4096)

    def forward(self, image: Tensor) -> Features:
        """See :meth:`Backbone.forward`."""
        x, entries = self.conv1a(image), {}
        for name, block in self.named_children():
            if name.startswith("b") and block is not self.bn7:
                x, entries[name] = block(x)
        return Features(entries["b4"], entries["b5"], entries["b6"], F.relu(self.bn7(x)))

    def frozen_modules(self) -> list[nn.Module]:
        """conv1a and the blocks at stride 2."""
        return [self.conv1a, self.b2, self.b2_1, self.b2_2]


def build(
    *, pretrained: str | Path | bool = False, output_stride: int | None = None
) -> WideResNet38:
    """WideResNet38.

    Args:
        pretrained: False, or a weight file with the public torch names or the MXNet names
            (``arg:res3a_branch2a_weight``) of ``ilsvrc-cls_rna-a1_cls1000_ep-0001.params``.
        output_stride: 8 or None.

    Raises:
        InputError: ``pretrained=True`` (no package carries the weights), another output stride,
            or weights that do not fit.
    """
    if output_stride not in (None, 8):
        raise InputError(f"output_stride of wideresnet38: expected 8, got {output_stride}")
    if pretrained is True:
        raise InputError(
            "backbone wideresnet38: its ImageNet weights are in no Python package; download "
            "ilsvrc-cls_rna-a1_cls1000_ep-0001.params (github.com/itijyou/ademxapp) and give "
            "its path as pretrained"
        )
    model = WideResNet38()
    if pretrained:
        state = read_state(pretrained)
        if any(name.startswith(("arg:", "aux:")) for name in state):
            state = rename_mxnet_state(state)
        load_state(model, state, source=pretrained)
    return model
