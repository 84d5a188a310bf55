"""ResNet-50 and ResNet-101 of torchvision with late strides turned into dilations."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from wsis.errors import InputError, MissingExtraError
from wsis.models.features import Backbone, Features
from wsis.models.weights import load_state, read_state

# output stride -> which of layer2, layer3, layer4 dilate instead of striding
_DILATED = {8: (False, True, True), 16: (False, False, True), 32: (False, False, False)}


class ResNet(Backbone):
    """Bottleneck ResNet (arXiv 1512.03385): conv3 to conv6 are layer1 to layer4.

    Args:
        depth: 50 or 101.
        output_stride: 8, 16 or 32.

    Raises:
        InputError: another output stride.
        MissingExtraError: torchvision is absent.
    """

    channels = (256, 512, 1024, 2048)

    def __init__(self, depth: int, *, output_stride: int = 16) -> None:
        super().__init__()
        if output_stride not in _DILATED:
            raise InputError(
                f"output_stride of resnet{depth}: expected 8, 16 or 32, got {output_stride}"
            )
        whole = _torchvision_models().get_model(
            f"resnet{depth}", replace_stride_with_dilation=list(_DILATED[output_stride])
        )
        self.conv1, self.bn1, self.maxpool = whole.conv1, whole.bn1, whole.maxpool
        self.layer1, self.layer2 = whole.layer1, whole.layer2
        self.layer3, self.layer4 = whole.layer3, whole.layer4
        self.strides = (4, 8, min(16, output_stride), output_stride)

    def forward(self, image: Tensor) -> Features:
        """See :meth:`Backbone.forward`."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(image)), inplace=True))
        conv3 = self.layer1(x)
        conv4 = self.layer2(conv3)
        conv5 = self.layer3(conv4)
        return Features(conv3, conv4, conv5, self.layer4(conv5))

    def frozen_modules(self) -> list[nn.Module]:
        """The first convolution and its BatchNorm."""
        return [self.conv1, self.bn1]


def _torchvision_models() -> ModuleType:
    try:
        from torchvision import models
    except ImportError:
        raise MissingExtraError("torchvision", "train", "a ResNet backbone") from None
    return models


def _download(depth: int) -> dict[str, Tensor]:
    """ImageNet weights from torchvision (from its cache after the first time)."""
    # V1 follows the paper's recipe; V2 adds label smoothing, mixup and cutmix
    weights = _torchvision_models().get_model_weights(f"resnet{depth}").IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"weights of resnet{depth}: torchvision could not download {weights.url} ({error}); "
            "download it elsewhere and give its path as pretrained"
        ) from error


def build(
    *, depth: int, pretrained: str | Path | bool = False, output_stride: int | None = None
) -> ResNet:
    """ResNet-50 or ResNet-101.

    Args:
        depth: 50 or 101.
        pretrained: True for torchvision's ImageNet weights (downloaded once), or a file with
            torchvision's names.
        output_stride: 8, 16 (default) or 32.

    Raises:
        InputError: another output stride, no download, or weights that do not fit.
        MissingExtraError: torchvision is absent.
    """
    model = ResNet(depth, output_stride=output_stride or 16)
    if pretrained:
        state = _download(depth) if pretrained is True else read_state(pretrained)
        state = {name: t for name, t in state.items() if not name.startswith("fc.")}
        load_state(model, state, source=f"resnet{depth}" if pretrained is True else pretrained)
    return model
