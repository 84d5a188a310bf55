"""One training step: from a batch to named losses. The only place where the method's rooms meet."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from wsis.config import PseudoConfig
from wsis.data.views import second_view
from wsis.global_batch import gather, place
from wsis.losses.equivariance import ClassCounts, classes_of_batch, take_channels
from wsis.losses.rtc import RtcWeights, rtc_losses
from wsis.losses.supervised import pixel_losses, supervised_losses
from wsis.models.network import Network
from wsis.pseudo.masks import make_pseudo_masks, refined_or_cam_scores
from wsis.types import Batch, Maps


class Siamese(nn.Module):
    """Both views through shared weights, in one forward, as data-parallel wrappers need it."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, image: Tensor, view2: Tensor, decode: bool, classes: Tensor | None = None
    ) -> tuple[Maps, Maps]:
        """Maps of `image [B, 3, H, W]` (decoded if asked) and of `view2 [B, 3, s, s]`.

        Of all classes, or of `classes [M]` only.
        """
        first = self.model(image, decode=decode, classes=classes)
        return first, self.model(view2, decode=False, classes=classes)


class Supervised(nn.Module):
    """One view, for networks that learn from masks."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Maps:
        """Maps of `image [B, 3, H, W]`, decoded."""
        return self.model(image)


def weak_losses(
    siamese: nn.Module,
    model: Network,
    batch: Batch,
    *,
    view2_size: int,
    view2_flip: bool = False,
    weights: RtcWeights,
    pseudo: PseudoConfig,
    segment: bool,
    counts: ClassCounts | None = None,
) -> dict[str, Tensor]:
    """Losses of the method from image-level labels alone.

    Args:
        siamese: `Siamese(model)`, possibly wrapped for data-parallel training.
        model: the network inside it (for its mean and std).
        batch: images and labels; its masks, if any, are not read.
        view2_size: side of the second view.
        view2_flip: whether the second view is mirrored.
        weights: the method's terms and switches.
        pseudo: rule of the online pseudo masks.
        segment: whether the decoder learns yet.
        counts: of the batch's labels; with them nothing in here waits for a GPU.

    Returns:
        Named scalars with `total`.
    """
    height, width = batch.image.shape[-2:]
    view2 = second_view(batch.image, view2_size, flip=view2_flip)
    classes = None
    if weights.classification == "single":
        # With many classes, maps are made for those that some image of the whole batch has.
        count = None if counts is None or place()[1] > 1 else counts.batch
        classes = classes_of_batch(gather(batch.label), count)
    first, second = siamese(batch.image, view2, segment, classes)
    if view2_flip:
        second = mirrored(second)
    masks = None
    if segment and classes is not None:
        masks = object_masks(model, batch, first, classes, pseudo)
    elif segment:
        masks = pseudo_masks(model, batch, first, pseudo)
    return rtc_losses(
        first,
        second,
        batch.label,
        image_size=(height, width),
        view2_size=view2_size,
        weights=weights,
        pseudo_masks=masks,
        counts=counts,
        classes=classes,
    )


def mirrored(maps: Maps) -> Maps:
    """The maps of a mirrored view, mirrored back."""
    refined = None if maps.refined is None else maps.refined.flip(-1)
    return replace(maps, cams=maps.cams.flip(-1), features=maps.features.flip(-1), refined=refined)


@torch.no_grad()
def pseudo_masks(model: Network, batch: Batch, maps: Maps, pseudo: PseudoConfig) -> Tensor:
    """Online pseudo masks `[B, H, W] int64` (0..K, 255) of view 1."""
    like = (batch.image.dtype, batch.image.device)
    height, width = batch.image.shape[-2:]
    mean = _per_channel(tuple(model.backbone.mean), *like)
    std = _per_channel(tuple(model.backbone.std), *like)
    return make_pseudo_masks(
        refined_or_cam_scores(maps, batch.label, (height, width)),
        batch.image * std + mean,
        batch.label,
        batch.valid_box,
        **pseudo.arguments(),
    )


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[1, C, 1, 1]``, made once: to send it in each step would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def object_masks(
    model: Network, batch: Batch, maps: Maps, classes: Tensor, pseudo: PseudoConfig
) -> Tensor:
    """Online pseudo masks `[B, H, W] int64` of the labelled class: 0, 1, or 255.

    Args:
        model: the network.
        batch: images with one label each.
        maps: of view 1, of `classes` only.
        classes: `[M] int64`, all labels of the batch among them.
        pseudo: rule of the online pseudo masks.
    """
    channel = batch.label[:, classes].argmax(dim=1)[:, None]
    refined = None
    if maps.refined is not None:
        behind = torch.cat([torch.zeros_like(channel), channel + 1], dim=1)
        refined = take_channels(maps.refined, behind)
    own = replace(maps, cams=take_channels(maps.cams, channel), refined=refined)
    return pseudo_masks(
        model, replace(batch, label=batch.label.new_ones(channel.shape)), own, pseudo
    )


def mask_losses(supervised: nn.Module, batch: Batch, *, classify: bool) -> dict[str, Tensor]:
    """Losses of a network that learns from masks.

    Args:
        supervised: `Supervised(model)`, possibly wrapped for data-parallel training.
        batch: images and masks; labels are read with `classify` only.
        classify: with the image-level loss, for the fully supervised twin.

    Returns:
        Named scalars with `total`.
    """
    assert batch.mask is not None
    maps = supervised(batch.image)
    if not classify:
        return pixel_losses(maps, batch.mask)
    return supervised_losses(maps, batch.label, batch.mask)
