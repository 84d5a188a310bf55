"""Two-threshold pseudo masks, image by image with plain torch: the slow truth.

The formulas are those of :func:`wsis.pseudo.make_pseudo_masks`; the refinement is the one of
``local_affinity_shifted``, and nothing here is native.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tests.reference import local_affinity_shifted

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor


def stacks(scores: Tensor, reduced: tuple[int, int], high: float, low: float) -> Tensor:
    """Scores ``[P, H, W]`` of the present classes -> ``[1, 2 (P + 1), h, w]``."""
    foreground = resize(scores[None], reduced)
    halves = []
    for value in (high, low):
        background = torch.full_like(foreground[:, :1], min(float(value), 1.0))
        halves.append(torch.cat([background, foreground], dim=1).softmax(dim=1))
    return torch.cat(halves, dim=1)


def decide(stack: Tensor, present: Tensor, size: tuple[int, int]) -> Tensor:
    """Stack ``[1, 2 (P + 1), h, w]`` and present classes ``[P]`` -> labels ``[H, W]``."""
    ids = torch.cat([present.new_zeros(1), present + 1])
    # max().indices: on the CPU ten times as fast as argmax over this axis
    at_high, at_low = (ids[half.max(dim=0).indices] for half in resize(stack, size)[0].chunk(2))
    return at_high.masked_fill((at_high == 0) & (at_low != 0), 255)


def lead(stack: Tensor, size: tuple[int, int]) -> Tensor:
    """By how much the best plane leads in the closer half; where it is small, rounding decides."""
    halves = resize(stack, size)[0].chunk(2)
    best = [half.topk(2, dim=0).values for half in halves]
    return torch.minimum(*(values[0] - values[1] for values in best))


@torch.no_grad()
def make_pseudo_masks(
    cams: Tensor,
    image: Tensor,
    label: Tensor,
    valid_box: Tensor,
    *,
    high: float = 0.55,
    low: float = 0.20,
    relative: bool = False,
    refine: str = "varm",
    iterations: int = 10,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    down_scale: int = 2,
    leads: Tensor | None = None,
    affinity: ModuleType = local_affinity_shifted,
) -> Tensor:
    """Masks ``[B, H, W] int64``; arguments as of the operator, and two more.

    ``leads [B, H, W]`` is filled with :func:`lead`, infinity where there is nothing to decide.
    ``affinity`` has the functions ``local_affinity`` and ``propagate``.
    """
    size = tuple(cams.shape[-2:])
    reduced = (max(size[0] // down_scale, 1), max(size[1] // down_scale, 1))
    if refine != "none":
        weights = affinity.local_affinity(resize(image.to(cams.dtype), reduced), refine, dilations)
    masks = torch.full((len(cams), *size), 255, dtype=torch.int64)
    if leads is not None:
        leads.fill_(torch.inf)
    for b, (y0, y1, x0, x1) in enumerate(valid_box.tolist()):
        present = label[b].nonzero().flatten()
        if present.numel() == 0:
            masks[b, y0:y1, x0:x1] = 0
            continue
        scores = cams[b, present]
        unit = scores[:, y0:y1, x0:x1].amax(dim=0).mean() if relative else 1.0
        stack = stacks(scores, reduced, high * unit, low * unit)
        if refine != "none":
            stack = affinity.propagate(stack, weights[b : b + 1], dilations, iterations)
        inside = b, slice(y0, y1), slice(x0, x1)
        masks[inside] = decide(stack, present, size)[inside[1:]]
        if leads is not None:
            leads[inside] = lead(stack, size)[inside[1:]]
    return masks


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
