"""Raw class activation maps to scores in [0, 1], the way each method of the field does it.

Sizes: ``B`` batch, ``K`` foreground classes, ``C = K + 1`` with background at 0, ``h w`` grid of a
map, ``H W`` size of the scores. All functions compute in float32 for half inputs and keep float32
and float64 as they are. The norms of the losses are in `wsis.ops.norms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch

from wsis.errors import InputError
from wsis.ops._normalize import MOST_PASSES, MOST_SIDE, RULES, Background, Variant
from wsis.ops.norms import EPS, as_float, ctr_scores, max_norm, one_hot_max, seed_scores
from wsis.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "EPS", "Background", "Variant", "add_background", "as_float", "cams_to_labels", "ctr_scores",
    "max_norm", "normalize_cams", "one_hot_max", "seed_scores",
]  # fmt: skip


def normalize_cams(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    *,
    variant: Variant,
    flips: Sequence[bool] | None = None,
    label: Tensor | None = None,
    crop: tuple[int, int] | None = None,
    background: Background | None = None,
    background_value: float = 0.2,
) -> Tensor:
    """Merge the class maps of several scales and flips into scores in [0, 1].

    Each map is un-flipped, resized to ``size`` (bilinear, align_corners=False) and multiplied by
    the label; the sum over passes is normalised per class:

    - ``psa``, ``irn``: ReLU of each pass, ``s / (max + 1e-5)``; ``sipe``: ReLU of the sum.
    - ``seam`` (PPC alike), ``rtc``: ``s = [sum]+``, values below ``min + 1e-5`` to 0, then
      ``(s - min - 1e-5) / (max - min + 1e-5)``: zeros end slightly below 0, empty maps at -1.
    - ``afa``, ``toco``: maximum of the plain and the flipped pass of a scale, ReLU, sum over
      scales, ``(s - min) / (max - min + 1e-5)``.

    The maps are read twice and the scores written once; classes of label 0 are only filled in. No
    gradient. The result does not depend on the number of threads.

    Args:
        maps: one ``[..., K, h, w]`` float per pass, foreground only, grids may differ; at most 64.
        size: ``(H, W)`` to resize to.
        variant: whose rule.
        flips: which passes saw the mirrored image (their maps are mirrored back); none by default.
            ``afa`` and ``toco`` need the passes in pairs: plain, flipped, plain, flipped, ...
        label: ``[..., K]`` or ``[K]``, 0 or 1; no masking by default. Not looked at on CUDA, where
            other values weigh the maps.
        crop: ``(H, W)`` of the top left part kept after the resize and before the normalisation
            (IRN resizes to a multiple of 16 and cuts to the image).
        background: put a background channel before the classes, as :func:`add_background` does.
        background_value: its constant or exponent.

    Returns:
        ``[..., K, H, W]`` float, or ``[..., C, H, W]`` with background; 0 (``seam``, ``rtc``: -1)
        for classes without evidence.

    Raises:
        InputError: unknown variant or background, no map or too many, maps that do not fit each
            other or require grad, ``flips`` of another length or not in pairs, a label or crop that
            does not fit, or a value that is not finite (of either sign) in a class of the label
            (on CUDA, where looking would mean waiting, the scores of that class are NaN instead).

    Example:
        >>> normalize_cams([torch.rand(20, 14, 14)], (224, 224), variant="psa").shape
        torch.Size([20, 224, 224])
    """
    if variant not in RULES:
        raise InputError(f"CAM variant must be one of {', '.join(RULES)}, got {variant!r}")
    _check_background(background)
    maps = [as_float(m) for m in maps]
    flips = [False] * len(maps) if flips is None else [bool(flip) for flip in flips]
    if not maps or len(flips) != len(maps):
        raise InputError(f"need one flip flag per map, got {len(maps)} maps, {len(flips)} flags")
    if RULES[variant].flip_max and flips != [False, True] * (len(maps) // 2):
        raise InputError(
            f"{variant} needs passes in pairs (plain, flipped, ...), got flips={flips}"
        )
    _check_maps(maps)
    full = _check_size("size", size, MOST_SIDE, MOST_SIDE)
    kept = full if crop is None else _check_size("crop", crop, *full)
    leading = maps[0].shape[:-2]
    if label is not None:
        if label.shape not in (leading, leading[-1:]):
            raise InputError(f"label must be {list(leading)}, got {list(label.shape)}")
        _check_device("label", label, maps[0])
        label = label.to(maps[0]).expand(leading).reshape(-1, leading[-1])
    # numel() and not -1, which would be ambiguous for an empty batch
    batch = leading[:-1].numel()
    scores = torch.ops.wsis.normalize_cams(
        [m.reshape(batch, *m.shape[-3:]) for m in maps],
        *(flips, label, full, kept, variant, background, background_value),
    )
    return scores.reshape(*leading[:-1], *scores.shape[1:])


def cams_to_labels(
    cams: Tensor,
    label: Tensor | None = None,
    *,
    low: float,
    high: float | None = None,
    valid_box: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Scores to a label map by one threshold or two.

    The best of ``cams * label`` decides (the lowest class wins a tie): background where it is at
    most ``low``, ``ignore_index`` where it is above ``low`` and at most ``high``, else the class.
    NaN never wins.

    Thresholds: rulixiang/afa ``low=0.45`` alone, or ``low=0.35, high=0.55``; rulixiang/ToCo
    ``low=0.5``, or ``low=0.25, high=0.7``; jiwoon-ahn/irn 0.15, or 0.05 and 0.30.

    Args:
        cams: ``[K, H, W]`` or ``[B, K, H, W]`` float in [0, 1], from :func:`normalize_cams`.
        label: ``[K]`` or ``[B, K]``, 0 or 1; no masking by default. Not looked at on CUDA.
        low: best score up to which a pixel is background.
        high: best score up to which it is undecided; ``low`` by default, so that none is.
        valid_box: ``[4]`` or ``[B, 4]`` integers, the part that is not padding: y0, y1, x0, x1,
            half open. All outside is ``ignore_index``.
        ignore_index: value of pixels without a label.

    Returns:
        ``[H, W]`` or ``[B, H, W]`` int64: 0 background, 1..K class ids, or ``ignore_index``. No
        gradient.

    Raises:
        InputError: shapes that do not fit each other, a label that is neither 0 nor 1, or
            ``low > high``.

    Example:
        >>> cams_to_labels(torch.tensor([[[0.1, 0.5, 0.9]]]), low=0.3, high=0.6)
        tensor([[  0, 255,   1]])
    """
    if cams.ndim not in (3, 4) or 0 in cams.shape[-3:]:
        raise InputError(f"cams must be [K, H, W] or [B, K, H, W], got {list(cams.shape)}")
    high = low if high is None else high
    if not low <= high:
        raise InputError(f"the low threshold must not exceed the high one, got {low} > {high}")
    cams, leading = as_float(cams.detach()), cams.shape[:-3]
    stack = cams.reshape(-1, *cams.shape[-3:]) if leading else cams[None]
    if label is not None:
        if label.shape not in (cams.shape[:-2], cams.shape[-3:-2]):
            raise InputError(f"label must be {list(cams.shape[:-2])}, got {list(label.shape)}")
        _check_device("label", label, cams)
        label = label.to(cams).expand(stack.shape[:2])
    if valid_box is not None:
        if valid_box.shape != (*leading, 4) or valid_box.is_floating_point():
            raise InputError(
                f"valid_box must be {[*leading, 4]} integers, got {list(valid_box.shape)} "
                f"{str(valid_box.dtype).removeprefix('torch.')}"
            )
        _check_device("valid_box", valid_box, cams)
        valid_box = valid_box.reshape(-1, 4).long()
    labels = torch.ops.wsis.cams_to_labels(stack, label, valid_box, low, high, ignore_index)
    return labels.reshape(*leading, *cams.shape[-2:])


def add_background(cams: Tensor, kind: Background = "constant", value: float = 0.2) -> Tensor:
    """Put a background channel before foreground scores.

    ``constant``: ``value``; ``power``: ``(1 - max_c)^value`` (PSA: 4, 16, 32; SEAM: 4, 6, 24);
    ``complement``: ``1 - max_c``, where ``value`` is not read. Differentiable.

    Args:
        cams: ``[..., K, H, W]`` float in [0, 1].
        kind: which of the three.
        value: the constant, or the exponent.

    Returns:
        ``[..., C, H, W]``, background in channel 0.

    Raises:
        InputError: unknown ``kind``.

    Example:
        >>> add_background(torch.full((1, 1, 1), 0.25), "complement").flatten()
        tensor([0.7500, 0.2500])
    """
    _check_background(kind)
    if kind == "constant":
        background = torch.full_like(cams[..., :1, :, :], value)
    else:
        background = 1 - cams.amax(dim=-3, keepdim=True)
        background = background**value if kind == "power" else background
    return torch.cat([background, cams], dim=-3)


# ---- checks ------------------------------------------------------------------------------------


def _check_background(kind: str | None) -> None:
    if kind is not None and kind not in get_args(Background):
        raise InputError(f"background kind must be constant, power or complement, got {kind!r}")


def _check_maps(maps: list[Tensor]) -> None:
    if len(maps) > MOST_PASSES:
        raise InputError(f"there must be at most {MOST_PASSES} maps, got {len(maps)}")
    first = maps[0]
    for i, m in enumerate(maps):
        if m.ndim < 3 or 0 in m.shape[-3:] or max(m.shape[-2:]) > MOST_SIDE:
            raise InputError(
                f"maps must be [..., K, h, w] with 1 <= h, w <= {MOST_SIDE}, got {list(m.shape)} "
                f"for map {i}"
            )
        if m.shape[:-2] != first.shape[:-2] or m.dtype != first.dtype or m.device != first.device:
            raise InputError(
                f"maps must agree in all but their grid, got {list(m.shape)} {m.dtype} on "
                f"{m.device} for map {i} and {list(first.shape)} {first.dtype} on {first.device} "
                "for map 0"
            )
        if m.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"maps must not require grad, got map {i} that does; normalize_cams has no "
                "gradient: detach them or call it under torch.no_grad()"
            )


def _check_device(name: str, tensor: Tensor, maps: Tensor) -> None:
    if tensor.device != maps.device:
        raise InputError(f"{name} must be on {maps.device} like the maps, got {tensor.device}")


def _check_size(name: str, size: tuple[int, int], most_height: int, most_width: int) -> list[int]:
    height, width = size
    if int(height) != height or int(width) != width:
        raise InputError(f"{name} must be integers (H, W), got ({height}, {width})")
    if not (1 <= height <= most_height and 1 <= width <= most_width):
        raise InputError(
            f"{name} must be (H, W) from (1, 1) to ({most_height}, {most_width}), got "
            f"({height}, {width})"
        )
    return [int(height), int(width)]
