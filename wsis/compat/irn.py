"""jiwoon-ahn/irn's ``misc/indexing.py`` and the pair functions of its training.

`propagate_to_edge` and `random_walk` never make the ``N x N`` matrix: a 500 x 375 image takes
milliseconds and a few MB where the original squares 550 MB eight times. The functions between
(`edge_to_affinity`, `affinity_sparse2dense`, `to_transition_matrix`) are here for parity and as
slow and large as there; so are the tables of `PathIndex`, which nothing else here needs.

Sizes: ``K`` maps, ``h w`` grid, ``D`` offsets, ``P`` pairs per offset, ``N = h w``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsis.errors import InputError
from wsis.ops.random_walk import propagate_to_edge as spread_to_edge
from wsis.ops.random_walk import random_walk as walk
from wsis.types import BACKGROUND

Array = np.ndarray[Any, Any]


class PathIndex:
    """Pairs of pixels within a radius and the pixels on the way between them.

    The index tables are made when first asked for and shared by all objects of one size: do not
    write to them.

    Args:
        radius: pairs lie less than this apart.
        default_size: ``(h, w)`` of the grid.

    Attributes:
        radius: as given.
        radius_floor: rows and columns at the border that are no source.
        search_paths: list of ``[n, length, 2]`` (dy, dx) paths, by length, far end first.
        search_dst: ``[D, 2]`` (dy, dx) of the offsets in that order.
        path_indices: list of ``[n, length, P]`` flat indices of the pixels on the paths.
        src_indices: ``[P]`` flat indices of the sources.
        dst_indices: ``[D, P]`` flat indices of their partners.

    Example:
        >>> paths = PathIndex(radius=5, default_size=(12, 16))
        >>> paths.dst_indices.shape
        (34, 64)
    """

    def __init__(self, radius: int, default_size: tuple[int, int]) -> None:
        if radius < 2 or len(default_size) != 2 or min(default_size) < 1:
            raise InputError(
                f"radius must be 2 or more and default_size (h, w), got {radius}, {default_size}"
            )
        self.radius = radius
        self.radius_floor = int(np.ceil(radius) - 1)
        self.default_size = (int(default_size[0]), int(default_size[1]))
        self.search_paths, self.search_dst = self.get_search_paths_dst(radius)

    @property
    def path_indices(self) -> list[Array]:
        """See the class; a new list of shared tables."""
        return self.get_path_indices(self.default_size)[0]

    @property
    def src_indices(self) -> Array:
        """See the class."""
        return _pair_tables(self.radius, self.default_size)[0]

    @property
    def dst_indices(self) -> Array:
        """See the class."""
        return _pair_tables(self.radius, self.default_size)[1]

    def get_search_paths_dst(self, max_radius: int = 5) -> tuple[list[Array], Array]:
        """``search_paths`` and ``search_dst`` of a radius."""
        paths = list(_search_paths(max_radius))
        return paths, np.concatenate([path[:, 0] for path in paths])

    def get_path_indices(self, size: tuple[int, int]) -> tuple[list[Array], Array, Array]:
        """``path_indices``, ``src_indices`` and ``dst_indices`` of a grid."""
        size = (int(size[0]), int(size[1]))
        return list(_path_tables(self.radius, size)), *_pair_tables(self.radius, size)


@lru_cache(maxsize=16)
def _search_paths(radius: int) -> tuple[Array, ...]:
    """Per length ``[n, length, 2]``: whole pixels closer than 1 to the line from 0 to the offset.

    The offsets are those of the half disc, row by row; within a length they keep this order.
    """
    by_length: dict[int, list[list[tuple[int, int]]]] = {}
    for dy in range(radius):
        for dx in range(-radius + 1, radius):
            if (dy == 0 and dx <= 0) or dy * dy + dx * dx >= radius * radius:
                continue
            columns = range(min(0, dx), max(0, dx) + 1)
            box = [(y, x) for y in range(dy + 1) for x in columns]
            # Squared distance to the line, times the squared length, in whole numbers.
            near = [(y, x) for y, x in box if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]
            near.sort(key=lambda p: -abs(p[0]) - abs(p[1]))
            by_length.setdefault(len(near), []).append(near)
    return tuple(np.asarray(by_length[length]) for length in sorted(by_length))


def _sources(radius: int, size: tuple[int, int]) -> Array:
    """``[P]``: pixels all of whose partners lie on the grid."""
    edge = radius - 1
    grid = np.arange(size[0] * size[1], dtype=np.int64).reshape(size)
    return grid[: max(size[0] - edge, 0), edge : max(size[1] - edge, edge)].reshape(-1)


@lru_cache(maxsize=8)
def _pair_tables(radius: int, size: tuple[int, int]) -> tuple[Array, Array]:
    sources = _sources(radius, size)
    steps = np.concatenate([path[:, 0] for path in _search_paths(radius)])
    return sources, sources + (steps @ np.array([size[1], 1], np.int64))[:, None]


# Two sizes: at radius 10 on a 128 x 128 grid the tables are 220 MB.
@lru_cache(maxsize=2)
def _path_tables(radius: int, size: tuple[int, int]) -> tuple[Array, ...]:
    sources, row = _sources(radius, size), np.array([size[1], 1], np.int64)
    return tuple(sources + (paths @ row)[..., None] for paths in _search_paths(radius))


def edge_to_affinity(edge: Any, paths_indices: Sequence[Any]) -> Any:
    """``1 - max`` of the boundary over each path; parity only, see `wsis.ops.path_affinity`.

    Args:
        edge: ``[B, ...]`` float, flattened to ``[B, N]``.
        paths_indices: list of ``[n, length, P]``; not changed.

    Returns:
        ``[B, D, P]``, differentiable in the boundary; of equal values the first gets the gradient.
    """
    if not isinstance(edge, Tensor):
        return edge_to_affinity(torch.from_numpy(np.ascontiguousarray(edge)), paths_indices).numpy()
    flat = edge.reshape(len(edge), -1)
    affinities = []
    for indices in paths_indices:
        table = torch.as_tensor(indices, device=edge.device).long()
        if table.dim() != 3:
            raise InputError(f"paths_indices must be [n, length, P] each, got {list(table.shape)}")
        on_path = flat.index_select(1, table.flatten()).view(len(flat), *table.shape)
        affinities.append(1 - on_path.max(dim=2).values)
    return torch.cat(affinities, dim=1)


def affinity_sparse2dense(affinity_sparse: Any, ind_from: Any, ind_to: Any, n_vertices: int) -> Any:
    """Pairs to a symmetric ``[N, N]`` matrix with diagonal 1; parity only, large.

    Args:
        affinity_sparse: ``D * P`` values of one image, any shape.
        ind_from: ``[P]`` sources.
        ind_to: ``[D, P]`` partners.
        n_vertices: N.

    Returns:
        ``[N, N]`` on the device of the values.
    """
    if not isinstance(affinity_sparse, Tensor):
        values = torch.from_numpy(np.ascontiguousarray(affinity_sparse))
        return affinity_sparse2dense(values, ind_from, ind_to, n_vertices).numpy()
    values = affinity_sparse.reshape(-1)
    to = torch.as_tensor(ind_to, device=values.device).long()
    source = torch.as_tensor(ind_from, device=values.device).long().expand_as(to).reshape(-1)
    if values.shape != source.shape:
        raise InputError(
            f"affinity_sparse must be {source.numel()} values for ind_to {list(to.shape)}, got "
            f"{values.numel()}"
        )
    to, diagonal = to.reshape(-1), torch.arange(n_vertices, device=values.device)
    rows, columns = torch.cat([source, diagonal, to]), torch.cat([to, diagonal, source])
    entries = torch.cat([values, values.new_ones(n_vertices), values])
    dense = values.new_zeros(n_vertices, n_vertices)
    return dense.index_put((rows, columns), entries, accumulate=True)


def to_transition_matrix(affinity_dense: Any, beta: float, times: int) -> Any:
    """``(A^beta / column sums)^(2^times)`` by squaring; parity only, ``times`` products of N^3."""
    powered = affinity_dense**beta
    transition = powered / powered.sum(0)
    for _ in range(times):
        transition = transition @ transition
    return transition


def propagate_to_edge(
    x: Any, edge: Any, radius: int = 5, beta: float = 10, exp_times: int = 8
) -> Any:
    """Class maps walk until boundaries stop them: ``x (1 - edge) T^(2^exp_times)``.

    Args:
        x: ``[K, h, w]`` (or with more leading axes, which are flattened) float.
        edge: ``[1, h, w]`` or ``[h, w]`` float in [0, 1], boundaries.
        radius: of the half disc.
        beta: power of the affinities.
        exp_times: how often the transition would be squared.

    Returns:
        ``[K, 1, h, w]`` in the dtype of ``x``, differentiable in ``x``; numpy for numpy.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> propagate_to_edge(torch.rand(3, 12, 16), torch.rand(1, 12, 16)).shape
        torch.Size([3, 1, 12, 16])
    """
    if not isinstance(x, Tensor):
        x, edge = (torch.from_numpy(np.ascontiguousarray(a)) for a in (x, edge))
        return propagate_to_edge(x, edge, radius, beta, exp_times).numpy()
    height, width = x.shape[-2:]
    if edge.numel() != height * width:
        raise InputError(
            f"edge must be [1, {height}, {width}] for x {list(x.shape)}, got {list(edge.shape)}"
        )
    maps, boundary = x.reshape(1, -1, height, width), edge.detach().reshape(1, height, width)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = spread_to_edge(
        maps.to(wide), boundary.to(maps.device, wide), radius, beta=beta, log_steps=exp_times
    )
    return out[0, :, None].to(x.dtype)


def random_walk(x: Any, aff: Any, ind: Any, beta: float, times: int) -> Any:
    """``x T^(2^times)`` with ``T`` from pairs: three functions of the original in one, matrix-free.

    Replaces ``x.view(K, -1) @ to_transition_matrix(affinity_sparse2dense(aff, *ind, N), beta,
    times)`` of jiwoon-ahn/irn, and the same product of jiwoon-ahn/psa infer_aff.py.

    Args:
        x: ``[K, h, w]`` float.
        aff: ``D * P`` affinities of the pairs, any shape.
        ind: a `PathIndex`, or ``(ind_from [P], ind_to [D, P] or [D * P])`` as
            `wsis.compat.psa.get_indices_of_pairs` gives; flat indices into ``h w``. Pairs of a
            `PathIndex` that was made for a larger grid, padded as in `propagate_to_edge`, are cut
            to that of ``x``.
        beta: power of the affinities.
        times: how often the transition would be squared.

    Returns:
        ``[K, h, w]`` in the dtype of ``x``, differentiable in ``x``; numpy for numpy.

    Raises:
        InputError: indices that are not one offset per row, or shapes that do not fit.

    Example:
        >>> paths = PathIndex(5, (12, 16))
        >>> aff = edge_to_affinity(torch.rand(1, 12, 16), paths.path_indices)
        >>> random_walk(torch.rand(3, 12, 16), aff, paths, beta=10, times=8).shape
        torch.Size([3, 12, 16])
    """
    if not isinstance(x, Tensor):
        x, aff = (torch.from_numpy(np.ascontiguousarray(a)) for a in (x, aff))
        return random_walk(x, aff, ind, beta, times).numpy()
    if x.dim() != 3:
        raise InputError(f"x must be [K, h, w], got {list(x.shape)}")
    size = (x.shape[1], x.shape[2])
    grid, pad = size, 0
    if isinstance(ind, PathIndex):
        grid = ind.default_size
        pad = ind.radius if grid != size else 0
        if grid not in (size, (size[0] + pad, size[1] + 2 * pad)):
            raise InputError(
                f"the PathIndex must be for the grid of x, {list(size)}, or that padded by its "
                f"radius, got {list(grid)}"
            )
        ind = (ind.src_indices, ind.dst_indices)
    affinity, offsets = _stencil(torch.as_tensor(aff, device=x.device).detach(), ind, grid)
    affinity = affinity[..., : size[0], pad : pad + size[1]]
    out = walk(x[None], affinity, offsets, beta=beta, log_steps=times)
    return out[0].to(x.dtype)


def _stencil(aff: Tensor, ind: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``[1, D, h, w]`` and ``[D, 2]`` (dy, dx) of pairs given by flat indices."""
    sources = torch.as_tensor(ind[0]).reshape(-1).long().cpu()
    partners = torch.as_tensor(ind[1]).long().cpu().reshape(-1, max(len(sources), 1))
    if not len(sources) or not len(partners):
        # A grid smaller than the radius has no pairs: nothing moves.
        return aff.new_zeros(1, 1, *grid), torch.tensor([[0, 1]])
    dy = partners // grid[1] - sources // grid[1]
    dx = partners % grid[1] - sources % grid[1]
    offsets = torch.stack([dy[:, 0], dx[:, 0]], dim=1)
    if bool((dy != dy[:, :1]).any() or (dx != dx[:, :1]).any()):
        raise InputError(
            f"ind must hold one offset (dy, dx) per row on the grid {list(grid)}; are the indices "
            "for another size?"
        )
    if aff.numel() != partners.numel():
        raise InputError(
            f"aff must be {partners.numel()} values for ind {list(partners.shape)}, "
            f"got {list(aff.shape)}"
        )
    stencil = aff.new_zeros(1, len(offsets), grid[0] * grid[1])
    stencil[0][:, sources.to(aff.device)] = aff.reshape(partners.shape)
    return stencil.view(1, len(offsets), *grid), offsets


class GetAffinityLabelFromIndices:
    """Labels of pairs from a mask (jiwoon-ahn/irn voc12/dataloader.py).

    Args:
        indices_from: ``[P]`` sources.
        indices_to: ``[D, P]`` partners.
        num_classes: ids from here on are unknown; 21 there, which is Pascal VOC's.

    Example:
        >>> paths = PathIndex(5, (12, 16))
        >>> labels = GetAffinityLabelFromIndices(paths.src_indices, paths.dst_indices)
        >>> [tuple(x.shape) for x in labels(np.zeros((12, 16), np.uint8))]
        [(34, 64), (34, 64), (34, 64)]
    """

    def __init__(self, indices_from: Any, indices_to: Any, num_classes: int = 21) -> None:
        self.indices_from = indices_from
        self.indices_to = indices_to
        self.num_classes = num_classes

    def __call__(self, segm_map: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Background, foreground and negative labels, each ``[D, P] float32`` of 0 and 1."""
        flat = np.asarray(segm_map).reshape(-1)
        own, partner = flat[self.indices_from][None], flat[self.indices_to]
        known = (own < self.num_classes) & (partner < self.num_classes)
        same = known & (own == partner)
        groups = (same & (own == BACKGROUND), same & (own != BACKGROUND), known & ~same)
        background, foreground, negative = (
            torch.from_numpy(group.astype(np.float32)) for group in groups
        )
        return background, foreground, negative


def affinity_displacement_loss(
    edge_out: Tensor, dp_out: Tensor, path_index: PathIndex
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``AffinityDisplacementLoss.forward`` does with the outputs of its network.

    For the reduced losses without these tensors see `wsis.losses.irn_losses`.

    Args:
        edge_out: ``[B, 1, h, w]`` float, before the sigmoid.
        dp_out: ``[B, 2, h, w]`` float.
        path_index: for the grid ``h w``.

    Returns:
        ``pos_aff_loss [B, D, P]``, ``neg_aff_loss [B, D, P]``, ``dp_fg_loss [B, 2, D, P]``,
        ``dp_bg_loss [B, 2, D, P]``: not multiplied by labels, not reduced.
    """
    aff = edge_to_affinity(edge_out.sigmoid(), path_index.path_indices)
    flat = dp_out.flatten(2)
    source = torch.as_tensor(path_index.src_indices, device=flat.device)
    partner = torch.as_tensor(path_index.dst_indices, device=flat.device)
    pairs = flat[:, :, None, source] - flat[:, :, partner]
    target = torch.as_tensor(path_index.search_dst, device=flat.device).T[:, :, None]
    return (
        -torch.log(aff + 1e-5),
        -torch.log(1.0 + 1e-5 - aff),
        (pairs - target).abs(),
        pairs.abs(),
    )
