"""Segmentation networks for the second stage: DeepLab's heads on any of our backbones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsis.errors import InputError, MissingExtraError
from wsis.models.features import Backbone
from wsis.models.network import Network, at_least_float32, check_image
from wsis.types import Maps

HEADS = ("deeplabv1", "deeplabv2", "deeplabv3")


class DeepLab(Network):
    """A fully supervised segmentation network: one head on the backbone's last map.

    It has neither CAMs nor an image-level classifier. ``Maps.class_logits`` says of each class by
    how much its logit exceeds all others' at the pixel where it does so most: positive if and only
    if some pixel is given to the class.

    Example:
        >>> from wsis.models.backbones import create_backbone
        >>> model = DeepLab(create_backbone("small"), num_classes=3, head="deeplabv2").eval()
        >>> maps = model(torch.zeros(1, 3, 64, 48))
        >>> maps.logits.shape, maps.cams.shape
        (torch.Size([1, 4, 8, 6]), torch.Size([1, 0, 8, 6]))

    Args:
        backbone: see :func:`wsis.models.backbones.create_backbone`; its last grid is the head's.
        num_classes: K foreground classes; the logits have K + 1 channels.
        head: ``deeplabv1`` (:class:`LargeFov`), ``deeplabv2`` (:class:`Aspp`) or ``deeplabv3``
            (torchvision's DeepLabHead: rates 12, 24, 36, arXiv 1706.05587).
        dropout: before the classifier of ``deeplabv1`` and ``deeplabv2``.
        freeze_stem: keep the backbone's first stages as they are.
        freeze_bn: the backbone's BatchNorms keep their statistics, scale and shift; the head's are
            new and always learn.

    Raises:
        InputError: unknown head, or ``num_classes`` < 1.
        MissingExtraError: ``deeplabv3`` without torchvision.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        head: str,
        dropout: float = 0.5,
        freeze_stem: bool = False,
        freeze_bn: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes, freeze_stem=freeze_stem, freeze_bn=freeze_bn)
        self.head = _build_head(head, backbone.channels[3], num_classes + 1, dropout)
        self._freeze()

    def forward(
        self,
        image: Tensor,
        *,
        decode: bool = True,
        refine: bool = True,
        classes: Tensor | None = None,
    ) -> Maps:
        """Logits of one view on the backbone's last grid; the arguments change nothing here.

        Args:
            image: ``[B, 3, H, W]``, normalised with the backbone's mean and std.
            decode: as in `Network.forward`.
            refine: as in `Network.forward`.
            classes: as in `Network.forward`.

        Raises:
            InputError: the image has another shape.
        """
        check_image(image)
        logits = at_least_float32(self.head(self.backbone(image).conv6))
        none = logits[:, :0]
        return Maps(
            cams=none, class_logits=largest_margin(logits.detach()), features=none, logits=logits
        )

    def _norm_roots(self) -> list[nn.Module]:
        return [self.backbone]


class LargeFov(nn.Sequential):
    """DeepLabv1's head: 3x3 of dilation 12, 1x1, dropout, classifier (RTC, second stage).

    ``512 BN ReLU - 512 BN ReLU - dropout - C``; the convolutions before a BatchNorm have no bias
    (ChunyanWang1/RTC segmentation/, after YudeWang/semantic-segmentation-codebase).

    Args:
        in_channels: of the backbone's last map.
        out_channels: C, background included.
        dropout: of single values.
        width: channels inside.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, dropout: float = 0.5, width: int = 512
    ) -> None:
        super().__init__(
            _conv_norm(in_channels, width, dilation=12),
            _conv_norm(width, width),
            nn.Dropout(dropout),
            nn.Conv2d(width, out_channels, 1),
        )
        _initialise(self)


class Aspp(nn.Module):
    """DeepLabv2's head with a global branch (RTC, second stage).

    Four 3x3 convolutions of dilation 6, 12, 18, 24 and the mean over the image, each to 256
    channels with BatchNorm and ReLU; all five joined, 1x1 to 256 with BatchNorm and ReLU, dropout,
    classifier. How the five are joined is not stated for RTC; this is DeepLabv3's way.

    Args:
        in_channels: of the backbone's last map.
        out_channels: C, background included.
        dropout: of single values.
        width: channels of each branch.
        rates: dilations.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.5,
        width: int = 256,
        rates: tuple[int, ...] = (6, 12, 18, 24),
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_conv_norm(in_channels, width, dilation=r) for r in rates)
        self.whole = _conv_norm(in_channels, width)
        self.join = _conv_norm((len(rates) + 1) * width, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(width, out_channels, 1)
        _initialise(self)

    def forward(self, conv6: Tensor) -> Tensor:
        """Logits ``[B, C, h, w]`` of ``conv6 [B, c, h, w]``."""
        whole = self.whole(conv6.mean((-2, -1), keepdim=True)).expand(-1, -1, *conv6.shape[-2:])
        joined = torch.cat([*(branch(conv6) for branch in self.branches), whole], 1)
        return self.classifier(self.dropout(self.join(joined)))


@torch.no_grad()
def largest_margin(logits: Tensor) -> Tensor:
    """Of each foreground class, the largest lead over all other channels: ``[B, K]``.

    ``max_i (z_c(i) - max_{j != c} z_j(i))``, positive where some pixel's argmax is c.

    Args:
        logits: ``[B, C, h, w]``, background first, C >= 2.
    """
    (first, second), winner = logits.topk(2, dim=1).values.unbind(1), logits.argmax(1)
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    rival = torch.where(winner[:, None] == classes, second[:, None], first[:, None])
    return (logits - rival)[:, 1:].flatten(2).amax(-1)


def _build_head(name: str, in_channels: int, out_channels: int, dropout: float) -> nn.Module:
    if name == "deeplabv1":
        return LargeFov(in_channels, out_channels, dropout=dropout)
    if name == "deeplabv2":
        return Aspp(in_channels, out_channels, dropout=dropout)
    if name != "deeplabv3":
        raise InputError(f"head '{name}': expected one of {', '.join(HEADS)}")
    try:
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    except ImportError:
        raise MissingExtraError("torchvision", "train", "the head deeplabv3") from None
    return DeepLabHead(in_channels, out_channels)


def _conv_norm(in_channels: int, out_channels: int, *, dilation: int | None = None) -> nn.Module:
    """3x3 of a dilation, or 1x1 without one; BatchNorm; ReLU."""
    if dilation is None:
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    else:
        conv = nn.Conv2d(
            in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False
        )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _initialise(head: nn.Module) -> None:
    """Kaiming-normal (fan out); small values for the classifier, the one layer with a bias."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            if layer.bias is None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
