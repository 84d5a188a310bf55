"""PAMR, PAR and VARM as the classes that other projects construct and call.

What is kept: names, order and defaults of the arguments, the attributes ``num_iter`` and
``dilations``, which input is resized to which, the gradient to the masks, and the buffers in the
state dict: checkpoints go both ways. What is better: any memory layout is accepted, half precision
is computed in float32 (flat regions are never NaN) and returned as it came, nothing of the size
``B * C * 48 * H * W`` is made, and there is no synchronisation with the device.

Sizes: ``B`` batch, ``C`` mask channels, ``H W`` image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from wsis.errors import InputError
from wsis.ops.local_affinity import refine

if TYPE_CHECKING:
    from torch import Tensor


class _Shifts(nn.Module):
    """Holds the one-hot ``kernel`` that the originals convolve with; here it is only stored.

    Loading takes a kernel of any kind, or none, so that checkpoints with and without it load under
    ``strict=True``.

    Args:
        own: weight of the pixel itself; None leaves out its row.
        other: weight of the neighbour.
    """

    kernel: Tensor

    def __init__(self, own: float | None = 0.0, other: float = 1.0) -> None:
        super().__init__()
        positions = [p for p in range(9) if p != 4 or own is None]
        kernel = torch.zeros(len(positions), 9)
        kernel[:, 4] = own or 0.0
        kernel[range(len(positions)), positions] = other
        self.register_buffer("kernel", kernel.view(-1, 1, 3, 3))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict[prefix + "kernel"] = self.kernel
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Refiner(_Shifts):
    """What PAR and VARM share."""

    kind: ClassVar[Literal["par", "varm"]]

    def __init__(self, dilations: Sequence[int], num_iter: int) -> None:
        super().__init__()
        self.dilations = dilations
        self.num_iter = num_iter

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        """Refines the masks: ``imgs [B, 3, H, W]``, ``masks [B, C, h, w] -> [B, C, H, W]``."""
        return _refine(self.kind, imgs, masks, self.num_iter, self.dilations)


class PAMR(nn.Module):
    """Pixel-adaptive mask refinement (visinf/1-stage-wseg models/mods/pamr.py).

    Args:
        num_iter: how often the masks are propagated.
        dilations: distances of the neighbours, pixels.

    Example:
        >>> pamr = PAMR(10, [1, 2, 4, 8, 12, 24])
        >>> pamr(torch.rand(1, 3, 32, 32), torch.rand(1, 2, 8, 8)).shape
        torch.Size([1, 2, 32, 32])
    """

    kind = "pamr"

    def __init__(self, num_iter: int = 1, dilations: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.num_iter = num_iter
        self.dilations = dilations
        self.aff_x = _Shifts(own=1.0, other=-1.0)
        self.aff_m = _Shifts()
        self.aff_std = _Shifts(own=None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + "kernel", None)  # of variants with one kernel
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Refines the mask.

        Args:
            x: ``[B, 3, H, W]`` float image; its scale does not matter.
            mask: ``[B, C, h, w]`` float, resized to the image (bilinear, align_corners=True).

        Returns:
            ``[B, C, H, W]`` of the mask's dtype, differentiable in the mask.

        Raises:
            InputError: shapes or dilations that do not fit.
        """
        return _refine("pamr", x, mask, self.num_iter, self.dilations)


class PAR(_Refiner):
    """Pixel-adaptive refinement (rulixiang/afa wetr/PAR.py, rulixiang/ToCo model/PAR.py).

    Args:
        dilations: distances of the neighbours, pixels.
        num_iter: how often the masks are propagated.
        resize: what is resized where sizes differ (bilinear, align_corners=True): ``masks`` to the
            images (AFA, ToCo, DuPL, SeCo, MoRe, RTC) or ``images`` to the masks (ExCEL, WeCLIP).

    Raises:
        InputError: ``resize`` is neither.

    Example:
        >>> par = PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])
        >>> par(torch.rand(1, 3, 32, 32), torch.rand(1, 2, 8, 8)).shape
        torch.Size([1, 2, 32, 32])
    """

    kind = "par"

    def __init__(
        self,
        dilations: Sequence[int],
        num_iter: int,
        resize: Literal["masks", "images"] = "masks",
    ) -> None:
        if resize not in ("masks", "images"):
            raise InputError(f"resize must be masks or images, got {resize!r}")
        super().__init__(dilations, num_iter)
        self.resize = resize

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        """Refines the masks.

        Args:
            imgs: ``[B, 3, H, W]`` float, 0 to 255 in the originals; the scale does not matter.
            masks: ``[B, C, h, w]`` float.

        Returns:
            ``[B, C, H, W]`` (``[B, C, h, w]`` with ``resize="images"``) of the masks' dtype,
            differentiable in the masks. A constant mask grows by 1.01 per iteration, as it does
            there.

        Raises:
            InputError: shapes or dilations that do not fit.
        """
        if self.resize == "images" and imgs.shape[-2:] != masks.shape[-2:]:
            imgs = F.interpolate(
                _at_least_float(imgs), masks.shape[-2:], mode="bilinear", align_corners=True
            )
        return super().forward(imgs, masks)


class VARM(_Refiner):
    """Variation-aware refinement (ChunyanWang1/RTC network/VARM.py).

    Args:
        dilations: distances of the neighbours, pixels.
        num_iter: how often the masks are propagated.

    Example:
        >>> varm = VARM(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])
        >>> varm(torch.rand(1, 3, 32, 32), torch.rand(1, 2, 8, 8)).shape
        torch.Size([1, 2, 32, 32])
    """

    kind = "varm"

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        """Refines the masks.

        Args:
            imgs: ``[B, 3, H, W]`` float in [0, 1]: the weights depend on the scale.
            masks: ``[B, C, h, w]`` float, resized to the images (bilinear, align_corners=True).

        Returns:
            ``[B, C, H, W]`` of the masks' dtype, differentiable in the masks. A constant mask
            shrinks by 0.99 per iteration, as it does there.

        Raises:
            InputError: shapes or dilations that do not fit.
        """
        return super().forward(imgs, masks)


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _refine(
    kind: Literal["pamr", "par", "varm"],
    image: Tensor,
    masks: Tensor,
    iterations: int,
    dilations: Sequence[int],
) -> Tensor:
    """Refines; as in the originals, one image serves all masks, and one set of masks all images."""
    batch, dtype = max(len(image), len(masks)), masks.dtype
    shared = len(image) == 1 and masks.ndim == 4 and batch > 1
    if len(masks) == 1 and masks.ndim == 4 and batch > 1:
        masks = masks.expand(batch, -1, -1, -1)
    if shared:  # the masks of all as so many masks of one
        masks = masks.flatten(0, 1)[None]
    refined = refine(image, masks, kind, iterations=iterations, dilations=tuple(dilations))
    if shared:
        refined = refined.unflatten(1, (batch, -1))[0]
    return refined.to(dtype) if dtype.is_floating_point else refined
