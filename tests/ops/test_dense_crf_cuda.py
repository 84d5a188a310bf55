"""csrc/cuda/dense_crf.cu, run by the emulator: the mean field equals the CPU's, in two launches an
iteration where a lattice fits into shared memory; clean under sanitizers, wrong with faults."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from tests import emulator
from tests.ops.emulated_lattice import (
    both,
    close,
    counted,
    empty,
    emulated,
    image_of,
    run_checks,
    survives,
    values_of,
)
from wsis import _lattice
from wsis.errors import InputError
from wsis.ops import _lattice_cuda

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")

ROOM = 48 * 1024


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


def lattices_of(size, batch):
    """A lattice of places, one for all images, and one of places and colours, an image each."""
    colours = {"image": image_of(size, batch), "widths": (13.0,) * 3}
    return (
        both("build_image", size, spatial=(3.0, 3.0)),
        both("build_image", size, spatial=(9.0, 9.0), **colours),
    )


def compats_of(kind, classes):
    weights = values_of(classes, seed=3).abs()
    matrix = values_of(classes, classes, seed=4)
    return {"potts": (3, 4.0), "diagonal": (2, -weights), "matrix": (matrix, 1.5)}[kind]


def check_crf(
    *,
    size=(18, 21),
    batch=2,
    classes=3,
    iterations=2,
    dtype="float32",
    compat="potts",
    normalization="symmetric",
    start=False,
    room=ROOM,
):
    """`room`: bytes of shared memory; 0 takes the kernels that go through global memory."""
    points = size[0] * size[1]
    unary = 2 * values_of(batch, classes, points, dtype=dtype)
    first = values_of(batch, classes, points, seed=7, dtype=dtype).softmax(1) if start else None
    terms, wanted = [], []
    for (one, other), weight in zip(
        lattices_of(size, batch), compats_of(compat, classes), strict=True
    ):
        term = _lattice_cuda.make_term(one, weight, normalization, classes, empty)
        wanted.append(_lattice.make_term(other, weight, normalization, classes, empty))
        if dtype == "float64":  # factors are float32 always
            term = replace(term, before=wanted[-1].before, after=wanted[-1].after)
        terms.append(term)
    keywords = {"start": first, "labels": True}
    with mock.patch.object(_lattice_cuda, "_shared_bytes", return_value=room):
        probs, labels = _lattice_cuda.mean_field(unary, terms, iterations, empty, **keywords)
    expected, best = _lattice.mean_field(unary, wanted, iterations, empty, **keywords)
    close(probs, expected, 1e-12 if dtype == "float64" else 1e-5)
    assert labels.dtype == best.dtype == (torch.uint8 if classes <= 256 else torch.int32)
    assert torch.equal(labels.long(), probs.max(1).indices)
    if classes > 1:
        top = expected.topk(2, 1).values
        sure = top[:, 0] - top[:, 1] > 1e-4
        assert sure.any()
        assert torch.equal(labels[sure], best[sure])


# The lines of shared memory take a block a channel: many channels go through global memory here.
@pytest.mark.parametrize(
    "classes",
    [1, 4, 13, 33, *(pytest.param(c, marks=pytest.mark.long) for c in (3, 5, 21, 32, 70))],
)
def test_label_counts(module, classes):
    with emulated(module):
        check_crf(size=(5, 7), classes=classes, room=ROOM if classes < 33 else 0)
        check_crf(size=(5, 7), classes=classes, dtype="float64", room=0)


def test_many_labels(module):
    with emulated(module):
        check_crf(size=(2, 3), batch=1, classes=300, iterations=1, room=0)


@pytest.mark.parametrize("compat", ["potts", "diagonal", "matrix"])
@pytest.mark.parametrize("room", [0, ROOM])
def test_compatibilities(module, compat, room):
    with emulated(module):
        check_crf(compat=compat, room=room)
        check_crf(size=(3, 4), classes=6, compat=compat, room=room, iterations=1)


@pytest.mark.parametrize("normalization", _lattice.NORMALIZATIONS)
def test_normalizations(module, normalization):
    with emulated(module):
        check_crf(size=(7, 19), normalization=normalization)


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("start", [False, True])
def test_iterations_and_start(module, iterations, start):
    with emulated(module):
        check_crf(size=(6, 5), iterations=iterations, start=start)
        check_crf(size=(6, 5), iterations=iterations, start=start, classes=34, room=0)


def test_no_terms(module):
    unary = values_of(2, 3, 17)
    with emulated(module):
        probs, labels = _lattice_cuda.mean_field(unary, [], 2, empty)
    close(probs, (-unary).softmax(1), 1e-6)
    assert labels is None


def check_ties_and_large_energies():
    """The first of equal labels wins; energies of any size do not overflow."""
    unary = torch.zeros(1, 4, 3)
    unary[0, :, 1] = torch.tensor([5.0, 1.0, 1.0, 7.0])
    unary[0, :, 2] = torch.tensor([1e30, -1e30, 3e4, 0.0])
    probs, labels = _lattice_cuda.mean_field(unary, [], 0, empty, labels=True)
    assert labels.tolist() == [[0, 1, 1]]
    close(probs, (-unary).softmax(1), 1e-6)


def test_ties_and_large_energies(module):
    with emulated(module):
        check_ties_and_large_energies()


def test_labels_alone(module):
    unary = values_of(1, 5, 12)
    with emulated(module):
        lattice, _ = both("build_image", (3, 4), spatial=(2.0, 2.0))
        term = _lattice_cuda.make_term(lattice, 3, "symmetric", 5, empty)
        nothing, labels = _lattice_cuda.mean_field(
            unary, [term], 2, empty, probs=False, labels=True
        )
        probs, _ = _lattice_cuda.mean_field(unary, [term], 2, empty)
    assert nothing is None
    assert torch.equal(labels.long(), probs.argmax(1))


def test_empty(module):
    with emulated(module):
        probs, labels = _lattice_cuda.mean_field(torch.zeros(0, 3, 6), [], 2, empty, labels=True)
    assert probs.shape == (0, 3, 6)
    assert labels.shape == (0, 6)


def test_bad_input(module):
    with emulated(module):
        term, other = (
            _lattice_cuda.make_term(
                both("build_image", size, spatial=(2.0, 2.0))[0], 3, "none", 5, empty
            )
            for size in ((3, 4), (4, 3))
        )
        unary = values_of(1, 5, 12)
        with pytest.raises(InputError, match="one size"):
            _lattice_cuda.mean_field(unary, [term, other], 1, empty)
        with pytest.raises(InputError, match="at most 16 terms"):
            _lattice_cuda.mean_field(unary, [term] * 17, 1, empty)
        with pytest.raises(InputError, match=r"unary must be \[B, C, 12\]"):
            _lattice_cuda.mean_field(unary[..., 1:], [term], 1, empty)
        with pytest.raises(InputError, match="mix must have 4 or 16 factors"):
            _lattice_cuda.mean_field(unary[:, 1:].contiguous(), [term], 1, empty)
        with pytest.raises(InputError, match="normalization must be"):
            _lattice_cuda.make_term(term.lattice, 3, "twice", 5, empty)


def test_sixteen_terms(module):
    with emulated(module):
        got, expected = both("build_image", (3, 4), spatial=(2.0, 2.0))
        unary = values_of(1, 2, 12)
        results = [
            of.mean_field(
                unary, [of.make_term(one, 0.1 * k, "none", 2, empty) for k in range(16)], 1, empty
            )[0]
            for of, one in ((_lattice_cuda, got), (_lattice, expected))
        ]
    close(*results, 1e-6)


def test_order_of_threads_does_not_matter(module, monkeypatch):
    results = []
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
        with emulated(module):
            lattices = [cuda for cuda, _ in lattices_of((18, 21), 2)]
            terms = [_lattice_cuda.make_term(x, 4, "symmetric", 5, empty) for x in lattices]
            results.append(_lattice_cuda.mean_field(values_of(2, 5, 378), terms, 3, empty)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- launches and bytes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting():
    return emulator.load(emulator.build("count"))


@pytest.mark.parametrize(
    ("room", "compat", "between"),
    [(ROOM, "potts", 1), (0, "potts", 1 + 6), (ROOM, "matrix", 2)],
)
def test_launches_and_bytes(counting, room, compat, between):
    """Two launches an iteration (kernels.md 8.2). The pass over the pixels reads the energies and,
    for each corner, weight, place and order (8 bytes, as 8.1 has it) once; Q stays in the block."""
    size, batch, classes, iterations = (16, 32), 2, 8, 2
    pixels, row = batch * size[0] * size[1], 4 * classes
    with counted(counting) as calls:
        lattices = [cuda for cuda, _ in lattices_of(size, batch)]
        weights = compats_of(compat, classes)
        terms = [
            _lattice_cuda.make_term(x, w, "symmetric", classes, empty)
            for x, w in zip(lattices, weights, strict=True)
        ]
        calls.clear()
        unary = values_of(batch, classes, size[0] * size[1])
        with mock.patch.object(_lattice_cuda, "_shared_bytes", return_value=room):
            _lattice_cuda.mean_field(unary, terms, iterations, empty)
    ((made, _),) = calls
    assert len(made) == 1 + iterations * (1 + between)
    passes = [launch for launch in made if "pixels_kernel" in launch.kernel]
    assert len(passes) == 1 + iterations
    # The lattice of places serves both images: its lists are read once, its rows are two.
    entries = [len(x.images[0][4]) for x in lattices]
    per_corner = 3 * pixels // batch + 6 * pixels
    factors = 2 * 4 * (pixels // batch + pixels)  # one array, seen under two names
    partial = row * (batch * entries[0] + entries[1])
    rows = row * (batch * sum(lattices[0].vertices) + sum(lattices[1].vertices))
    lists = (4 + 2) * sum(entries)
    small = 256
    energies = 4 * classes * pixels
    first, middle, last = passes
    assert first.read <= energies + (4 + 2) * per_corner + factors + lists + small
    assert first.written == partial
    assert middle.read <= energies + rows + 8 * per_corner + factors + lists + small
    assert middle.written == partial
    assert last.read <= energies + rows + (4 + 2) * per_corner + factors + lists + small
    assert last.written == energies
    for launch in passes:
        assert launch.arrays[0].loaded == energies
    if room and compat == "potts":
        tables = sum(
            (4 + 8 * (x.dims + 1)) * (sum(x.vertices) + 2) + 4 * len(x.images[0][4])
            for x in lattices
        )
        for launch in made[1::2]:
            assert launch.read <= partial + tables + small
            assert launch.written == rows


# ---- faults and sanitizers ---------------------------------------------------------------------


def all_checks():
    """Every kernel, small: sanitizers give every emulated thread one of its own."""
    for room in (0, ROOM):
        for compat in ("potts", "diagonal", "matrix"):
            yield partial(check_crf, size=(17, 9), compat=compat, room=room)
    for classes, room in ((1, ROOM), (5, ROOM), (13, 0), (21, 0), (40, 0)):
        yield partial(check_crf, size=(5, 7), classes=classes, room=room)
    yield partial(check_crf, size=(5, 7), classes=13, dtype="float64", room=0)
    yield partial(check_crf, size=(5, 7), start=True, normalization="before")
    yield partial(check_crf, size=(5, 7), normalization="after", iterations=1)
    yield partial(check_crf, size=(2, 3), batch=1, classes=300, iterations=1, room=0)
    yield check_ties_and_large_energies


def run_all(module):
    """What the sanitizers see."""
    run_checks(module, all_checks())


ROWS, PIXELS = "permutohedral_rows.cu", "dense_crf.cu"
HEADER, KERNEL = "cuda/permutohedral_rows.h", "kernels/dense_crf.h"
FAULTS = {
    "barrier before the splat": (
        PIXELS,
        "= logits;\n    }\n    __syncthreads();",
        "= logits;\n    }",
    ),
    "matrix transposed twice": (HEADER, "(matrix ? 1 : 0)", "(matrix ? 0 : 0)"),
}
MORE_FAULTS = {
    "after is left out": (PIXELS, "logits.value[c] += after *", "logits.value[c] += T(1) *"),
    "energies stay": (PIXELS, "pass.values = call.unary;", ""),
    "half of a group": (
        PIXELS,
        "lanes /= 2)\n    value +=",
        "lanes /= 4)\n    value +=",
    ),
    "before of another image": (PIXELS, "(blockIdx.y) * tiling.pixels());", "(0) * 1);"),
    "barrier after the load": (
        PIXELS,
        "load_chunk<T, kGroup>(pass, pixel, chunk, tile);\n    __syncthreads();",
        "load_chunk<T, kGroup>(pass, pixel, chunk, tile);",
    ),
    "barrier between chunks": (PIXELS, "if (kMany) __syncthreads();", ""),
    "sum of the chunks": (PIXELS, "total[step] *= kernels::unnormalised(highest[step], next)", ""),
    "padded labels count": (PIXELS, "? T(-INFINITY) : T(0))", "? T(0) : T(0))"),
    "last of equal labels": (PIXELS, "if (value > best)", "if (value >= best)"),
    "labels of a chunk": (PIXELS, "label = from + c;", "label = c;"),
    "sign of the energies": (PIXELS, "pass.sign = -1;", "pass.sign = 1;"),
    "one splat too few": (PIXELS, "splat = iteration < iterations;", "splat = iteration < 1;"),
    "label's own factor": (ROWS, "term.mix[channel] : T(0)", "term.mix[0] : T(0)"),
    "factor at every axis": (ROWS, "if (step + 1 == lattice.corners) value", "value"),
    "row of the matrix": (ROWS, "static_cast<int64_t>(classes) + c]", "int64_t{1} + c]"),
    "rows before the last axis": (ROWS, "term.rows[(step + 1) % 2][i", "term.rows[step % 2][i"),
    "gather of another copy": (ROWS, "term.partial + copy *", "term.partial + 0 *"),
    "quad of a row": (PIXELS, "pass.quads + quad;\n    Quad", "pass.quads;\n    Quad"),
    "exponential": (KERNEL, "exp_nonpositive(logit - highest)", "exp_nonpositive(logit)"),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_FAULTS)]
)
def test_seeded_fault_is_caught(fault):
    path = emulator.build(edits=((FAULTS | MORE_FAULTS)[fault],))
    assert not survives(path, all_checks), "the checks cannot see this fault"


@pytest.mark.long
def test_shipped_kernels_survive():
    assert survives(emulator.build(), all_checks)


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_are_silent(flavour):
    done = emulator.run_sanitized(__name__, flavour)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("flavour", "fault", "report"),
    [
        ("asan", (PIXELS, "if (quad < pass.quads)\n        term", "term"), "overflow"),
        ("asan", (PIXELS, "if (pass.labels && pixel >= 0)", "if (pass.labels)"), "overflow"),
        ("tsan", FAULTS["barrier before the splat"], "data race"),
        ("tsan", MORE_FAULTS["barrier between chunks"], "data race"),
    ],
)  # fmt: skip
def test_sanitizers_see_faults(flavour, fault, report):
    done = emulator.run_sanitized(__name__, flavour, (fault,))
    assert done.returncode != 0
    assert report in done.stderr
