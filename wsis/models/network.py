"""What every network of ours is: a backbone with heads; which parts are new, which stay frozen."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsis.errors import InputError
from wsis.models.features import Backbone
from wsis.types import Maps


class Network(nn.Module):
    """Base of the networks: one view of an image to its :class:`wsis.types.Maps`.

    A subclass adds its heads and ends its ``__init__`` with ``_freeze()``.

    Args:
        backbone: see :func:`wsis.models.backbones.create_backbone`.
        num_classes: K foreground classes.
        freeze_stem: keep the backbone's first stages as they are.
        freeze_bn: the BatchNorms of `_norm_roots` stay in evaluation mode with fixed scale and
            shift, also after ``train()``. False lets them learn.

    Raises:
        InputError: ``num_classes`` < 1.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, freeze_stem: bool, freeze_bn: bool
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError(f"num_classes: expected 1 foreground class or more, got {num_classes}")
        self.num_classes = num_classes
        self.freeze_stem = freeze_stem
        self.freeze_bn = freeze_bn
        self.backbone = backbone

    def forward(
        self,
        image: Tensor,
        *,
        decode: bool = True,
        refine: bool = True,
        classes: Tensor | None = None,
    ) -> Maps:
        """Maps of ``image [B, 3, H, W]``, normalised with the backbone's mean and std."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Network:
        """Training mode for everything that is not frozen."""
        super().train(mode)
        for norm in self._frozen_norms():
            norm.eval()
        return self

    def pretrained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters of the backbone, by name."""
        return [(name, p) for name, p in self._trainable() if name.startswith("backbone.")]

    def new_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters of the heads on top of the backbone, by name."""
        return [(name, p) for name, p in self._trainable() if not name.startswith("backbone.")]

    def _freeze(self) -> None:
        if self.freeze_stem:
            for module in self.backbone.frozen_modules():
                module.requires_grad_(False)
        for norm in self._frozen_norms():
            norm.requires_grad_(False)
        self.train()

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def _norm_roots(self) -> list[nn.Module]:
        """Below which ``freeze_bn`` freezes the BatchNorms."""
        return [self]

    def _frozen_norms(self) -> Iterator[_BatchNorm]:
        if self.freeze_bn:
            roots = self._norm_roots()
        else:
            roots = self.backbone.frozen_modules() if self.freeze_stem else []
        return (m for root in roots for m in root.modules() if isinstance(m, _BatchNorm))


def check_image(image: Tensor) -> None:
    """InputError unless the image is ``[B, 3, H, W]``."""
    if image.dim() != 4 or image.shape[1] != 3:
        raise InputError(f"image must be [B, 3, H, W], got {list(image.shape)}")


def at_least_float32(maps: Tensor) -> Tensor:
    """Half-precision maps as float32, others as they are."""
    return maps if maps.element_size() >= 4 else maps.float()
