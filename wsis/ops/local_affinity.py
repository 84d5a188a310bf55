"""Local mask refinement: PAMR, PAR and VARM.

Each pixel's mask value is replaced, several times, by a weighted mean over its neighbours: 8
directions x several dilations, ``P = 8 * len(dilations)``. The three methods differ in the weights
only. Weights come from the image alone, so they are computed once and carry no gradient.

Sizes: ``B`` batch, ``C`` mask channels, ``H W`` image.

Results do not depend on the number of threads. A pixel that is not finite spoils its neighbours'
weights, and with them the masks around it; nothing looks for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsis.errors import InputError
from wsis.ops._local_affinity import KINDS, MOST_DILATIONS, TILE, Kind
from wsis.ops.norms import as_float

DILATIONS = (1, 2, 4, 8, 12, 24)  # visinf/1-stage-wseg core/config.py; PAR and VARM alike
ITERATIONS = 10  # the same files


def pamr(
    image: Tensor,
    masks: Tensor,
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
) -> Tensor:
    """Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020; visinf/1-stage-wseg).

    Weights: softmax over neighbours of ``-mean_ch |I_i - I_p| / (1e-8 + 0.1 sigma)``; they sum
    to 1.

    Args:
        image: ``[B, 3, H, W]`` float (any channel count), finite; the weights do not depend on its
            scale (beyond 1e-8).
        masks: ``[B, C, h, w]`` float, resized to ``H, W`` first (bilinear, align_corners=True).
        iterations: how often the masks are propagated, 0 or more.
        dilations: distances of the neighbours, pixels, 1 to 64 positive numbers.

    Returns:
        ``[B, C, H, W]`` float32 (float64 when the masks are); differentiable in ``masks``, any
        number of times.

    Raises:
        InputError: shapes, devices or dtypes that do not fit, wrong dilations or iterations, or an
            image that requires a gradient.

    Example:
        >>> pamr(torch.rand(1, 3, 32, 32), torch.rand(1, 2, 8, 8)).shape
        torch.Size([1, 2, 32, 32])
    """
    return refine(image, masks, "pamr", iterations=iterations, dilations=dilations)


def par(
    image: Tensor,
    masks: Tensor,
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
) -> Tensor:
    """Pixel-adaptive refinement (Ru et al., AFA, CVPR 2022; rulixiang/afa, rulixiang/ToCo).

    Weights: softmax of ``-mean_ch (|I_i - I_p| / (sigma + 1e-8) / 0.3)^2`` plus 0.01 times the same
    softmax over the distances; they sum to 1.01, so a constant mask grows by 1.01 per iteration.

    Args, returns, raises: as :func:`pamr`.

    Example:
        >>> par(torch.rand(1, 3, 32, 32), torch.rand(1, 2, 8, 8)).shape
        torch.Size([1, 2, 32, 32])
    """
    return refine(image, masks, "par", iterations=iterations, dilations=dilations)


def varm(
    image: Tensor,
    masks: Tensor,
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
) -> Tensor:
    """Variation-aware refinement (Xu et al., SCD, AAAI 2023; ChunyanWang1/RTC network/VARM.py).

    Weights: softmax of ``-mean_ch (4 |I_i - I_p| / (sigma + 1e-8))^2`` minus 0.01 times the softmax
    of the neighbour's squared forward differences; they sum to 0.99 and may be slightly negative.

    Args, returns, raises: as :func:`pamr`, but ``image`` must be in [0, 1]: the second term is not
    scale free.

    Example:
        >>> varm(torch.rand(1, 3, 32, 32), torch.rand(1, 2, 8, 8)).shape
        torch.Size([1, 2, 32, 32])
    """
    return refine(image, masks, "varm", iterations=iterations, dilations=dilations)


def refine(
    image: Tensor,
    masks: Tensor,
    kind: Kind,
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
    counts: Tensor | None = None,
) -> Tensor:
    """One of :func:`pamr`, :func:`par` and :func:`varm`, for images with different mask counts.

    Memory beside the result: the weights of one group of images (48 numbers per pixel with the
    usual dilations; image by image once they exceed 16 MiB on the CPU, 2 GiB on CUDA) and two
    copies of one image's masks. The gradient computes the weights again instead of keeping them.

    Args:
        image: as for :func:`pamr`.
        masks: as for :func:`pamr`.
        kind: whose weights.
        iterations: as for :func:`pamr`.
        dilations: as for :func:`pamr`.
        counts: ``[B]`` integer, on the masks' device: only the first ``counts[b]`` masks of image b
            are refined, the others of the result are 0. None: all.

    Returns:
        As :func:`pamr`.

    Raises:
        InputError: as :func:`pamr`, or an unknown kind.

    Example:
        >>> counts = torch.tensor([1, 2])
        >>> refine(torch.rand(2, 3, 9, 9), torch.rand(2, 2, 9, 9), "par", counts=counts)[0, 1].max()
        tensor(0.)
    """
    steps = _check_image(image, kind, dilations)
    if masks.ndim != 4 or masks.shape[0] != image.shape[0]:
        raise InputError(
            f"masks must be [B, C, h, w] with the images' B={image.shape[0]}, "
            f"got {list(masks.shape)}"
        )
    _check_device("masks", masks, image)
    counts = _check_rest(masks, iterations, counts)
    masks = _real("masks", masks)
    if masks.shape[-2:] != image.shape[-2:]:
        if masks.shape[1] == 0:
            return masks.new_empty((*masks.shape[:2], *image.shape[-2:]))
        if masks.shape[-1] * masks.shape[-2] == 0 or 0 in image.shape[-2:]:
            raise InputError(f"masks must not be empty to be resized, got {list(masks.shape)}")
        masks = F.interpolate(masks, image.shape[-2:], mode="bilinear", align_corners=True)
    image = _real("image", image)
    return torch.ops.wsis.local_refine(image, masks, counts, kind, steps, iterations, False)


def local_affinity(image: Tensor, kind: Kind, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Weights of every pixel's neighbours; see :func:`pamr`, :func:`par`, :func:`varm`.

    ``sigma`` is the unbiased standard deviation per channel over the neighbours; PAMR also counts
    the pixel itself, once per dilation. A flat region gives equal weights, never NaN. In float32,
    a channel with ``sigma = 0`` around a differing pixel outweighs the other channels entirely.

    Args:
        image: ``[B, 3, H, W]`` float (any channel count), in [0, 1] for ``varm``.
        kind: whose weights.
        dilations: distances of the neighbours, pixels; borders are replicated.

    Returns:
        ``[B, P, H, W]`` float32 (float64 for float64 images), for each dilation the 8 directions
        row by row. No gradient.

    Raises:
        InputError: image not 4-d or requiring a gradient, no or non-positive dilations, unknown
            kind.

    Example:
        >>> local_affinity(torch.rand(1, 3, 32, 32), "pamr", (1, 2)).shape
        torch.Size([1, 16, 32, 32])
    """
    steps = _check_image(image, kind, dilations)
    packed = torch.ops.wsis.local_affinity_packed(_real("image", image), kind, steps)
    return _unpack(packed, 8 * len(steps), image.shape[-1])


def propagate(
    masks: Tensor,
    weights: Tensor,
    dilations: Sequence[int] = DILATIONS,
    iterations: int = ITERATIONS,
    counts: Tensor | None = None,
) -> Tensor:
    """Average masks over neighbours: ``m_i <- sum_p weights_p(i) m(i + p)``, several times.

    Args:
        masks: ``[B, C, H, W]`` float; borders are replicated.
        weights: ``[B, P, H, W]``, on the same device, as :func:`local_affinity` gives them.
        dilations: as for the weights.
        iterations: how often; 0 returns the masks.
        counts: as for :func:`refine`.

    Returns:
        ``[B, C, H, W]`` float32 (float64 when the masks are); differentiable in ``masks``, any
        number of times.

    Raises:
        InputError: shapes of masks and weights do not fit each other or the dilations, or weights
            that require a gradient.

    Example:
        >>> weights = local_affinity(torch.rand(1, 3, 9, 9), "par")
        >>> propagate(torch.rand(1, 2, 9, 9), weights).shape
        torch.Size([1, 2, 9, 9])
    """
    steps = _check_dilations(dilations)
    if masks.ndim != 4:
        raise InputError(f"masks must be [B, C, H, W], got {list(masks.shape)}")
    expected = [masks.shape[0], 8 * len(steps), *masks.shape[-2:]]
    if list(weights.shape) != expected:
        raise InputError(
            f"weights must be [B, P, H, W] = {expected} for masks {list(masks.shape)} and "
            f"dilations {tuple(steps)}, got {list(weights.shape)}"
        )
    _check_device("weights", weights, masks)
    counts = _check_rest(masks, iterations, counts)
    if weights.requires_grad and torch.is_grad_enabled():
        raise InputError("weights must not require a gradient, which is not computed")
    masks = _real("masks", masks)
    packed = _pack(_real("weights", weights).to(masks.dtype))
    return torch.ops.wsis.propagate(masks, packed, counts, steps, iterations, False)


# ---- checks ------------------------------------------------------------------------------------


def _check_image(image: Tensor, kind: str, dilations: Sequence[int]) -> list[int]:
    if image.ndim != 4 or image.shape[1] < 1:
        raise InputError(f"image must be [B, 3, H, W], got {list(image.shape)}")
    if kind not in KINDS:
        raise InputError(f"refinement must be pamr, par or varm, got {kind!r}")
    if image.requires_grad and torch.is_grad_enabled():
        raise InputError("image must not require a gradient: weights have none; detach it")
    return _check_dilations(dilations)


def _check_dilations(dilations: Sequence[int]) -> list[int]:
    if not 1 <= len(dilations) <= MOST_DILATIONS or min(dilations) < 1:
        raise InputError(
            f"dilations must be positive and at least one (at most {MOST_DILATIONS}), "
            f"got {tuple(dilations)}"
        )
    if any(int(d) != d for d in dilations):
        raise InputError(f"dilations must be integers, got {tuple(dilations)}")
    return [int(d) for d in dilations]


def _check_rest(masks: Tensor, iterations: int, counts: Tensor | None) -> Tensor | None:
    """The counts as the operators take them."""
    if not isinstance(iterations, int) or iterations < 0:
        raise InputError(f"iterations must be 0 or more and an integer, got {iterations}")
    if counts is None:
        return None
    if list(counts.shape) != [masks.shape[0]] or counts.is_floating_point():
        raise InputError(
            f"counts must be [B={masks.shape[0]}] integers, got {list(counts.shape)} {counts.dtype}"
        )
    _check_device("counts", counts, masks)
    return counts.to(torch.int32)


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise InputError(f"{name} must be on {other.device} like the rest, got {tensor.device}")


def _real(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        raise InputError(f"{name} must be real, got {tensor.dtype}")
    return as_float(tensor)


# ---- layouts -----------------------------------------------------------------------------------


def _pack(weights: Tensor) -> Tensor:
    """``[B, P, H, W]`` -> packed."""
    batch, taps, height, width = weights.shape
    if weights.is_cuda:
        grouped = weights.view(batch, taps // 4, 4, height, width).permute(0, 1, 3, 4, 2)
        return grouped.clone(memory_format=torch.contiguous_format)  # fresh memory is aligned
    tiles = -(-width // TILE)
    padded = F.pad(weights, (0, tiles * TILE - width))
    return padded.view(batch, taps, height, tiles, TILE).permute(0, 2, 3, 1, 4).contiguous()


def _unpack(packed: Tensor, taps: int, width: int) -> Tensor:
    """Packed -> ``[B, P, H, W]``."""
    if packed.is_cuda:
        return packed.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
    return packed.permute(0, 3, 1, 2, 4).flatten(3)[..., :width].contiguous()
