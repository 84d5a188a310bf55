"""Two-threshold pseudo masks from normalised class activation maps.

Sizes: ``B`` batch, ``K`` foreground classes, ``H W`` image, ``h w`` feature grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from wsis.errors import InputError
from wsis.ops.local_affinity import DILATIONS, ITERATIONS, local_affinity, propagate
from wsis.ops.normalize import as_float, max_norm
from wsis.types import BACKGROUND, IGNORE

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
    cams = maps.cams if maps.refined is None else maps.refined[:, 1:]
    image, channel = label.nonzero(as_tuple=True)
    present = max_norm(as_float(cams)[image, channel].unsqueeze(1))
    scores = present.new_zeros(*label.shape, *size)
    scores[image, channel] = F.interpolate(
        present, size, mode="bilinear", align_corners=True
    ).squeeze(1)
    return scores


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
        label: ``[B, K]``, multi-hot; only classes of the image are read.
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
        InputError: shapes that do not fit each other, or ``low > high``.

    Example:
        >>> cams, image = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
        >>> label, box = torch.tensor([[0, 1, 0]]), torch.tensor([[0, 32, 0, 32]])
        >>> make_pseudo_masks(cams, image, label, box).shape
        torch.Size([1, 32, 32])
    """
    batch, classes, height, width = cams_norm.shape
    expected = {
        "image01": (image01, [batch, 3, height, width]),
        "label": (label, [batch, classes]),
        "valid_box": (valid_box, [batch, 4]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise InputError(f"{name} must be {shape}, got {list(tensor.shape)}")
    if low > high:
        raise InputError(f"the low threshold must not exceed the high one, got {low} > {high}")

    size = (height, width)
    reduced = (max(height // down_scale, 1), max(width // down_scale, 1))
    weights = None
    if refine != "none":
        weights = local_affinity(_resize(as_float(image01), reduced), refine, dilations)

    masks = torch.full((batch, *size), IGNORE, dtype=torch.int64, device=cams_norm.device)
    for b, (y0, y1, x0, x1) in enumerate(valid_box.tolist()):
        present = label[b].nonzero().flatten()
        if present.numel() == 0:
            masks[b, y0:y1, x0:x1] = BACKGROUND
            continue
        scores = as_float(cams_norm[b : b + 1, present])
        unit = scores[..., y0:y1, x0:x1].amax(dim=1).mean() if relative else 1.0
        foreground = _resize(scores, reduced)
        stacks = torch.cat(
            [_with_background(foreground, min(value * unit, 1.0)) for value in (high, low)], dim=1
        )
        if weights is not None:
            stacks = propagate(stacks, weights[b : b + 1], dilations, iterations)
        ids = torch.cat([present.new_tensor([BACKGROUND]), present + 1])
        # max().indices: on the CPU ten times as fast as argmax over this axis
        at_high, at_low = (
            ids[stack[0].max(dim=0).indices] for stack in _resize(stacks, size).chunk(2, dim=1)
        )
        undecided = (at_high == BACKGROUND) & (at_low != BACKGROUND)
        decided = at_high.masked_fill(undecided, IGNORE)
        masks[b, y0:y1, x0:x1] = decided[y0:y1, x0:x1]
    return masks


def _with_background(foreground: Tensor, value: float) -> Tensor:
    """``[1, P, h, w]`` -> softmax over background constant and classes, ``[1, P + 1, h, w]``."""
    background = torch.full_like(foreground[:, :1], float(value))
    return torch.cat([background, foreground], dim=1).softmax(dim=1)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
