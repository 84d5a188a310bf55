"""Random walks on a pixel grid and the affinities that drive them (AffinityNet, IRN, AFA).

A pixel walks to the pixels of a disc around it, ``T_ij = A_ij^beta / sum_i A_ij^beta`` with a
diagonal of 1, and class maps become ``maps T^(2^log_steps)``. The published form squares the dense
``h w x h w`` matrix; here it is a stencil, applied to the maps: memory grows with ``h w``.

Affinities are compact, ``[B, K, h, w]``: channel ``k`` at pixel ``i`` belongs to the pair of ``i``
and ``i + offset k``, and is 0 where the partner lies outside. Offsets ``(dy, dx)`` are those of
:func:`disc_offsets`.

Results do not depend on the number of threads. A value that is not finite spoils its whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from wsis.errors import InputError
from wsis.ops import _random_walk as native

MOST_RADIUS = 18  # its half disc has about as many offsets as a kernel takes, 512
MOST_LOG_STEPS = 20

Offsets = int | Tensor | Sequence[tuple[int, int]]


# ---- offsets -----------------------------------------------------------------------------------


@cache
def _disc(radius: int) -> tuple[tuple[int, int], ...]:
    rows = [(0, x) for x in range(1, radius)]
    for y in range(1, radius):
        rows += [(y, x) for x in range(1 - radius, radius) if x * x + y * y < radius * radius]
    return tuple(rows)


def _path_length(dy: int, dx: int) -> int:
    """Pixels of the rectangle between both ends that are less than 1 away from the line."""
    inside = 0
    for y in range(dy + 1):
        for x in range(min(dx, 0), max(dx, 0) + 1):
            inside += (dy * x - dx * y) ** 2 < dy * dy + dx * dx
    return inside


def disc_offsets(radius: int = 5, *, form: str = "psa") -> Tensor:
    """Half of the pixels less than ``radius`` away: each pair of pixels once.

    Both forms are the same set. ``"psa"``: ``(0, 1..radius-1)``, then row by row, the order of
    jiwoon-ahn/psa and of all functions here. ``"irn"``: sorted by the length of the path, the order
    of jiwoon-ahn/irn's tables.

    Example:
        >>> disc_offsets(2).tolist()
        [[0, 1], [1, -1], [1, 0], [1, 1]]
        >>> disc_offsets(2, form="irn").tolist()
        [[0, 1], [1, 0], [1, -1], [1, 1]]
        >>> len(disc_offsets(5)), len(disc_offsets(10))
        (34, 152)

    Args:
        radius: 1 to 18; 5 for both walks, 10 in IRN's training.
        form: ``"psa"`` or ``"irn"``.

    Returns:
        ``[K, 2]`` int64, ``dy >= 0`` and ``dx``; empty for radius 1.

    Raises:
        InputError: the radius or the form is another.
    """
    _check_radius(radius)
    if form not in ("psa", "irn"):
        raise InputError(f"form must be 'psa' or 'irn', got {form!r}")
    rows = list(_disc(radius))
    if form == "irn":
        rows.sort(key=lambda row: _path_length(*row))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def _check_radius(radius: int) -> None:
    if isinstance(radius, bool) or not isinstance(radius, int) or not 1 <= radius <= MOST_RADIUS:
        raise InputError(f"radius must be an integer from 1 to {MOST_RADIUS}, got {radius!r}")


def _flat(rows: Sequence[tuple[int, int]]) -> list[int]:
    return [number for row in rows for number in row]


def _offset_rows(offsets: Offsets, symmetric: bool) -> list[tuple[int, int]]:
    """The rows of offsets, checked."""
    if isinstance(offsets, int):
        _check_radius(offsets)
        half = list(_disc(offsets))
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


def _floating(name: str, value: Tensor, shape: str, ranks: tuple[int, ...] = (4,)) -> None:
    if value.dim() not in ranks or not value.is_floating_point():
        raise InputError(
            f"{name} must be a floating {shape}, got {value.dtype} {list(value.shape)}"
        )


def _single_at_least(*values: Tensor) -> torch.dtype:
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


# ---- affinities --------------------------------------------------------------------------------


def pair_affinity(features: Tensor, radius: int = 5, *, cropped: bool = False) -> Tensor:
    """AffinityNet's affinity of neighbours, ``exp(-mean_c |f_c(i) - f_c(i + offset)|)``.

    Gradients, of the first order, reach the features; no ``[B, F, K, h, w]`` array is made.

    Example:
        >>> features = torch.zeros(1, 8, 3, 4)
        >>> affinity = pair_affinity(features, radius=2)
        >>> affinity[0, 0].tolist()  # to the right
        [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]

    Args:
        features: ``[B, F, h, w]`` float, ``F >= 1``. Half precision is computed in float32.
        radius: 1 to 18; 5 in jiwoon-ahn/psa.
        cropped: as jiwoon-ahn/psa, whose tables hold only pairs of a first pixel in
            ``[0 : h - radius + 1, radius - 1 : w - radius + 1]``; others are 0. Without, all pairs
            inside the grid.

    Returns:
        ``[B, K, h, w]`` in [0, 1], float64 if the features are, else float32.

    Raises:
        InputError: the features are not 4-d floating point or have no channel, or the radius is
            out of range.
    """
    _floating("features", features, "[B, F, h, w]")
    if features.shape[1] == 0:
        raise InputError(f"features must have channels, got {list(features.shape)}")
    _check_radius(radius)
    with torch.autocast(features.device.type, enabled=False):
        affinity = torch.ops.wsis.pair_affinity(
            features.to(_single_at_least(features)), _flat(_disc(radius))
        )
    if cropped:
        height, width = features.shape[-2:]
        inside = torch.zeros(height, width, dtype=affinity.dtype, device=affinity.device)
        inside[: max(0, height - radius + 1), radius - 1 : max(0, width - radius + 1)] = 1
        affinity = affinity * inside
    return affinity


def path_affinity(edge: Tensor, radius: int = 5) -> Tensor:
    """IRN's affinity of neighbours: 1 - the largest edge value on the path between them.

    The path to ``(dy, dx)`` holds the pixels of the rectangle between both ends that are less than
    1 away from the line, both ends among them. Gradients, of the first order, reach the edge map:
    that of a pair goes to its largest pixel, of equal ones to the first in the order of
    jiwoon-ahn/irn's tables (far end first).

    Example:
        >>> edge = torch.tensor([[[0.0, 0.25, 0.0]]])
        >>> path_affinity(edge, radius=3)[0, :2].flatten().tolist()  # one and two to the right
        [0.75, 0.75, 0.0, 0.75, 0.0, 0.0]

    Args:
        edge: ``[B, h, w]`` or ``[B, 1, h, w]`` float, in [0, 1]. Half precision is computed in
            float32.
        radius: 1 to 18; in jiwoon-ahn/irn 10 in training, 5 for the walk.

    Returns:
        ``[B, K, h, w]`` in the order of ``disc_offsets(radius)``, float64 if the edge map is, else
        float32; 0 where the partner lies outside.

    Raises:
        InputError: the edge map is not floating point of these shapes, or the radius is out of
            range.
    """
    _floating("edge", edge, "[B, h, w] or [B, 1, h, w]", (3, 4))
    if edge.dim() == 4:
        if edge.shape[1] != 1:
            raise InputError(f"edge must have one channel, got {list(edge.shape)}")
        edge = edge[:, 0]
    _check_radius(radius)
    with torch.autocast(edge.device.type, enabled=False):
        affinity, _chosen = torch.ops.wsis.path_affinity(
            edge.to(_single_at_least(edge)), _flat(_disc(radius))
        )
    return affinity


# ---- walks -------------------------------------------------------------------------------------


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

    A symmetric affinity takes ``about 6 sqrt(2^log_steps)`` products with ``T``, not
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
    dtype = _single_at_least(maps, affinity)
    with torch.autocast(maps.device.type, enabled=False):
        affinity, exponent = affinity.to(dtype), 1
        if beta == int(beta) and beta <= native.MOST_EXPONENT:
            exponent = int(beta)
        else:
            affinity = affinity.pow(beta)
        return torch.ops.wsis.random_walk(
            maps.to(dtype), affinity, _flat(rows), symmetric, False, exponent, 1 << log_steps
        )


def _check_walk(
    maps: Tensor, affinity: Tensor, rows: list[tuple[int, int]], beta: float, log_steps: int
) -> None:
    _floating("maps", maps, "[B, C, h, w]")
    _floating("affinity", affinity, "[B, K, h, w]")
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
    _floating("maps", maps, "[B, C, h, w]")
    _floating("edge", edge, "[B, h, w] or [B, 1, h, w]", (3, 4))
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
    _floating("maps", maps, "[B, C, h, w]")
    _floating("attention", attention, "[B, h w, h w]", (3,))
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
