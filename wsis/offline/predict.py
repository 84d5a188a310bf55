"""Multi-scale prediction of one image at its original size.

Every image is shown to the network at several sizes, each time together with its mirror image (one
forward of two). The rule by which the passes become one answer is that of the official inference
(ChunyanWang1/RTC, contrast_infer.py); `merge_passes` is that rule alone, without a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsis.data.inference import Scaling, Shown, make_views
from wsis.errors import InputError
from wsis.offline.fuse import check_fuse, fuse_logits
from wsis.types import Maps, Prediction

if TYPE_CHECKING:
    from PIL import Image

    from wsis.models.network import Network

SCALES = (0.5, 1.0, 1.5, 2.0)
"""Sizes of the passes relative to the image (ChunyanWang1/RTC)."""

BACKGROUND_SCORE = 0.17
"""Constant background score of the official evaluation, which its authors picked on VOC val."""


@dataclass(frozen=True)
class Pass:
    """What the network says of one image in one pass.

    Attributes:
        maps: the network's maps, every tensor without its batch axis.
        size: height and width of the network input.
        flipped: whether the network saw the mirror image.
    """

    maps: Maps
    size: tuple[int, int]
    flipped: bool


def predict(
    model: Network,
    image: Image.Image,
    *,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    background: float = BACKGROUND_SCORE,
    background_power: float | None = None,
    gate: bool = True,
    fuse: str = "mean",
    class_cut: float | None = None,
    base_long: int | None = None,
    crf: str = "none",
    label: np.ndarray | None = None,
    device: torch.device | str | None = None,
) -> Prediction:
    """Segment one image, without knowing its label unless it is given.

    Per pass: softmax over the C decoder channels, times the sigmoid of the image-level logit of
    each class (the gate), foreground channels resized to the image, mirrored back; then the mean.
    A segmentation network (`wsis.models.deeplab`) takes ``gate=False, fuse="logits",
    background_power=1``: the argmax over all its channels.

    Args:
        model: the network; ``model(x [B,3,h,w]) -> Maps`` with ``model.backbone.mean`` and ``std``.
        image: RGB image of any size.
        scales: sizes of the passes, relative to the image (or to `base_long`), each > 0.
        flip: also show the mirror image at every scale.
        background: constant background score in [0, 1].
        background_power: where given, the decoder's mean background probability to this power
            takes the constant's place (visinf/1-stage-wseg: 3).
        gate: multiply every class by its image-level probability.
        fuse: how the passes become one, a key of `wsis.offline.fuse.FUSES`; the default is RTC's
            rule above. Those that fuse logits give their softmax as scores and as the decoder's
            own background.
        class_cut: where given, classes whose image-level probability exceeds it in no pass are
            removed (visinf/1-stage-wseg: 0.1).
        base_long: long side, in pixels, to which the image is first resized, for networks trained
            at small crops; None keeps its size. The answer lies at the original size either way.
        crf: preset of a dense CRF that makes the mask from the background's and the foreground
            scores (`wsis.offline.crf`), or `none`; the scores stay as they are.
        label: ``[K]`` multi-hot image-level label, for masks of a training list: the other classes
            get no score. None is how results are made.
        device: where the passes run; by default where the network's parameters lie.

    Returns:
        The prediction at the image's own size, on the CPU.

    Raises:
        InputError: the image is not RGB, a scale is not positive, the scores are not finite, or
            there is no such preset or rule.
    """
    check_fuse(fuse, gate=gate)
    passes = run_passes(
        model, image, scales=scales, flip=flip, base_long=base_long, device=device, decode=True
    )
    return conclude(
        passes,
        image,
        background=background,
        background_power=background_power,
        gate=gate,
        fuse=fuse,
        class_cut=class_cut,
        crf=crf,
        label=label,
    )


def conclude(
    passes: Sequence[Pass],
    image: Image.Image,
    *,
    background: float = BACKGROUND_SCORE,
    background_power: float | None = None,
    gate: bool = True,
    fuse: str = "mean",
    class_cut: float | None = None,
    crf: str = "none",
    label: np.ndarray | None = None,
) -> Prediction:
    """What follows from the passes of one image; the arguments are those of `predict`.

    Raises:
        InputError: the scores are not finite, or there is no such preset or rule.
    """
    check_fuse(fuse, gate=gate)
    with torch.inference_mode():
        logits = [m for p in passes if (m := p.maps.logits) is not None]
        class_logits = [p.maps.class_logits for p in passes]
        layout: dict[str, Any] = {
            "pass_sizes": [p.size for p in passes],
            "flips": [p.flipped for p in passes],
            "size": (image.height, image.width),
        }
        if fuse == "mean":
            scores, class_probs, own_background = merge_passes(
                logits, class_logits, **layout, gate=gate
            )
        else:
            own_background, scores = fuse_logits(fuse, logits, **layout).tensor_split([1])
            own_background = own_background[0]
            class_probs = torch.stack(class_logits).float().sigmoid().mean(dim=0)
        if class_cut is not None:
            surest = torch.stack(class_logits).float().sigmoid().amax(dim=0)
            scores = scores * (surest > class_cut)[:, None, None]
        if not torch.isfinite(scores).all():
            raise InputError(
                "the network's scores are not finite: expected a trained network, got one whose "
                "weights or activations overflow; take an earlier checkpoint"
            )
        if label is not None:
            scores = scores * torch.tensor(label != 0, device=scores.device)[:, None, None]
        level: float | Tensor = background
        if background_power is not None:
            level = own_background**background_power
        if crf == "none":
            mask = predict_masks(scores, level)
        else:
            from wsis.offline.crf import crf_of_scores

            behind = torch.as_tensor(level, device=scores.device).expand(1, *scores.shape[1:])
            mask = crf_of_scores(np.asarray(image), torch.cat([behind, scores]), crf)
        return Prediction(scores.cpu(), mask.to("cpu", torch.uint8), class_probs.cpu())


def predict_masks(scores: Tensor, background: float | Tensor) -> Tensor:
    """Argmax of the background and the foreground scores; ties go to background.

    Args:
        scores: ``[..., K, H, W]`` foreground scores.
        background: the background's score, one for every pixel or ``[..., H, W]``.

    Returns:
        ``[..., H, W] uint8`` class ids 0..K.
    """
    best, index = scores.max(dim=-3)
    return torch.where(best > background, index + 1, 0).to(torch.uint8)


def merge_passes(
    logits: Sequence[Tensor],
    class_logits: Sequence[Tensor],
    *,
    pass_sizes: Sequence[tuple[int, int]],
    flips: Sequence[bool],
    size: tuple[int, int],
    gate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse the decoder outputs of all passes into scores at the image's size.

    ``mean over passes of unflip(resize(softmax(M up)_{1:} * sigmoid(o)))``, M enlarged to the pass
    size with align_corners=True, the product resized with align_corners=False.

    Args:
        logits: per pass ``[C, h, w]`` decoder output M.
        class_logits: per pass ``[K]`` image-level logits o.
        pass_sizes: per pass height and width of the network input.
        flips: per pass whether the network saw the mirror image.
        size: height and width of the image.
        gate: multiply by ``sigmoid(o)``.

    Returns:
        ``[K, H, W] float32`` scores in [0, 1], ``[K] float32`` mean class probabilities, and
        ``[H, W] float32`` mean background probability of the decoder.
    """
    device, classes = logits[0].device, len(class_logits[0])
    scores = torch.zeros(classes + 1, *size, device=device)
    class_probs = torch.zeros(classes, device=device)
    for m, o, pass_size, flipped in zip(logits, class_logits, pass_sizes, flips, strict=True):
        probs = enlarge(m, pass_size).softmax(dim=0)
        present = o.float().sigmoid()
        if gate:
            probs[1:] *= present[:, None, None]
        scores += to_image(probs, size, flipped)
        class_probs += present
    scores /= len(logits)
    return scores[1:], class_probs / len(logits), scores[0]


def run_passes(
    model: Network,
    image: Image.Image,
    *,
    scales: Sequence[float],
    flip: bool,
    base_long: int | None,
    device: torch.device | str | None,
    decode: bool,
) -> list[Pass]:
    """Show one image to the network at every scale, plain and (with `flip`) mirrored.

    Args:
        model: the network.
        image: RGB image.
        scales: relative sizes; a pass is ``int(side * scale)`` pixels, at least 1 (the rounding of
            ChunyanWang1/RTC), resized bicubically.
        flip: also the mirror image, in the same forward.
        base_long: long side before scaling, or None.
        device: where the passes run, or None for the network's own device.
        decode: run the decoder (a prediction); False runs refinement instead (seeds).

    Returns:
        ``len(scales) * (1 + flip)`` passes; a mirrored pass follows its plain one.

    Raises:
        InputError: the image is not RGB or a scale is not positive.
    """
    shown = make_views(image, scaling_of(model, scales, base_long))
    return show(model, shown, flip=flip, device=device, decode=decode)


def scaling_of(model: Network, scales: Sequence[float], base_long: int | None) -> Scaling:
    """How a network's images are made from pixels."""
    return Scaling(tuple(scales), model.backbone.mean, model.backbone.std, base_long)


def show(
    model: Network,
    shown: Shown,
    *,
    flip: bool,
    device: torch.device | str | None,
    decode: bool,
) -> list[Pass]:
    """The passes over views that are made already; the arguments are those of `run_passes`."""
    device = device_of(model) if device is None else device
    passes = []
    with torch.inference_mode(), _evaluating(model):
        for view in shown.views:
            view = view.to(device)
            views = torch.stack([view, view.flip(-1)]) if flip else view[None]
            maps = model(
                views.contiguous(memory_format=torch.channels_last),
                decode=decode,
                refine=not decode,
            )
            size = (view.shape[1], view.shape[2])
            passes += [Pass(_one(maps, k), size, flipped=k == 1) for k in range(len(views))]
    return passes


def device_of(model: Network) -> torch.device:
    """Where the network's parameters lie."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``[N, h, w]`` maps as the network does: bilinear, align_corners=True, float32."""
    return F.interpolate(maps[None].float(), size, mode="bilinear", align_corners=True)[0]


def to_image(maps: Tensor, size: tuple[int, int], flipped: bool) -> Tensor:
    """Resize ``[N, h, w]`` maps to the image (align_corners=False) and mirror them back."""
    maps = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    return maps.flip(-1) if flipped else maps


def _one(maps: Maps, index: int) -> Maps:
    """The maps of one image of the batch; features are not kept, nobody downstream reads them."""
    return Maps(
        cams=maps.cams[index],
        class_logits=maps.class_logits[index],
        features=maps.features[index, :0],
        refined=None if maps.refined is None else maps.refined[index],
        logits=None if maps.logits is None else maps.logits[index],
    )


@contextmanager
def _evaluating(model: Network) -> Iterator[None]:
    """Inference mode of every layer inside the block; afterwards the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
