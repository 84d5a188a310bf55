"""Dense energy losses and the Gated CRF loss as the classes that other projects call.

What is kept: names, order and meaning of the arguments, ``extra_repr``, the result of shape
``[1]``, and the gradient rule: the filter is taken for symmetric, the gate for a constant. What is
better: images may be on any device, all else stays on the segmentation's own, all classes are
filtered at once, no argument is changed (the originals unsqueeze or overwrite masks in place), and
no SWIG module has to be built. The callers' ``.cuda()`` around it does no harm.

Sizes: ``B`` batch, ``K`` classes, ``H W`` image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsis.errors import InputError
from wsis.ops.energy import dense_energy_loss
from wsis.ops.gated_crf import gated_crf_loss

# ImageNet's, from 0 to 255; the defaults of rulixiang/ToCo model/losses.py.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class _Energy(nn.Module):
    """What the plain and the gated loss share."""

    def __init__(
        self,
        weight: float,
        sigma_rgb: float | Sequence[float],
        sigma_xy: float,
        scale_factor: float,
        *,
        exact: bool = False,
        recompute_scale_factor: bool = False,
        guide_resize: Literal["nearest", "area"] = "nearest",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.sigma_rgb = sigma_rgb
        self.sigma_xy = sigma_xy
        self.scale_factor = scale_factor
        self.exact = exact
        self.recompute_scale_factor = recompute_scale_factor
        self.guide_resize = guide_resize

    def extra_repr(self) -> str:
        """As the originals print themselves."""
        return (
            f"sigma_rgb={self.sigma_rgb}, sigma_xy={self.sigma_xy}, weight={self.weight}, "
            f"scale_factor={self.scale_factor}"
        )

    def _loss(self, images: Tensor, segmentations: Tensor, ROIs: Tensor, **rest: Any) -> Tensor:
        loss = dense_energy_loss(
            segmentations,
            images.detach(),
            sigma=self.sigma_rgb,
            sigma_xy=self.sigma_xy,
            scale=self.scale_factor,
            roi=ROIs,
            exact=self.exact,
            recompute_scale=self.recompute_scale_factor,
            guide_resize=self.guide_resize,
            **rest,
        )
        return self.weight * loss.reshape(1)


class DenseCRFLoss(_Energy):
    """Dense CRF loss (meng-tang/rloss pytorch/pytorch-deeplab_v3_plus/DenseCRFLoss.py).

    ``weight * -<S, A S> / B`` with ``S = segmentations * ROIs``; see
    :func:`wsis.ops.dense_energy_loss`.

    Args:
        weight: factor of the loss; 2e-9 there.
        sigma_rgb: width in the units of the images, 15 there for 0 to 255; or one per channel.
        sigma_xy: width in pixels of the unscaled image, 100 there.
        scale_factor: everything is scaled by it first, 0.5 there.
        exact: the true gradient instead of the published one.
        recompute_scale_factor: as in ``F.interpolate``; matters for sizes that the scale does not
            divide.
        guide_resize: how images are scaled: ``nearest`` as published, or ``area``.

    Example:
        >>> layer = DenseCRFLoss(2e-9, 15.0, 100.0, 0.5)
        >>> images, roi = torch.randint(256, (1, 3, 32, 32)).float(), torch.ones(1, 32, 32)
        >>> layer(images, torch.rand(1, 4, 32, 32).softmax(dim=1), roi).shape
        torch.Size([1])
    """

    def forward(self, images: Tensor, segmentations: Tensor, ROIs: Tensor) -> Tensor:
        """The loss.

        Args:
            images: ``[B, c, H, W]`` uint8 or float, 0 to 255 in the originals, on any device.
            segmentations: ``[B, K, H, W]`` float, probabilities.
            ROIs: ``[B, H, W]``, 1 inside the valid crop, on any device.

        Returns:
            ``[1]`` on the device of the segmentations.

        Raises:
            InputError: shapes, sigmas or a scale that do not fit.
        """
        return self._loss(images, segmentations, ROIs)


class DenseEnergyLoss(_Energy):
    """Gated dense energy loss (zbf1991/RRM DenseEnergyLoss.py; ToCo, SeCo, MoRe model/losses.py).

    ``weight * -<S, G A S> / B`` with ``S = segmentations * ROIs`` and
    ``G = max(ROIs - max_k segmentations, 0)``, 1 where the label is 255; see
    :func:`wsis.ops.dense_energy_loss`.

    The images may be any map: for affinities from edges or features, give those as ``images`` and
    their width as ``sigma_rgb``, such as
    ``DenseEnergyLoss(1e-7, 0.1, 100, 0.5, guide_resize="area")(edges, segmentations, ...)`` with
    ``edges [B, 1, H, W]`` in [0, 1].

    Args:
        weight: factor of the loss; 1e-7 there, and the callers multiply it by 0.01 to 1.
        sigma_rgb: as for :class:`DenseCRFLoss`.
        sigma_xy: as for :class:`DenseCRFLoss`.
        scale_factor: as for :class:`DenseCRFLoss`.
        exact: as for :class:`DenseCRFLoss`; then the gate is differentiated too.
        recompute_scale_factor: True as in ToCo, SeCo, MoRe; RRM has False. They differ for sizes
            that the scale does not divide.
        guide_resize: as for :class:`DenseCRFLoss`.

    Example:
        >>> layer = DenseEnergyLoss(weight=1e-7, sigma_rgb=15, sigma_xy=100, scale_factor=0.5)
        >>> images, roi = torch.randint(256, (1, 3, 32, 32)).float(), torch.ones(1, 32, 32)
        >>> labels = torch.randint(4, (1, 1, 32, 32), dtype=torch.uint8)
        >>> layer(images, torch.rand(1, 4, 32, 32).softmax(dim=1), roi, labels).shape
        torch.Size([1])
    """

    def __init__(
        self,
        weight: float,
        sigma_rgb: float | Sequence[float],
        sigma_xy: float,
        scale_factor: float,
        *,
        exact: bool = False,
        recompute_scale_factor: bool = True,
        guide_resize: Literal["nearest", "area"] = "nearest",
    ) -> None:
        super().__init__(
            weight,
            sigma_rgb,
            sigma_xy,
            scale_factor,
            exact=exact,
            recompute_scale_factor=recompute_scale_factor,
            guide_resize=guide_resize,
        )

    def forward(
        self,
        images: Tensor,
        segmentations: Tensor,
        ROIs: Tensor,
        seg_label: Tensor,
    ) -> Tensor:
        """The loss.

        Args:
            images: ``[B, c, H, W]`` uint8 or float, 0 to 255 in the originals, on any device.
            segmentations: ``[B, K, H, W]`` float, probabilities.
            ROIs: ``[B, H, W]``, 1 inside the valid crop, on any device.
            seg_label: ``[B, 1, H, W]`` or ``[B, H, W]`` of any dtype, on any device; 255 where
                nothing is known.

        Returns:
            ``[1]`` on the device of the segmentations.

        Raises:
            InputError: shapes, sigmas or a scale that do not fit.
        """
        return self._loss(images, segmentations, ROIs, labels=seg_label, gated=True)


def get_energy_loss(
    img: Tensor,
    logit: Tensor,
    label: Tensor,
    img_box: Tensor | Iterable[Sequence[int]],
    loss_layer: Callable[..., Tensor],
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """The wrapper of rulixiang/ToCo model/losses.py: softmax, valid crop, image back to 0 to 255.

    Args:
        img: ``[B, 3, H, W]`` float, normalised with ``mean`` and ``std``.
        logit: ``[B, K, H, W]`` float.
        label: ``[B, H, W]``, 255 where nothing is known.
        img_box: ``[B, 4]``: first row, end row, first column, end column of the valid crop.
        loss_layer: a :class:`DenseEnergyLoss`, or what is called like one.
        mean: per channel, 0 to 255.
        std: per channel, 0 to 255.

    Returns:
        What the layer returns, ``[1]``, on the device of the logits.

    Raises:
        InputError: boxes that do not fit, or as the layer.

    Example:
        >>> layer = DenseEnergyLoss(1e-7, 15, 100, 0.5)
        >>> label = torch.zeros(1, 32, 32, dtype=torch.int64)
        >>> box = torch.tensor([[0, 32, 4, 28]])
        >>> get_energy_loss(torch.randn(1, 3, 32, 32), torch.randn(1, 4, 32, 32), label, box,
        ...                 layer).shape
        torch.Size([1])
    """
    probs = F.softmax(logit, dim=1)
    roi = _inside(img_box, probs)
    scale, shift = (torch.tensor(x, dtype=img.dtype)[:, None, None] for x in (std, mean))
    image = img * scale.to(img.device) + shift.to(img.device)
    return loss_layer(image, probs, roi, label.to(torch.uint8).unsqueeze(1)).to(logit.device)


def _inside(boxes: Tensor | Iterable[Sequence[int]], probs: Tensor) -> Tensor:
    """``[B, H, W]``: 1 inside the boxes."""
    if not isinstance(boxes, Tensor):
        boxes = torch.tensor([[int(side) for side in box] for box in boxes]).reshape(-1, 4)
    batch, _, height, width = probs.shape
    if list(boxes.shape) != [batch, 4]:
        raise InputError(f"img_box must be [B={batch}, 4], got {list(boxes.shape)}")
    top, bottom, left, right = boxes.to(probs.device).T[:, :, None, None]
    row = torch.arange(height, device=probs.device)[:, None]
    column = torch.arange(width, device=probs.device)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return inside.to(probs.dtype)


class ModelLossSemsegGatedCRF(nn.Module):
    """Gated CRF loss (LEONOB2014/GatedCRFLoss models/model_loss_semseg_gatedcrf.py).

    See :func:`wsis.ops.gated_crf_loss`. Nothing of the size ``B * K * (2 radius + 1)^2 * H * W`` is
    made. Not offered: ``out_kernels_vis``.

    Example:
        >>> layer = ModelLossSemsegGatedCRF()
        >>> kernels = [{"weight": 1, "xy": 6, "rgb": 0.1}]
        >>> probs, rgb = torch.rand(1, 4, 16, 16).softmax(dim=1), torch.rand(1, 3, 32, 32)
        >>> sorted(layer(probs, kernels, 5, {"rgb": rgb}, 32, 32))
        ['loss']
    """

    def forward(
        self,
        y_hat_softmax: Tensor,
        kernels_desc: Sequence[Mapping[str, float]],
        kernels_radius: int,
        sample: Mapping[str, Any],
        height_input: int,
        width_input: int,
        mask_src: Tensor | None = None,
        mask_dst: Tensor | None = None,
        compatibility: Tensor | None = None,
        custom_modality_downsamplers: Mapping[str, Callable[..., Tensor]] | None = None,
        out_kernels_vis: bool = False,
    ) -> dict[str, Tensor]:
        """The loss.

        Args:
            y_hat_softmax: ``[B, K, H, W]`` float, probabilities.
            kernels_desc: ``[{"weight": w, "xy": sigma, "rgb": sigma}, ...]``.
            kernels_radius: of the window, 1 to 32.
            sample: modalities by name, ``[B, c, height_input, width_input]``; others are not read.
            height_input: of the modalities, a multiple of ``H``.
            width_input: of the modalities, the same multiple of ``W``.
            mask_src: ``[B, 1, h, w]``, pixels that send; averaged down, then 0 where below 1.
            mask_dst: ``[B, 1, h, w]``, pixels that receive; the same.
            compatibility: ``[K, K]``; None is Potts.
            custom_modality_downsamplers: by modality (or ``mask``), called as
                ``adaptive_avg_pool2d`` is.
            out_kernels_vis: must be False.

        Returns:
            ``{"loss": scalar}``.

        Raises:
            InputError: sizes, kernels or masks that do not fit, or ``out_kernels_vis``.
        """
        if out_kernels_vis:
            raise InputError("out_kernels_vis must be False, got True: kernels are never stored")
        height, width = y_hat_softmax.shape[-2:]
        if (
            0 in (height, width)
            or height_input % height
            or width_input % width
            or width_input * height != height_input * width
        ):
            raise InputError(
                "height_input and width_input must be one multiple of the prediction's "
                f"{[height, width]}, got {[height_input, width_input]}"
            )
        shrink = dict(custom_modality_downsamplers or {})

        def sized(name: str, maps: Tensor) -> Tensor:
            return shrink.get(name, F.adaptive_avg_pool2d)(maps, (height, width))

        used = {name for kernel in kernels_desc for name in kernel} - {"weight", "xy"}
        modalities = {name: sized(name, sample[name]) for name in used & set(sample)}
        masks = {"mask_src": mask_src, "mask_dst": mask_dst}
        for name, mask in masks.items():
            if mask is not None and list(mask.shape[-2:]) != [height, width]:
                masks[name] = sized("mask", mask)
        loss = gated_crf_loss(
            y_hat_softmax,
            modalities,
            kernels_desc,
            kernels_radius,
            compatibility=compatibility,
            **masks,
        )
        return {"loss": loss}
