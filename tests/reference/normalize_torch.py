"""wsis.ops.normalize and wsis.ops.norms in plain torch: truth of tests, baseline of the benchmark.

Written as one would write it; ``max(dim)`` rather than ``amax`` where a gradient passes, because
the papers' code gives it to one position on ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from wsis.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-5  # added to every maximum; PSA, SEAM, IRN, AFA, ToCo, SIPE and RTC agree on it

Variant = Literal["psa", "seam", "irn", "afa", "toco", "sipe", "rtc"]
Background = Literal["constant", "power", "complement"]


def as_float(x: Tensor) -> Tensor:
    """``x`` itself when float32 or float64, else (half, bfloat16, integers) as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _extrema(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over the last two axes, kept as size 1.

    ``max(dim)`` and not ``amax``: on ties the gradient goes to one position, as in the papers'
    code, instead of being split.
    """
    flat = x.flatten(-2)
    low, high = flat.min(dim=-1).values, flat.max(dim=-1).values
    return low[..., None, None], high[..., None, None]


def max_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """Min-max normalisation of positive evidence, RTC's training norm (ChunyanWang1/RTC).

    ``M(p) = [ [p]+ - min - eps ]+ / (max - min + eps)``, minimum and maximum over the map after
    the ReLU. Differentiable; the gradient also flows through the minimum and the maximum.

    Args:
        x: ``[..., h, w]`` float, any range.
        eps: dead zone and guard of the division.

    Returns:
        ``[..., h, w]`` float in [0, 1).
    """
    positive = as_float(x).relu()
    low, high = _extrema(positive)
    return (positive - (low + eps)).relu() / (high - low + eps)


def seed_scores(cams: Tensor, eps: float = EPS) -> Tensor:
    """Seed of cross-representation refinement, with background (ChunyanWang1/RTC).

    ``a = [[A]+ - eps]+ / (max_hw [A]+ + eps)`` and ``a_0 = 1 - max_c a_c``.

    Args:
        cams: ``[B, K, h, w]`` float, raw class activation maps.
        eps: dead zone and guard of the division.

    Returns:
        ``[B, C, h, w]`` float in [0, 1], before the one-hot maximum.
    """
    positive = as_float(cams).relu()
    _, high = _extrema(positive)
    return add_background((positive - eps).relu() / (high + eps), "complement")


def one_hot_max(scores: Tensor) -> Tensor:
    """Keep background and, at each pixel, the largest foreground channel; zero elsewhere.

    Channels that tie for the largest value are all kept. A pure function: the input is not changed.

    Args:
        scores: ``[B, C, h, w]`` float, background in channel 0.

    Returns:
        ``[B, C, h, w]``, same dtype; the gradient passes where the value was kept.
    """
    foreground = scores[:, 1:]
    largest = foreground.detach() == foreground.detach().amax(dim=1, keepdim=True)
    return torch.cat([scores[:, :1], foreground * largest], dim=1)


def ctr_scores(refined: Tensor, background: float = 0.2, clamp: bool = False) -> Tensor:
    """Scores that rank the positions of cross-transform regularisation (ChunyanWang1/RTC).

    ``r = [R]+``; ``r < min + eps`` becomes 0; ``S = (r - min - eps) / (max - min + eps)`` per image
    and class; ``S_0`` is a constant. Empty positions thus get a small negative value and an
    all-zero map gets -1, unless ``clamp``.

    Args:
        refined: ``[B, C, h, w]`` float, refined CAM with background in channel 0 (not read).
        background: constant of channel 0, 0.2 in RTC's training.
        clamp: raise negative scores to 0.

    Returns:
        ``[B, C, h, w]`` float, at most 1.
    """
    scores = _shifted_min_max(as_float(refined)[:, 1:])
    scores = scores.clamp(min=0) if clamp else scores
    return add_background(scores, "constant", background)


def add_background(cams: Tensor, kind: Background = "constant", value: float = 0.2) -> Tensor:
    """Put a background channel before foreground scores.

    ``constant``: ``value``; ``power``: ``(1 - max_c)^value`` (PSA: 4, 16, 32; SEAM: 4, 6, 24);
    ``complement``: ``1 - max_c``, where ``value`` is not read.

    Args:
        cams: ``[..., K, H, W]`` float in [0, 1].
        kind: which of the three.
        value: the constant, or the exponent.

    Returns:
        ``[..., C, H, W]``, background in channel 0.

    Raises:
        InputError: unknown ``kind``.
    """
    if kind == "constant":
        background = torch.full_like(cams[..., :1, :, :], value)
    elif kind in ("power", "complement"):
        background = 1 - cams.amax(dim=-3, keepdim=True)
        background = background**value if kind == "power" else background
    else:
        raise InputError(f"background kind must be constant, power or complement, got {kind!r}")
    return torch.cat([background, cams], dim=-3)


def _shifted_min_max(x: Tensor) -> Tensor:
    positive = x.relu()
    low, high = _extrema(positive)
    kept = torch.where(positive < low + EPS, torch.zeros_like(positive), positive)
    return (kept - low - EPS) / (high - low + EPS)


def _over_max(x: Tensor) -> Tensor:
    positive = x.relu()
    return positive / (_extrema(positive)[1] + EPS)


def _over_range(x: Tensor) -> Tensor:
    shifted = x - _extrema(x)[0]
    return shifted / (_extrema(shifted)[1] + EPS)


@dataclass(frozen=True)
class _Rule:
    """How one method merges the maps of several passes and normalises their sum."""

    normalize: Callable[[Tensor], Tensor]
    relu_each: bool = False  # before the resize: evidence of one pass cannot cancel another's
    flip_max: bool = False  # maximum of plain and flipped pass, then ReLU, instead of their sum


_RULES = {
    "psa": _Rule(_over_max, relu_each=True),  # jiwoon-ahn/psa infer_cls.py
    "irn": _Rule(_over_max, relu_each=True),  # jiwoon-ahn/irn step/make_cam.py
    "sipe": _Rule(_over_max),  # chenqi1126/SIPE
    "seam": _Rule(_shifted_min_max),  # YudeWang/SEAM infer_SEAM.py; usr922/wseg (PPC) the same
    "rtc": _Rule(_shifted_min_max),  # ChunyanWang1/RTC, refined CAMs of the training images
    "afa": _Rule(_over_range, flip_max=True),  # rulixiang/afa utils/camutils.py
    "toco": _Rule(_over_range, flip_max=True),  # rulixiang/ToCo utils/camutils.py
}


def normalize_cams(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    *,
    variant: Variant,
    flips: Sequence[bool] | None = None,
    label: Tensor | None = None,
    crop: tuple[int, int] | None = None,
) -> Tensor:
    """Merge the class maps of several scales and flips into scores in [0, 1].

    Each map is un-flipped, resized to ``size`` (bilinear, align_corners=False) and multiplied by
    the label; the sum over passes is normalised per class:

    - ``psa``, ``irn``: ReLU of each pass, ``s / (max + 1e-5)``; ``sipe``: ReLU of the sum.
    - ``seam`` (PPC alike), ``rtc``: ``s = [sum]+``, values below ``min + 1e-5`` to 0, then
      ``(s - min - 1e-5) / (max - min + 1e-5)``: zeros end slightly below 0, empty maps at -1.
    - ``afa``, ``toco``: maximum of the plain and the flipped pass of a scale, ReLU, sum over
      scales, ``(s - min) / (max(s - min) + 1e-5)``.

    Args:
        maps: one ``[..., K, h, w]`` float per pass, foreground only, grids may differ.
        size: ``(H, W)`` to resize to.
        variant: whose rule.
        flips: which passes saw the mirrored image (their maps are mirrored back); none by default.
            ``afa`` and ``toco`` need the passes in pairs: plain, flipped, plain, flipped, ...
        label: ``[..., K]`` float, multi-hot; no masking by default.
        crop: ``(H, W)`` of the top left part kept after the resize and before the normalisation
            (IRN resizes to a multiple of 16 and cuts to the image).

    Returns:
        ``[..., K, H, W]`` float; 0 (``seam``, ``rtc``: -1) for classes without evidence.

    Raises:
        InputError: unknown variant, no map, ``flips`` of another length, or passes not in pairs.

    Example:
        >>> normalize_cams([torch.rand(20, 14, 14)], (224, 224), variant="psa").shape
        torch.Size([20, 224, 224])
    """
    if variant not in _RULES:
        raise InputError(f"CAM variant must be one of {', '.join(_RULES)}, got {variant!r}")
    rule = _RULES[variant]
    flips = [False] * len(maps) if flips is None else list(flips)
    if not maps or len(flips) != len(maps):
        raise InputError(f"need one flip flag per map, got {len(maps)} maps, {len(flips)} flags")
    if rule.flip_max and flips != [False, True] * (len(maps) // 2):
        raise InputError(
            f"{variant} needs passes in pairs (plain, flipped, ...), got flips={flips}"
        )

    return rule.normalize(merge_passes(maps, size, rule, flips, label, crop))


def merge_passes(maps, size, rule, flips, label=None, crop=None) -> Tensor:
    """What is normalised: the passes resized, merged, cut and masked."""
    resized = [
        _resize_pass(m.relu() if rule.relu_each else m, flip, size)
        for m, flip in zip(maps, flips, strict=True)
    ]
    if rule.flip_max:
        pairs = zip(resized[::2], resized[1::2], strict=True)
        resized = [torch.maximum(plain, flipped).relu() for plain, flipped in pairs]
    total = torch.stack(resized).sum(dim=0)
    if crop is not None:
        total = total[..., : crop[0], : crop[1]]
    return total if label is None else total * label.to(total)[..., None, None]


def _resize_pass(cams: Tensor, flip: bool, size: tuple[int, int]) -> Tensor:
    cams = as_float(cams)
    cams = cams.flip(-1) if flip else cams
    batched = cams.reshape(-1, 1, *cams.shape[-2:])
    out = F.interpolate(batched, size=size, mode="bilinear", align_corners=False)
    return out.reshape(*cams.shape[:-2], *size)
