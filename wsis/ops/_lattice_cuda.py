"""The permutohedral lattice and the mean field on CUDA: `wsis._lattice` for tensors on the device.

Same functions, same results up to rounding, but a whole batch in one go and on the current stream.
A build waits for the device once, to learn how many vertices there are; nothing else does, so
filters and mean fields can be captured in a CUDA graph.

Sizes: ``B`` images of ``N = H * W`` pixels, ``d`` features, ``C`` channels; ``t`` tiles of 256
pixels, ``M`` vertices, ``R`` entries of all tiles' lists of vertices (csrc/cuda/permutohedral.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from wsis._lattice import MOST_TERMS, NORMALIZATIONS, Empty, Lattice, Term, mix_of
from wsis.errors import InputError
from wsis.ops._native import cuda_function, stream, view

MOST_DIMS = 15  # csrc/cuda/permutohedral.h
_TILE, _COUNTERS, _RANGE_BLOCKS = 256, 3, 64  # csrc/cuda/permutohedral.h
_PROBES = 128
_MOST_CORNERS = 2**31 - 1  # corners of all tiles are counted in int32


def build(
    features: Tensor,
    empty: Empty,
    *,
    size: tuple[int, int] | None = None,
    threads: int = 1,
) -> Lattice:
    """See `wsis._lattice.build`; at most 15 features."""
    if features.ndim != 3 or not 1 <= features.shape[1] <= MOST_DIMS:
        raise InputError(
            f"features must be [B, 1 to {MOST_DIMS}, N] on CUDA, got {list(features.shape)}"
        )
    batch, dims, points = features.shape
    height, width = (1, points) if size is None else size
    if height * width != points:
        raise InputError(f"features must be of H * W = {height * width} points, got {points}")
    return _build(batch, (height, width), empty, features, False, (), [1.0] * dims)


def build_image(
    size: tuple[int, int],
    empty: Empty,
    *,
    spatial: tuple[float, float] | None = None,
    image: Tensor | None = None,
    channels_last: bool = False,
    widths: Sequence[float] = (),
    threads: int = 1,
) -> Lattice:
    """See `wsis._lattice.build_image`; at most 15 features."""
    spread, widths = list(spatial or ()), list(widths)
    for name, values in (("spatial widths", spread), ("channel widths", widths)):
        if not all(0 < value < float("inf") for value in values):
            raise InputError(f"{name} must be positive and finite, got {list(values)}")
    if not 1 <= len(spread) + len(widths) <= MOST_DIMS:
        raise InputError(
            f"there must be 1 to {MOST_DIMS} features on CUDA, got {len(spread) + len(widths)}"
        )
    if image is None:
        if widths:
            raise InputError(f"channel widths must come with an image, got {widths} alone")
        return _build(1, size, empty, None, False, spread, [])
    plane = (*size, len(widths)) if channels_last else (len(widths), *size)
    if tuple(image.shape[1:]) != plane:
        raise InputError(
            f"image must be [B, {', '.join(map(str, plane))}], got {list(image.shape)}"
        )
    points = size[0] * size[1]
    flat = (points, len(widths)) if channels_last else (len(widths), points)
    image = image.reshape(len(image), *flat)
    return _build(len(image), size, empty, image, channels_last, spread, widths)


def filter(
    lattice: Lattice,
    values: Tensor,
    empty: Empty,
    *,
    before: Tensor | None = None,
    after: Tensor | None = None,
    reverse: bool = False,
    out: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """See `wsis._lattice.filter`."""
    _check(lattice, "values", values)
    out = empty(tuple(values.shape), _kind(values)) if out is None else out
    if values.numel() == 0:
        return out
    mix = values.new_full(values.shape[1:2], _slice_factor(lattice.dims))
    cuda_function("permutohedral_filter_cuda")(
        view(values),
        view(out),
        [_arrays(lattice, values, mix, before, after, empty)],
        [max(lattice.vertices)],
        lattice.height,
        lattice.width,
        reverse,
        _shared_bytes(values.device),
        _stream(values),
    )
    return out


def normalisers(
    lattice: Lattice, normalization: str, empty: Empty, *, threads: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """See `wsis._lattice.normalisers`."""
    if normalization not in NORMALIZATIONS:
        raise InputError(
            f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
        )
    if normalization == "none":
        return None, None
    points = lattice.height * lattice.width
    ones = empty((lattice.batch, 1, points), "float32").fill_(1)
    filtered = filter(lattice, ones, empty)
    filtered = filtered.reshape(lattice.batch, points).double() + 1e-20
    if normalization == "symmetric":
        filtered = filtered.sqrt()
    factors = filtered.reciprocal().float()
    return (
        None if normalization == "after" else factors,
        None if normalization == "before" else factors,
    )


def make_term(
    lattice: Lattice,
    compat: Any,
    normalization: str,
    classes: int,
    empty: Empty,
    *,
    threads: int = 1,
) -> Term:
    """See `wsis._lattice.make_term`."""
    before, after = normalisers(lattice, normalization, empty)
    return Term(lattice, before, after, mix_of(compat, classes))


def mean_field(
    unary: Tensor,
    terms: Sequence[Term],
    iterations: int,
    empty: Empty,
    *,
    start: Tensor | None = None,
    probs: bool = True,
    labels: bool = False,
    out: Tensor | None = None,
    threads: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """See `wsis._lattice.mean_field`. Unaries that are not finite are not looked for: a wait."""
    batch, classes, points = unary.shape
    if len(terms) > MOST_TERMS:
        raise InputError(f"there must be at most {MOST_TERMS} terms, got {len(terms)}")
    for term in terms:
        _check(term.lattice, "unary", unary)
    sizes = {(term.lattice.height, term.lattice.width) for term in terms} or {(1, points)}
    if len(sizes) != 1:
        raise InputError(f"the terms' lattices must be of one size, got {sorted(sizes)}")
    (size,) = sizes
    if probs and out is None:
        out = empty((batch, classes, points), _kind(unary))
    best = empty((batch, points), "uint8" if classes <= 256 else "int32") if labels else None
    if unary.numel():
        cuda_function("dense_crf_cuda")(
            view(unary),
            None if start is None else view(start),
            view(out) if probs else None,
            view(best) if labels else None,
            [_arrays(t.lattice, unary, _mix_on(unary, t), t.before, t.after, empty) for t in terms],
            [max(term.lattice.vertices) for term in terms],
            *size,
            iterations,
            _shared_bytes(unary.device),
            _stream(unary),
        )
    return out if probs else None, best


# ---- parts -------------------------------------------------------------------------------------


def _build(
    batch: int,
    size: tuple[int, int],
    empty: Empty,
    image: Tensor | None,
    channels_last: bool,
    spatial: Sequence[float],
    widths: Sequence[float],
) -> Lattice:
    height, width = size
    dims = len(spatial) + len(widths)
    if batch * height * width == 0:
        return Lattice(dims, height, width, (0,) * batch, ())
    tiles = batch * cuda_function("permutohedral_tiles")(height, width)
    corners = tiles * (dims + 1) * _TILE
    if corners > _MOST_CORNERS:
        raise InputError(
            f"images must have at most {_MOST_CORNERS // _TILE // (dims + 1)} tiles of 256 pixels "
            f"in one lattice of {dims} features, got {tiles}: build smaller batches"
        )
    by_corner, by_tile = (tiles, dims + 1, _TILE), (tiles, (dims + 1) * _TILE)
    weights, local = empty(by_corner, "float32"), empty(by_corner, "int16")
    order, tile_starts = empty(by_tile, "int16"), empty(by_tile, "int16")
    slots, counts = empty(by_tile, "int32"), empty((tiles,), "int32")
    layout = empty((cuda_function("permutohedral_layout_size")(),), "uint8")
    ranges = empty((len(widths), _RANGE_BLOCKS, 2), "float32")
    counters = empty((_COUNTERS + batch,), "int32")
    queue = _stream(counters)
    # Photographs have 0.04 to 1.6 vertices a pixel, each in a slot; a table that turns out to be
    # too small is tried again four times larger, at the most of twice as many slots as corners.
    most = 1 << (2 * corners - 1).bit_length()
    room = min(most, 1 << (2 * batch * height * width - 1).bit_length())
    while True:
        table = empty((room,), "int64")
        cuda_function("permutohedral_tiles_cuda")(
            None if image is None else view(image),
            *map(view, (ranges, layout, table, weights, local, order, tile_starts, slots, counts)),
            view(counters),
            height,
            width,
            channels_last,
            list(spatial),
            list(widths),
            room if room == most else _PROBES,
            queue,
        )
        status, overflow, entries, *vertices = counters.tolist()  # waits for the device
        if status == 1:
            raise InputError("features must be finite, got NaN or infinity")
        if status == 2:
            raise InputError(
                "features must span fewer lattice cells, got too wide a range: larger widths"
            )
        if not overflow:
            break
        room = min(4 * room, most)
    total = sum(vertices)
    keys, rows, starts = (
        empty((total,), "int64"),
        empty((entries,), "int32"),
        empty((entries,), "int16"),
    )
    cuda_function("permutohedral_keys_cuda")(
        view(table), view(empty((1,), "int32")), view(keys), queue
    )
    keys = keys.sort().values
    first, image_rows = _sums(counts, empty), _sums(counters[_COUNTERS:], empty)
    neighbours = empty((dims + 1, total + 1, 2), "int32")
    cuda_function("permutohedral_vertices_cuda")(
        *map(view, (layout, table, keys, first, counts, slots, tile_starts)),
        view(empty((room,), "int32")),
        *map(view, (rows, starts, neighbours)),
        queue,
    )
    # The entries of each vertex, in the order of the tiles.
    by_row, listed = rows.sort(stable=True)
    bounds = torch.arange(total + 2, dtype=torch.int32, device=rows.device)
    begin = torch.searchsorted(by_row, bounds, out_int32=True)
    arrays = (weights, local, order, first, rows, starts, begin, listed.int(), neighbours)
    return Lattice(dims, height, width, tuple(vertices), ((*arrays, image_rows),))


def _sums(counts: Tensor, empty: Empty) -> Tensor:
    """``[n + 1]``: 0, then the running sums."""
    sums = empty((len(counts) + 1,), "int32")
    sums[:1] = 0
    torch.cumsum(counts, 0, dtype=torch.int32, out=sums[1:])
    return sums


def _arrays(
    lattice: Lattice,
    values: Tensor,
    mix: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    empty: Empty,
) -> list[Any]:
    """A term as csrc/bindings/dense_crf_cuda.cpp takes it, with scratch."""
    batch, channels, _ = values.shape
    copies = batch if lattice.batch == 1 else 1
    quads, kind = -(-channels // 4), _kind(values)
    (arrays,) = lattice.images
    entries, rows = len(arrays[4]), sum(lattice.vertices) + 1
    partial = empty((copies, entries, quads, 4), kind)
    scratch = empty((2, copies, rows, quads, 4), kind)
    factors = [None if factor is None else view(factor) for factor in (before, after)]
    return [*map(view, (*arrays, mix, partial, scratch)), *factors]


def _mix_on(unary: Tensor, term: Term) -> Tensor:
    """A term's labels' factors on the device, ``[C]`` or ``[C, C]``, with the filter's constant."""
    classes, factor = unary.shape[1], _slice_factor(term.lattice.dims)
    if len(term.mix) == classes and len(set(term.mix)) == 1:  # nothing has to be copied
        return unary.new_full((classes,), term.mix[0] * factor)
    return _copied(tuple(value * factor for value in term.mix), classes, unary.dtype, unary.device)


@lru_cache(maxsize=32)  # a copy to the device cannot be captured in a graph: only the first one is
def _copied(
    mix: tuple[float, ...], classes: int, kind: torch.dtype, device: torch.device
) -> Tensor:
    shape = (classes,) if len(mix) == classes else (classes, classes)
    if len(mix) not in (classes, classes**2):
        raise InputError(f"mix must have {classes} or {classes**2} factors, got {len(mix)}")
    return torch.tensor(mix, dtype=kind, device=device).reshape(shape)


def _check(lattice: Lattice, name: str, values: Tensor) -> None:
    points = lattice.height * lattice.width
    shape = list(values.shape)
    if shape[2] != points or lattice.batch not in (1, shape[0]):
        batch = "B" if lattice.batch == 1 else lattice.batch
        raise InputError(f"{name} must be [{batch}, C, {points}] for this lattice, got {shape}")


def _kind(values: Tensor) -> str:
    kind = str(values.dtype).removeprefix("torch.")
    if kind not in ("float32", "float64"):
        raise InputError(f"values must be float32 or float64, got {kind}")
    return kind


def _slice_factor(dims: int) -> float:
    return 1 / (1 + 2.0**-dims)


def _stream(tensor: Tensor) -> int:
    return stream(tensor) if tensor.is_cuda else 0  # 0 is the emulator's


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one block may have."""
    if device.type != "cuda":
        return 48 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks this one
    return properties.shared_memory_per_block_optin
