"""How the passes of other repositories' inference become one answer.

`wsis.offline.predict.merge_passes` is the rule of RTC; here are those of 1-stage-wseg, ToCo, AFA
and of segmentation networks. All take decoder logits with background at channel 0 and give
probabilities at the image's size. One pass at a time is enlarged, beside at most two maps that are
carried along: memory does not grow with the number of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsis.errors import InputError

FUSES: dict[str, str] = {
    "mean": "mean of the softmax of logits enlarged to the pass (ChunyanWang1/RTC)",
    "logits": "softmax of the mean of logits, enlarged with align_corners=True (RTC segmentation/)",
    "softmax-mean": "mean of the softmax on the decoder's grid (visinf/1-stage-wseg)",
    "flip-sum-max": "logits: sum with the mirror image, maximum over scales (rulixiang/ToCo, VOC)",
    "flip-max-sum": "logits: maximum with the mirror image, sum over scales (rulixiang/ToCo, COCO)",
    "flip-mean-max": "logits: mean with the mirror image, maximum over scales on the grid of the "
    "first scale (rulixiang/afa)",
}
"""Rules by name, with what they do and whose they are."""


def check_fuse(name: str, *, gate: bool = False) -> str:
    """The name; InputError where there is no such rule, or where the gate does not go with it."""
    if name not in FUSES:
        raise InputError(f"unknown fuse rule '{name}', expected one of {', '.join(FUSES)}")
    if gate and name != "mean":
        raise InputError(
            f"predict.gate: the class gate goes with fuse 'mean', got '{name}'; set it to false"
        )
    return name


def fuse_logits(
    rule: str,
    logits: Sequence[Tensor],
    *,
    pass_sizes: Sequence[tuple[int, int]],
    flips: Sequence[bool],
    size: tuple[int, int],
) -> Tensor:
    """Probabilities at the image's size from the decoder logits of all passes.

    Args:
        rule: a key of `FUSES` other than ``mean``.
        logits: per pass ``[C, h, w]``; a mirrored pass follows its plain one.
        pass_sizes: per pass height and width of the network input.
        flips: per pass whether the network saw the mirror image.
        size: height and width of the image.

    Returns:
        ``[C, H, W] float32``, background first: the softmax of the fused logits, or the mean of
        the passes' softmax.

    Raises:
        InputError: no such rule.
    """
    if check_fuse(rule) == "mean":
        raise InputError("fuse 'mean' is wsis.offline.predict.merge_passes")
    if rule == "logits":
        total = torch.zeros(())
        for m, pass_size, flipped in zip(logits, pass_sizes, flips, strict=True):
            at_pass = _resize(m.float(), pass_size, align_corners=True)
            at_image = _resize(at_pass, size, align_corners=True)
            total = total.to(m.device) + _upright(at_image, flipped)
        return (total / len(logits)).softmax(dim=0)
    if rule == "softmax-mean":
        masks = (
            _resize(m.float().softmax(dim=0), pass_size, align_corners=True)
            for m, pass_size in zip(logits, pass_sizes, strict=True)
        )
        return mean_at_image(masks, flips, size)
    if rule == "flip-mean-max":
        grid = (int(logits[0].shape[1]), int(logits[0].shape[2]))
        fused = _by_scale(logits, flips, grid, _mean, torch.maximum)
        return _resize(fused, size).softmax(dim=0)
    both: tuple[_Join, _Join] = (torch.add, torch.maximum)
    with_mirror, over_scales = both if rule == "flip-sum-max" else both[::-1]
    return _by_scale(logits, flips, size, with_mirror, over_scales).softmax(dim=0)


def mean_at_image(
    masks: Sequence[Tensor] | Iterator[Tensor], flips: Sequence[bool], size: tuple[int, int]
) -> Tensor:
    """Mean over passes of ``[C, h, w]`` masks, resized (align_corners=False) and mirrored back."""
    total = torch.zeros(())
    for mask, flipped in zip(masks, flips, strict=True):
        total = total.to(mask.device) + _upright(_resize(mask, size), flipped)
    return total / len(flips)


_Join = Callable[[Tensor, Tensor], Tensor]


def _mean(plain: Tensor, mirrored: Tensor) -> Tensor:
    return (plain + mirrored) / 2


def _by_scale(
    logits: Sequence[Tensor],
    flips: Sequence[bool],
    size: tuple[int, int],
    with_mirror: _Join,
    over_scales: _Join,
) -> Tensor:
    """Join each pass with its mirrored one at `size`, then the scales."""
    fused: Tensor | None = None
    scale: Tensor | None = None
    for index, (m, flipped) in enumerate(zip(logits, flips, strict=True)):
        here = _upright(_resize(m.float(), size), flipped)
        scale = here if scale is None else with_mirror(scale, here)
        if index + 1 == len(flips) or not flips[index + 1]:  # the next pass is another scale
            fused = scale if fused is None else over_scales(fused, scale)
            scale = None
    assert fused is not None
    return fused


def _upright(maps: Tensor, flipped: bool) -> Tensor:
    return maps.flip(-1) if flipped else maps


def _resize(maps: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=align_corners)[0]
