"""Random walks on a pixel grid and the affinities that drive them (AffinityNet, IRN, AFA).

A pixel walks to the pixels of a disc around it, ``T_ij = A_ij^beta / sum_i A_ij^beta`` with a
diagonal of 1, and class maps become ``maps T^(2^log_steps)``. The published form squares the dense
``h w x h w`` matrix; here it is a stencil, applied to the maps: memory grows with ``h w``.

Affinities are compact, ``[B, K, h, w]``; `wsis.ops.stencil_affinity` makes them.

Results do not depend on the number of threads. A value that is not finite spoils its whole image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsis.errors import InputError
from wsis.ops import _random_walk as native
from wsis.ops.stencil_affinity import (
    MOST_RADIUS,
    check_floating,
    check_radius,
    disc_offsets,
    flat,
    half_disc,
    pair_affinity,
    path_affinity,
    single_at_least,
)

__all__ = [
    "MOST_LOG_STEPS",
    "MOST_RADIUS",
    "attention_propagate",
    "disc_offsets",
    "pair_affinity",
    "path_affinity",
    "propagate_to_edge",
    "random_walk",
    "window_mask",
]

MOST_LOG_STEPS = 20

Offsets = int | Tensor | Sequence[tuple[int, int]]


def _offset_rows(offsets: Offsets, symmetric: bool) -> list[tuple[int, int]]:
    """The rows of offsets, checked."""
    if isinstance(offsets, int):
        check_radius(offsets)
        half = list(half_disc(offsets))
        return half if symmetric else half + [(-y, -x) for y, x in half]
    if isinstance(offsets, Tensor):
        if offsets.dim() != 2 or offsets.shape[1] != 2 or offsets.dtype.is_floating_point:
            raise InputError(
                "offsets must be a radius or integers [K, 2], "
                f"got {offsets.dtype} {list(offsets.shape)}"
            )
        offsets = offsets.tolist()
    rows = [(int(y), int(x)) for y, x in offsets]
    if len(rows) > 512 or any(abs(n) >= 32767 for row in rows for n in row):
        raise InputError("offsets must be at most 512 and less than 32767 away")
    known = {(0, 0)}
    for y, x in rows:
        if (y, x) in known:
            raise InputError(
                "offsets must differ from each other and from (0, 0), and of a symmetric affinity "
                f"name each pair of pixels once, got ({y}, {x})"
            )
        known |= {(y, x), (-y, -x)} if symmetric else {(y, x)}
    return rows


def random_walk(
    maps: Tensor,
    affinity: Tensor,
    offsets: Offsets = 5,
    *,
    beta: float = 8,
    log_steps: int = 8,
    symmetric: bool = True,
) -> Tensor:
    """``maps T^(2^log_steps)``, ``T_ij = A_ij^beta / sum_i A_ij^beta``, ``A_ii = 1``.

    A column of ``T`` sums to 1, so every pixel becomes a mean of the maps, and constant maps stay.
    Gradients of any order reach the maps (the adjoint, ``g (T^t)^n``), none the affinity.

    A symmetric affinity takes about ``6 sqrt(2^log_steps)`` products with ``T``, not
    ``2^log_steps``: the power is summed up from Chebyshev polynomials until what is left is below
    the rounding (1e-9 in float32, 1e-17 in float64). It has to be at least 0, as every affinity is,
    which is not checked.

    Example:
        >>> maps, features = torch.rand(1, 3, 6, 9), torch.randn(1, 16, 6, 9)
        >>> walked = random_walk(maps, pair_affinity(features), log_steps=4)
        >>> walked.shape, bool(walked.max() <= maps.max())
        (torch.Size([1, 3, 6, 9]), True)

    Args:
        maps: ``[B, C, h, w]`` float, any range. Half precision is computed in float32.
        affinity: ``[B, K, h, w]`` float, at least 0; what belongs to partners outside is not read.
        offsets: the radius of a disc, or ``K`` rows ``(dy, dx)``, a tensor or a sequence.
        beta: exponent, positive; 8 in jiwoon-ahn/psa, 10 in jiwoon-ahn/irn.
        log_steps: 0 to 20; 8 in both.
        symmetric: an entry counts for both directions, and offsets are a half disc. If not, it is
            ``A_ij`` of ``j = i + offset`` alone; a radius then means the half disc and after it the
            opposite offsets, ``2 K`` channels.

    Returns:
        ``[B, C, h, w]``, float64 if an input is, else float32.

    Raises:
        InputError: an input is not 4-d floating point; batch, grid, device or the number of
            offsets differ; offsets are repeated; a number is out of range; the affinity requires a
            gradient.
    """
    rows = _offset_rows(offsets, symmetric)
    _check_walk(maps, affinity, rows, beta, log_steps)
    dtype = single_at_least(maps, affinity)
    with torch.autocast(maps.device.type, enabled=False):
        affinity, exponent = affinity.to(dtype), 1
        if beta == int(beta) and beta <= native.MOST_EXPONENT:
            exponent = int(beta)
        else:
            affinity = affinity.pow(beta)
        return torch.ops.wsis.random_walk(
            maps.to(dtype), affinity, flat(rows), symmetric, False, exponent, 1 << log_steps
        )


def _check_walk(
    maps: Tensor, affinity: Tensor, rows: list[tuple[int, int]], beta: float, log_steps: int
) -> None:
    check_floating("maps", maps, "[B, C, h, w]")
    check_floating("affinity", affinity, "[B, K, h, w]")
    if maps.device != affinity.device or maps.shape[0] != affinity.shape[0]:
        raise InputError(
            f"maps and affinity must share batch and device, got {list(maps.shape)} on "
            f"{maps.device} and {list(affinity.shape)} on {affinity.device}"
        )
    if maps.shape[-2:] != affinity.shape[-2:]:
        raise InputError(
            f"maps and affinity must share a grid, got {list(maps.shape)} and "
            f"{list(affinity.shape)}"
        )
    if affinity.shape[1] != len(rows):
        raise InputError(
            f"affinity must have a channel per offset, got {affinity.shape[1]} for {len(rows)}"
        )
    if not 0 < beta < float("inf"):
        raise InputError(f"beta must be positive and finite, got {beta}")
    if isinstance(log_steps, bool) or not isinstance(log_steps, int):
        raise InputError(f"log_steps must be an integer, got {log_steps!r}")
    if not 0 <= log_steps <= MOST_LOG_STEPS:
        raise InputError(f"log_steps must be from 0 to {MOST_LOG_STEPS}, got {log_steps}")
    if affinity.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "affinity must not require a gradient, which a walk does not have; detach it"
        )


def propagate_to_edge(
    maps: Tensor, edge: Tensor, radius: int = 5, *, beta: float = 10, log_steps: int = 8
) -> Tensor:
    """IRN's walk: ``maps (1 - edge)`` spread over what no edge divides.

    The walk of :func:`random_walk` on :func:`path_affinity`. The published form pads the edge map
    with 1, so nothing is handed over its border; here nothing lies there.

    Example:
        >>> maps, edge = torch.rand(2, 3, 8, 9), torch.rand(2, 1, 8, 9)
        >>> propagate_to_edge(maps, edge).shape
        torch.Size([2, 3, 8, 9])

    Args:
        maps: ``[B, C, h, w]`` float, such as class maps at stride 4.
        edge: ``[B, h, w]`` or ``[B, 1, h, w]`` float, in [0, 1].
        radius: 1 to 18; 5 in jiwoon-ahn/irn.
        beta: exponent, positive; 10 there.
        log_steps: 0 to 20; 8 there.

    Returns:
        ``[B, C, h, w]``, float64 if an input is, else float32. Gradients reach the maps.

    Raises:
        InputError: as the two functions, or the edge map requires a gradient.
    """
    check_floating("maps", maps, "[B, C, h, w]")
    check_floating("edge", edge, "[B, h, w] or [B, 1, h, w]", (3, 4))
    if edge.requires_grad and torch.is_grad_enabled():
        raise InputError("edge must not require a gradient, which a walk does not have; detach it")
    affinity = path_affinity(edge, radius)
    if edge.dim() == 3:
        edge = edge[:, None]
    if maps.shape[0] != edge.shape[0] or maps.shape[-2:] != edge.shape[-2:]:
        raise InputError(
            f"maps and edge must share batch and grid, got {list(maps.shape)} and "
            f"{list(edge.shape)}"
        )
    return random_walk(maps * (1 - edge), affinity, radius, beta=beta, log_steps=log_steps)


def window_mask(height: int, width: int, radius: int) -> Tensor:
    """Which pairs of pixels are at most ``radius`` rows and columns apart (AFA, 8 in training).

    Example:
        >>> window_mask(1, 3, 1).int().tolist()
        [[1, 1, 0], [1, 1, 1], [0, 1, 1]]

    Args:
        height: rows.
        width: columns.
        radius: at least 0.

    Returns:
        ``[h w, h w]`` bool.
    """

    def near(size: int) -> Tensor:
        places = torch.arange(size)
        return (places[:, None] - places).abs() <= radius

    pairs = near(height)[:, None, :, None] & near(width)[None, :, None, :]
    return pairs.reshape(height * width, height * width)


def attention_propagate(
    maps: Tensor,
    attention: Tensor,
    *,
    radius: int | None = None,
    power: float = 2,
    eps: float = 1e-4,
    log_steps: int = 0,
) -> Tensor:
    """AFA's propagation along the attention of a transformer, which is dense by nature.

    ``out_cj = sum_i maps_ci a_ij^power / (sum_i a_ij^power + eps)``, of pairs inside the window
    only, ``2^log_steps`` times. Plain torch, differentiable in everything.

    Example:
        >>> maps, attention = torch.rand(2, 3, 4, 5), torch.rand(2, 20, 20)
        >>> attention_propagate(maps, attention, radius=2).shape
        torch.Size([2, 3, 4, 5])

    Args:
        maps: ``[B, C, h, w]`` float.
        attention: ``[B, h w, h w]`` float, from pixel ``i`` (row) to ``j``.
        radius: of the window of :func:`window_mask`; None for all pairs. 8 in rulixiang/AFA.
        power: exponent; 2 there.
        eps: added to the column sums; 1e-4 there, 1e-1 with a background map.
        log_steps: 0 to 20; 0 there.

    Returns:
        ``[B, C, h, w]`` of the promoted dtype.

    Raises:
        InputError: shapes or devices do not fit, or a number is out of range.
    """
    check_floating("maps", maps, "[B, C, h, w]")
    check_floating("attention", attention, "[B, h w, h w]", (3,))
    height, width = maps.shape[-2:]
    pixels = height * width
    if attention.shape != (maps.shape[0], pixels, pixels) or attention.device != maps.device:
        raise InputError(
            f"attention must be [B, h w, h w] on the maps' device, got {list(attention.shape)} on "
            f"{attention.device} for maps {list(maps.shape)} on {maps.device}"
        )
    if radius is not None and radius < 0:
        raise InputError(f"radius must be at least 0, got {radius}")
    if not eps >= 0:
        raise InputError(f"eps must not be negative, got {eps}")
    if isinstance(log_steps, bool) or not 0 <= log_steps <= MOST_LOG_STEPS:
        raise InputError(f"log_steps must be from 0 to {MOST_LOG_STEPS}, got {log_steps}")
    weights = attention.pow(power)
    if radius is not None:
        mask = window_mask(height, width, radius).to(attention.device)
        weights = weights.masked_fill(~mask, 0)
    sums = weights.sum(1, keepdim=True) + eps
    out = maps.flatten(2).to(torch.promote_types(maps.dtype, attention.dtype))
    weights = weights.to(out.dtype)
    for _ in range(1 << log_steps):
        out = torch.matmul(out, weights) / sums
    return out.unflatten(2, (height, width))
