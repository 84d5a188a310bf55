"""The permutohedral lattice and the mean field of a CRF on the CPU, for arrays of any library.

Arrays come in as anything that ``wsis._C`` reads without a copy (numpy arrays, detached torch CPU
tensors, ...), C-contiguous; what comes out is made with the caller's ``empty(shape, dtype)``, such
as ``numpy.empty``. Nothing heavy is imported here: `wsis.ops` uses this with torch,
`wsis.compat.pydensecrf` with numpy alone.

Sizes: ``B`` images of ``N = H * W`` pixels in row-major order, ``d`` features, ``C`` labels or
channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from wsis import _C
from wsis.errors import InputError

Empty = Callable[[tuple[int, ...], str], Any]
Normalization = Literal["none", "before", "after", "symmetric"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)

MOST_DIMS = 32  # csrc/kernels/permutohedral.h
MOST_TERMS = 16  # csrc/cpu/dense_crf.h


@dataclass(frozen=True)
class Lattice:
    """Where the points of some images lie in the permutohedral lattice.

    Attributes:
        dims: ``d``.
        height: of the images; 1 for points that are no pixels.
        width: of the images.
        vertices: number of vertices of each image; one image serves a batch of any size.
        images: the arrays of each image, private (csrc/bindings/permutohedral.h).
    """

    dims: int
    height: int
    width: int
    vertices: tuple[int, ...]
    images: tuple[tuple[Any, ...], ...]

    @property
    def batch(self) -> int:
        """Images that the lattice was built for."""
        return len(self.vertices)


@dataclass(frozen=True)
class Term:
    """One pairwise term of a CRF: ``logits += mix . (after * filter(before * Q))``.

    Attributes:
        lattice: of the term's features.
        before: ``[lattice.batch, N]`` float32 or None.
        after: ``[lattice.batch, N]`` float32 or None.
        mix: ``[C]`` factors of the labels, or ``[C * C]`` row by row.
    """

    lattice: Lattice
    before: Any
    after: Any
    mix: list[float]


def build(
    features: Any, empty: Empty, *, size: tuple[int, int] | None = None, threads: int = 1
) -> Lattice:
    """Lattice of any points.

    Args:
        features: ``[B, d, N]`` float32, finite, already divided by their widths; d up to 32.
        empty: makes arrays.
        size: ``(H, W)`` with ``H * W = N`` if the points are pixels, which makes everything faster.
        threads: how many to use; the result does not depend on it.

    Raises:
        InputError: features not finite or over too wide a range.
    """
    if len(features.shape) != 3 or not 1 <= features.shape[1] <= MOST_DIMS:
        raise InputError(f"features must be [B, 1 to 32, N], got {list(features.shape)}")
    batch, dims, points = features.shape
    height, width = (1, points) if size is None else size
    if height * width != points:
        raise InputError(f"features must be of H * W = {height * width} points, got {points}")
    images: list[tuple[Any, ...]]
    images = [(features[b], False, [1.0] * dims, []) for b in range(batch)]
    return _build(images, dims, height, width, empty, threads)


def build_image(
    size: tuple[int, int],
    empty: Empty,
    *,
    spatial: tuple[float, float] | None = None,
    image: Any = None,
    channels_last: bool = False,
    widths: Sequence[float] = (),
    threads: int = 1,
) -> Lattice:
    """Lattice of pixels, by position, by colour or both: ``x / sx, y / sy, channel_i / widths_i``.

    Args:
        size: ``(H, W)``.
        empty: makes arrays.
        spatial: ``(sx, sy)``, or None to leave the position out.
        image: ``[B, c, H, W]`` uint8 or float32, or None: then one lattice serves every batch.
        channels_last: the image is ``[B, H, W, c]``.
        widths: one for each channel, positive.
        threads: how many to use; the result does not depend on it.

    Raises:
        InputError: shapes, widths or values that do not fit, over too wide a range included.
    """
    height, width = size
    spread = list(spatial or ())
    for name, values in (("spatial widths", spread), ("channel widths", list(widths))):
        if not all(0 < value < float("inf") for value in values):
            raise InputError(f"{name} must be positive and finite, got {values}")
    dims = len(spread) + len(widths)
    if not 1 <= dims <= MOST_DIMS:
        raise InputError(f"there must be 1 to 32 features, got {dims}")
    if image is None:
        if widths:
            raise InputError(f"channel widths must come with an image, got {list(widths)} alone")
        return _build([(None, False, [], spread)], dims, height, width, empty, threads)
    plane = (height, width, len(widths)) if channels_last else (len(widths), height, width)
    if tuple(image.shape[1:]) != plane:
        raise InputError(
            f"image must be [B, {', '.join(map(str, plane))}], got {list(image.shape)}"
        )
    flat = (height * width, len(widths)) if channels_last else (len(widths), height * width)
    images = [(one.reshape(flat), channels_last, list(widths), spread) for one in image]
    return _build(images, dims, height, width, empty, threads)


def filter(
    lattice: Lattice,
    values: Any,
    empty: Empty,
    *,
    before: Any = None,
    after: Any = None,
    reverse: bool = False,
    out: Any = None,
    threads: int = 1,
) -> Any:
    """Splat, blur along axes 0 to d, slice: ``after * (K (before * values))``.

    Args:
        lattice: of the values' images, or of one image for all.
        values: ``[B, C, N]`` float32 or float64.
        empty: makes arrays.
        before: ``[lattice.batch, N]`` float32 factors of the pixels, or None.
        after: the same.
        reverse: blur along axes d to 0. The axes do not commute where vertices are missing; this
            is the transpose of the filter (with ``before`` and ``after`` exchanged).
        out: where to put the result; may be ``values``.
        threads: how many to use; the result does not depend on it.

    Returns:
        ``[B, C, N]`` as the values.
    """
    batch, channels, points = values.shape
    _check_batch(lattice, "values", values.shape)
    kind = _float_kind(values)
    if out is None:
        out = empty((batch, channels, points), kind)
    for b in range(batch):
        i = b if lattice.batch > 1 else 0
        arrays = list(lattice.images[i])
        size = _C.permutohedral_filter_scratch(
            arrays, channels, lattice.height, lattice.width, threads
        )
        _C.permutohedral_filter_cpu(
            values[b],
            arrays,
            None if before is None else before[i],
            None if after is None else after[i],
            empty((size,), kind),
            out[b],
            reverse,
            lattice.height,
            lattice.width,
            threads,
        )
    return out


def normalisers(
    lattice: Lattice, normalization: str, empty: Empty, *, threads: int = 1
) -> tuple[Any, Any]:
    """Factors before and after the filter, ``[lattice.batch, N]`` float32 or None.

    With ``f`` the filtered ones: ``1 / sqrt(f + 1e-20)`` on both sides for "symmetric",
    ``1 / (f + 1e-20)`` on one side for "before" and "after" (the densecrf library's constants).

    Raises:
        InputError: unknown normalization.
    """
    if normalization not in NORMALIZATIONS:
        raise InputError(
            f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
        )
    if normalization == "none":
        return None, None
    points = lattice.height * lattice.width
    factors = empty((lattice.batch, 1, points), "float32")
    factors[:] = 1
    filter(lattice, factors, empty, out=factors, threads=threads)
    factors = factors.reshape((lattice.batch, points))
    for b in range(lattice.batch):
        _C.permutohedral_normalise_cpu(factors[b], normalization == "symmetric")
    return (
        None if normalization == "after" else factors,
        None if normalization == "before" else factors,
    )


@functools.lru_cache(maxsize=4)
def places(
    size: tuple[int, int],
    spatial: tuple[float, float],
    normalization: str,
    empty: Empty,
    threads: int = 1,
) -> tuple[Lattice, Any, Any]:
    """Lattice of pixels by position alone, and its `normalisers`.

    They depend on the size of the image only, and most images of a data set have one of few: what
    the last four calls made is kept, about 30 bytes per pixel each, and must not be written to.
    ``empty`` must be the same object each time.

    Raises:
        InputError: widths that are not positive and finite, or unknown normalization.
    """
    lattice = build_image(size, empty, spatial=spatial, threads=threads)
    return lattice, *normalisers(lattice, normalization, empty, threads=threads)


def make_term(
    lattice: Lattice,
    compat: Any,
    normalization: str,
    classes: int,
    empty: Empty,
    *,
    threads: int = 1,
) -> Term:
    """A pairwise term as pydensecrf takes it.

    Args:
        lattice: of its features.
        compat: a number ``w`` (Potts: logits get ``+ w K Q``), a vector ``[C]`` (``- v_c (K Q)_c``)
            or a matrix ``[C, C]``, of which the symmetric half counts (``- (A + A^T) / 2 K Q``).
        normalization: one of `NORMALIZATIONS`.
        classes: ``C``.
        empty: makes arrays.
        threads: how many to use.

    Raises:
        InputError: a compat of another shape, or unknown normalization.
    """
    before, after = normalisers(lattice, normalization, empty, threads=threads)
    return Term(lattice, before, after, mix_of(compat, classes))


def mix_of(compat: Any, classes: int) -> list[float]:
    """What labels are mixed with, as `Term.mix`; see `make_term`."""
    compat = compat.tolist() if hasattr(compat, "tolist") else compat
    if isinstance(compat, (int, float)):
        return [float(compat)] * classes
    rows = list(compat)
    if len(rows) == classes and all(isinstance(row, (int, float)) for row in rows):
        return [-float(value) for value in rows]
    if len(rows) != classes or not all(
        isinstance(row, (list, tuple)) and len(row) == classes for row in rows
    ):
        raise InputError(f"compat must be a number, [{classes}] or [{classes}, {classes}]")
    return [-(rows[i][j] + rows[j][i]) / 2 for i in range(classes) for j in range(classes)]


def mean_field(
    unary: Any,
    terms: Sequence[Term],
    iterations: int,
    empty: Empty,
    *,
    start: Any = None,
    probs: bool = True,
    labels: bool = False,
    out: Any = None,
    threads: int = 1,
) -> tuple[Any, Any]:
    """``Q = softmax(-U)``, then ``iterations`` times ``Q = softmax(-U + sum_k term_k(Q))``.

    Args:
        unary: ``[B, C, N]`` float32 or float64 energies.
        terms: at most 16.
        iterations: 0 or more.
        empty: makes arrays.
        start: ``[B, C, N]``, Q to begin with, or None.
        probs: return Q.
        labels: return the first best label.
        out: array for Q; must not share memory with the others.
        threads: how many to use; the result does not depend on it.

    Returns:
        Q ``[B, C, N]`` as the unaries, or None; labels ``[B, N]`` uint8 (int32 for more than 256
        labels), or None.

    Raises:
        InputError: shapes that do not fit, or unaries that are not finite.
    """
    batch, classes, points = unary.shape
    if len(terms) > MOST_TERMS:
        raise InputError(f"there must be at most {MOST_TERMS} terms, got {len(terms)}")
    for term in terms:
        _check_batch(term.lattice, "unary", unary.shape)
    height, width = (terms[0].lattice.height, terms[0].lattice.width) if terms else (1, points)
    kind = _float_kind(unary)
    if probs and out is None:
        out = empty((batch, classes, points), kind)
    best = empty((batch, points), "uint8" if classes <= 256 else "int32") if labels else None
    same = [term.before is not None and term.before is term.after for term in terms]
    for b in range(batch):
        at = [b if term.lattice.batch > 1 else 0 for term in terms]
        lattices = [list(term.lattice.images[i]) for term, i in zip(terms, at, strict=True)]
        size = _C.dense_crf_scratch(lattices, same, probs, classes, height, width, threads)
        fine = _C.dense_crf_cpu(
            unary[b],
            None if start is None else start[b],
            lattices,
            [None if t.before is None else t.before[i] for t, i in zip(terms, at, strict=True)],
            [None if t.after is None else t.after[i] for t, i in zip(terms, at, strict=True)],
            [term.mix for term in terms],
            empty((size,), kind),
            None if out is None or not probs else out[b],
            None if best is None else best[b],
            height,
            width,
            iterations,
            threads,
        )
        if not fine:
            raise InputError(f"unary energies must be finite, got NaN or infinity in image {b}")
    return out if probs else None, best


# ---- parts -------------------------------------------------------------------------------------


def _build(
    images: list[tuple[Any, ...]], dims: int, height: int, width: int, empty: Empty, threads: int
) -> Lattice:
    tiles, words = _C.permutohedral_sizes(height, width, dims)
    by_corner = (height * width, dims + 1)
    scratch = empty((words,), "int64") if images else None
    vertices, built = [], []
    for image, interleaved, widths, spatial in images:
        slots, entries = empty(by_corner, "int16"), empty(by_corner, "int16")
        weights, first = empty(by_corner, "float32"), empty((tiles + 1,), "int32")
        points = (interleaved, widths, spatial, height, width, threads)
        count, listed, chunks = _C.permutohedral_embed_cpu(
            image, slots, weights, entries, first, scratch, *points
        )
        if count < 0:
            raise InputError(
                "features must be finite, got NaN or infinity"
                if count == -1
                else "features must span fewer lattice cells, got too wide a range: larger widths"
            )
        rows, counts = empty((listed,), "int32"), empty((listed,), "int16")
        lines, cuts = empty((dims + 1, count), "int32"), empty((dims + 1, chunks, 2), "int32")
        _C.permutohedral_finish_cpu(image, scratch, rows, counts, lines, cuts, *points)
        vertices.append(count)
        built.append((slots, weights, entries, first, rows, counts, lines, cuts))
    return Lattice(dims, height, width, tuple(vertices), tuple(built))


def _check_batch(lattice: Lattice, name: str, shape: Sequence[int]) -> None:
    points = lattice.height * lattice.width
    if shape[2] != points or (lattice.batch != 1 and lattice.batch != shape[0]):
        raise InputError(
            f"{name} must be [{'B' if lattice.batch == 1 else lattice.batch}, C, {points}] for "
            f"this lattice, got {list(shape)}"
        )


def _float_kind(array: Any) -> str:
    kind = str(array.dtype).rsplit(".", 1)[-1]  # numpy and torch name them alike
    if kind not in ("float32", "float64"):
        raise InputError(f"values must be float32 or float64, got {kind}")
    return kind
