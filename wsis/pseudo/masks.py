"""Two-threshold pseudo masks from normalised class activation maps.

The whole batch at once, without a loop over images and without waiting for the device.

Sizes: ``B`` batch, ``K`` foreground classes, ``H W`` image, ``h w`` feature grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from wsis.errors import InputError
from wsis.ops.local_affinity import DILATIONS, ITERATIONS
from wsis.ops.local_affinity import refine as refine_masks
from wsis.ops.normalize import as_float, max_norm
from wsis.ops.pseudo_masks import pseudo_labels, pseudo_stack, pseudo_unit
from wsis.ops.resize import resize
from wsis.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

    from wsis.types import Maps

Refinement = Literal["varm", "par", "pamr", "none"]


@torch.no_grad()
def refined_or_cam_scores(maps: Maps, label: Tensor, size: tuple[int, int]) -> Tensor:
    """Foreground scores at image size that pseudo masks are cut from.

    ``q = resize(M(R) * y)`` without background, from the refined CAM R where the model has one,
    else from the CAM; ``M`` is the training norm, the resize bilinear with align_corners=True.

    Args:
        maps: output of the network for one view.
        label: ``[B, K]``, multi-hot.
        size: ``(H, W)`` of the image.

    Returns:
        ``[B, K, H, W] float32`` in [0, 1], zero for classes that are not in the image. No gradient.
    """
    cams = as_float(maps.cams if maps.refined is None else maps.refined[:, 1:])
    if cams.is_cuda:
        return _scores_of_all(cams, label, size)
    return _scores_of_present(cams, label, size)


def _scores_of_present(cams: Tensor, label: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalises and resizes the classes of each image only."""
    image, channel = label.nonzero(as_tuple=True)
    scores = cams.new_zeros(*label.shape, *size)
    scores[image, channel] = resize(max_norm(cams[image, channel].unsqueeze(1)), size).squeeze(1)
    return scores


def _scores_of_all(cams: Tensor, label: Tensor, size: tuple[int, int]) -> Tensor:
    """The same without asking the device which classes there are."""
    return resize(max_norm(cams).masked_fill(label[..., None, None] == 0, 0), size)


@torch.no_grad()
def make_pseudo_masks(
    cams_norm: Tensor,
    image01: Tensor,
    label: Tensor,
    valid_box: Tensor,
    *,
    high: float = 0.55,
    low: float = 0.20,
    relative: bool = False,
    refine: Refinement = "varm",
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
    down_scale: int = 2,
) -> Tensor:
    """Pixel labels where two background thresholds agree, after local refinement.

    For each threshold: put it before the present classes' scores as background, resize both to
    ``1 / down_scale``, softmax over these channels, refine, resize back, argmax. The classes of the
    high threshold are kept; its background becomes 255 unless the low threshold says background
    too; outside the valid box 255. Resizes are bilinear with align_corners=False.

    Defaults: ChunyanWang1/RTC (VARM, 0.55 / 0.20). rulixiang/afa uses PAR with 0.55 / 0.35,
    rulixiang/ToCo PAR with 0.7 / 0.25.

    Args:
        cams_norm: ``[B, K, H, W]`` float in [0, 1], foreground scores.
        image01: ``[B, 3, H, W]`` float in [0, 1], the same images before normalisation.
        label: ``[B, K]``, multi-hot, a class is present where it is not 0; others are not read.
        valid_box: ``[B, 4] int64``, the part that is not padding: y0, y1, x0, x1, half open.
        high: background score below which a class is not trusted.
        low: background score above which background is not trusted.
        relative: `high` and `low` are multiples of the image's mean score (at each pixel the
            largest score of its classes, averaged over the valid box), capped at 1. A maximum grows
            peaked while a network learns, and constants that fit early make masks vanish later.
        refine: local refinement, or ``none``.
        iterations: of the refinement.
        dilations: of the refinement, pixels at reduced size.
        down_scale: divisor of the size at which masks are refined.

    Returns:
        ``[B, H, W] int64``: 0 background, 1..K class ids, 255 undecided. No gradient.

    Raises:
        InputError: shapes or devices that do not fit each other, more than 254 classes, thresholds
            that descend or are no numbers, CAMs of present classes that are not finite (on CUDA,
            where looking would wait, NaN is background), or arguments of the refinement that it
            refuses.

    Example:
        >>> cams, image = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
        >>> label, box = torch.tensor([[0, 1, 0]]), torch.tensor([[0, 32, 0, 32]])
        >>> make_pseudo_masks(cams, image, label, box).shape
        torch.Size([1, 32, 32])
    """
    if cams_norm.ndim != 4:
        raise InputError(f"cams_norm must be [B, K, H, W], got {list(cams_norm.shape)}")
    batch, classes, height, width = cams_norm.shape
    expected = {
        "image01": (image01, [batch, 3, height, width]),
        "label": (label, [batch, classes]),
        "valid_box": (valid_box, [batch, 4]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise InputError(f"{name} must be {shape}, got {list(tensor.shape)}")
    if classes >= IGNORE:
        raise InputError(
            f"at most {IGNORE - 1} classes, as {IGNORE} means undecided, got {classes}"
        )
    if not -math.inf < low <= high < math.inf:
        raise InputError(
            f"low must not exceed high and both must be numbers, got low={low}, high={high}"
        )
    if not isinstance(down_scale, int) or down_scale < 1:
        raise InputError(f"down_scale must be 1 or more and an integer, got {down_scale}")
    for name, tensor in (("image01", image01), ("label", label), ("valid_box", valid_box)):
        if tensor.device != cams_norm.device:
            raise InputError(f"{name} must be on {cams_norm.device}, got {tensor.device}")
    if valid_box.is_floating_point():
        raise InputError(f"valid_box must be integers, got {valid_box.dtype}")
    if height * width == 0:
        return label.new_empty((batch, height, width), dtype=torch.int64)

    cams, present, box = as_float(cams_norm), label != 0, valid_box.long()
    reduced = (max(height // down_scale, 1), max(width // down_scale, 1))
    unit = pseudo_unit(cams, present, box) if relative else None
    if _may_look(cams):
        _check_finite(cams[present])
    stack, counts, ids = pseudo_stack(
        cams, present, reduced, high=high, low=low, unit=unit, room=_room(present)
    )
    if refine != "none":
        image = F.interpolate(
            as_float(image01).to(cams.dtype), reduced, mode="bilinear", align_corners=False
        )
        stack = refine_masks(
            image, stack, refine, iterations=iterations, dilations=dilations, counts=counts
        )
    return pseudo_labels(stack, counts, ids, box, (height, width), ignore_index=IGNORE)


def _check_finite(scores: Tensor) -> None:
    """Extremes take one pass and no memory; ``isfinite`` took thirty times as long."""
    if scores.numel() and not torch.stack(scores.aminmax()).isfinite().all():
        raise InputError("cams_norm must be finite, got NaN or infinity")


def _may_look(tensor: Tensor) -> bool:
    """Whether a value can be read without waiting for a device or breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _room(present: Tensor) -> int:
    """How many planes to keep for classes: for all where nobody may look."""
    if not _may_look(present):
        return present.shape[1]
    return int(present.sum(dim=1).max()) if present.numel() else 0
