"""Affinities of neighbouring pixels, in the layout that random walks take (AffinityNet, IRN).

Affinities are compact, ``[B, K, h, w]``: channel ``k`` at pixel ``i`` belongs to the pair of ``i``
and ``i + offset k``, and is 0 where the partner lies outside. Offsets ``(dy, dx)`` are those of
:func:`disc_offsets`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsis.errors import InputError
from wsis.ops import _random_walk  # noqa: F401  (registers the operators)

MOST_RADIUS = 18  # its half disc has about as many offsets as a kernel takes, 512


# ---- offsets -----------------------------------------------------------------------------------


def _half_disc(radius: int) -> tuple[tuple[int, int], ...]:
    rows = [(0, x) for x in range(1, radius)]
    for y in range(1, radius):
        rows += [(y, x) for x in range(1 - radius, radius) if x * x + y * y < radius * radius]
    return tuple(rows)


# All of them, made once; torch.compile sees constants.
_HALF_DISCS = tuple(_half_disc(radius) for radius in range(MOST_RADIUS + 1))


def half_disc(radius: int) -> tuple[tuple[int, int], ...]:
    """The rows of :func:`disc_offsets`."""
    return _HALF_DISCS[radius]


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
    check_radius(radius)
    if form not in ("psa", "irn"):
        raise InputError(f"form must be 'psa' or 'irn', got {form!r}")
    rows = list(half_disc(radius))
    if form == "irn":
        rows.sort(key=lambda row: _path_length(*row))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def check_radius(radius: int) -> None:
    """Raises InputError unless it is one."""
    if isinstance(radius, bool) or not isinstance(radius, int) or not 1 <= radius <= MOST_RADIUS:
        raise InputError(f"radius must be an integer from 1 to {MOST_RADIUS}, got {radius!r}")


def flat(rows: Sequence[tuple[int, int]]) -> list[int]:
    """Rows one after the other, as the operators take them."""
    return [number for row in rows for number in row]


def check_floating(name: str, value: Tensor, shape: str, ranks: tuple[int, ...] = (4,)) -> None:
    """Raises InputError unless the tensor is floating point and of one of these ranks."""
    if value.dim() not in ranks or not value.is_floating_point():
        raise InputError(
            f"{name} must be a floating {shape}, got {value.dtype} {list(value.shape)}"
        )


def single_at_least(*values: Tensor) -> torch.dtype:
    """What to compute in: the promoted dtype, half precision as float32."""
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
    check_floating("features", features, "[B, F, h, w]")
    if features.shape[1] == 0:
        raise InputError(f"features must have channels, got {list(features.shape)}")
    check_radius(radius)
    with torch.autocast(features.device.type, enabled=False):
        affinity = torch.ops.wsis.pair_affinity(
            features.to(single_at_least(features)), flat(half_disc(radius))
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
    check_floating("edge", edge, "[B, h, w] or [B, 1, h, w]", (3, 4))
    if edge.dim() == 4:
        if edge.shape[1] != 1:
            raise InputError(f"edge must have one channel, got {list(edge.shape)}")
        edge = edge[:, 0]
    check_radius(radius)
    with torch.autocast(edge.device.type, enabled=False):
        affinity, _chosen = torch.ops.wsis.path_affinity(
            edge.to(single_at_least(edge)), flat(half_disc(radius))
        )
    return affinity
