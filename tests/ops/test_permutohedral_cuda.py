"""csrc/cuda/permutohedral*.cu, run by the emulator: lattice and filter equal the CPU's, with few
launches and bytes, clean under sanitizers, and wrong where a fault is seeded."""

from __future__ import annotations

from functools import partial
from unittest import mock

import numpy as np
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


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


def bilateral(size, batch=1, *, dtype="uint8", widths=(13.0,) * 3, spatial=(9.0, 9.0), last=False):
    image = image_of(size, batch, channels=len(widths), dtype=dtype)
    if last:
        image = image.permute(0, 2, 3, 1).contiguous()
    return both(
        "build_image", size, spatial=spatial, image=image, channels_last=last, widths=widths
    )


def free(dims, points, batch=1, *, spread=2.0, size=None):
    features = spread * values_of(batch, dims, points, seed=dims)
    features[..., : points // 3] = features[..., :1]  # equal points
    return both("build", features, size=size)


LATTICES = {
    "place": lambda: both("build_image", (19, 37), spatial=(3.0, 3.0)),
    "fine place": lambda: both("build_image", (17, 18), spatial=(1.0, 0.7)),
    "bilateral": lambda: bilateral((18, 21), 2),
    "floats, channels last": lambda: bilateral((5, 40), 2, dtype="float32", last=True),
    "colour": lambda: bilateral((16, 17), widths=(13.0, 9.0, 30.0), spatial=None),
    "one channel": lambda: bilateral((7, 6), widths=(20.0,), spatial=None),
    "four features": lambda: bilateral((17, 5), widths=(20.0, 7.0)),
    "one pixel": lambda: bilateral((1, 1)),
    "points": lambda: free(3, 300, 3),
    "seven features": lambda: free(7, 40, spread=0.5),
    "pixels with features": lambda: free(2, 17 * 19, size=(17, 19)),
    "constant": lambda: both("build", torch.ones(2, 5, 300)),
}


def check_filter(lattices, *, batch=None, channels=3, dtype="float32", reverse=False, room=None):
    """`room`: bytes of shared memory; 0 takes the kernels that go through global memory."""
    got, expected = lattices()
    batch = batch or got.batch
    values = values_of(batch, channels, got.height * got.width, dtype=dtype)
    factors = [values_of(got.batch, values.shape[2], seed=s).abs() + 0.5 for s in (1, 2)]
    keywords = {"before": factors[0], "after": factors[1], "reverse": reverse}
    want = _lattice.filter(expected, values, empty, **keywords)
    room = 48 * 1024 if room is None else room
    with mock.patch.object(_lattice_cuda, "_shared_bytes", return_value=room):
        result = _lattice_cuda.filter(got, values, empty, **keywords)
    close(result, want, 1e-13 if dtype == "float64" else 3e-6)


@pytest.mark.parametrize("lattices", LATTICES.values(), ids=LATTICES.keys())
def test_filter_equals_the_cpu(module, lattices):
    with emulated(module):
        check_filter(lattices)
        check_filter(lattices, reverse=True, room=0)


@pytest.mark.parametrize("channels", [1, 4, 5, 9, 17, 33])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_channels(module, channels, dtype):
    with emulated(module):
        for room in (0, None):
            check_filter(partial(free, 2, 30), channels=channels, dtype=dtype, room=room)


def test_one_lattice_for_a_batch(module):
    with emulated(module):
        for room in (0, None):
            check_filter(LATTICES["place"], batch=3, room=room)


def test_reverse_is_the_adjoint(module):
    with emulated(module):
        lattice, _ = bilateral((18, 21), 2)
        x, y = (values_of(2, 3, 18 * 21, seed=s, dtype="float64") for s in (1, 2))
        there = _lattice_cuda.filter(lattice, x, empty)
        back = _lattice_cuda.filter(lattice, y, empty, reverse=True)
    assert (there * y).sum().item() == pytest.approx((x * back).sum().item(), rel=1e-12)


def test_order_of_threads_does_not_matter(module, monkeypatch):
    """Not even in the last bit: nothing is added by atomics but counts."""
    results = []
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
        with emulated(module):
            lattice, _ = bilateral((18, 21), 2)
            results.append(_lattice_cuda.filter(lattice, values_of(2, 5, 18 * 21), empty))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_table_that_is_too_small(module, monkeypatch):
    """Every pixel has vertices of its own: the first table overflows, the next one holds them."""
    monkeypatch.setattr(_lattice_cuda, "_PROBES", 3)
    rooms = []

    def pick(name):
        function = getattr(module, name)
        if name == "permutohedral_tiles_cuda":
            return lambda *a: (rooms.append(a[-2]), function(*a))
        return function

    with mock.patch.object(_lattice_cuda, "cuda_function", pick):
        check_filter(lambda: free(5, 300, spread=90.0))
    assert rooms == [3, 3, 8192]  # at last twice as many slots as corners, which holds any key


def check_refused(value, message):
    features = values_of(2, 5, 40)
    features[1, 3, 17] = value
    if value == 3e5:
        features[1, :, 17] = value  # within the range of floats, beyond that of keys
    try:
        _lattice_cuda.build(features, empty)
    except InputError as error:
        assert message in str(error)  # noqa: PT017
    else:
        raise AssertionError(f"{value} is taken")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "finite"), (np.inf, "finite"), (1e7, "cells"), (3e5, "cells")]
)
def test_bad_features(module, value, message):
    with emulated(module):
        check_refused(value, message)


def test_bad_shapes(module):
    with emulated(module):
        lattice, _ = bilateral((5, 4), 2)
        with pytest.raises(InputError, match=r"values must be \[2, C, 20\]"):
            _lattice_cuda.filter(lattice, values_of(3, 1, 20), empty)
        with pytest.raises(InputError, match="float32 or float64"):
            _lattice_cuda.filter(lattice, values_of(2, 1, 20).half(), empty)
    with pytest.raises(InputError, match="1 to 15"):
        _lattice_cuda.build(values_of(1, 16, 20), empty)
    with pytest.raises(InputError, match="H \\* W"):
        _lattice_cuda.build(values_of(1, 2, 20), empty, size=(3, 7))
    with pytest.raises(InputError, match="positive"):
        _lattice_cuda.build_image((3, 3), empty, spatial=(0.0, 1.0))
    with pytest.raises(InputError, match="image must be"):
        _lattice_cuda.build_image((3, 3), empty, image=image_of((3, 4)), widths=(1.0,) * 3)


def test_empty(module):
    with emulated(module):
        nothing = _lattice_cuda.build(torch.zeros(0, 3, 10), empty)
        assert _lattice_cuda.filter(nothing, torch.zeros(0, 2, 10), empty).shape == (0, 2, 10)
        lattice, _ = bilateral((3, 2))
        assert _lattice_cuda.filter(lattice, torch.zeros(1, 0, 6), empty).shape == (1, 0, 6)


@pytest.mark.parametrize("normalization", _lattice.NORMALIZATIONS)
def test_normalisers(module, normalization):
    with emulated(module):
        got, expected = bilateral((9, 11), 2)
        factors = _lattice_cuda.normalisers(got, normalization, empty)
    for factor, want in zip(
        factors, _lattice.normalisers(expected, normalization, empty), strict=True
    ):
        assert (factor is None) == (want is None)
        if want is not None:
            close(factor, want, 3e-6)


# ---- launches and bytes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting():
    return emulator.load(emulator.build("count"))


def test_build_reads_the_image_once(counting):
    """Per pixel: 3 bytes in, and per corner 4 + 2 + 2 bytes that stay (kernels.md 8.1: 8)."""
    size, batch, corners = (32, 48), 2, 6
    pixels = batch * size[0] * size[1]
    with counted(counting) as calls:
        lattice, _ = bilateral(size, batch, spatial=(30.0, 30.0), widths=(40.0,) * 3)
    (tiles, arguments), (keys, _), (rest, _) = calls
    assert [launch.kernel for launch in tiles][:2] == ["&layout_kernel", "cudaMemsetAsync"]
    assert len(tiles) == 3
    assert len(keys) == 2
    assert len(rest) == 3
    build = tiles[2]
    assert build.arrays[0].read == build.arrays[0].loaded == 3 * pixels
    for position, bytes_each in ((4, 4), (5, 2), (6, 2)):  # weights, local, order
        each = build.arrays[position]
        assert each.written == each.stored == bytes_each * corners * pixels
        assert each.read == 0
    # A vertex is inserted once per tile, not once per corner: at least one compare-and-swap each.
    entries = len(lattice.images[0][4])
    assert sum(lattice.vertices) < entries < corners * pixels / 4
    assert build.arrays[3].stored <= 2 * 8 * entries
    slots = len(arguments[3])
    assert sum(launch.arrays[0].read for launch in keys) == 8 * slots
    assert rest[2].arrays[10].written == 8 * corners * (sum(lattice.vertices) + 1)


@pytest.mark.parametrize(("room", "launches"), [(48 * 1024, 3), (0, 2 + 1 + 6)])
def test_filter_launches_and_bytes(counting, room, launches):
    """Splat and slice read 6 bytes a corner and the values once; the rest is the lattice's size."""
    size, channels, corners = (32, 48), 8, 6
    pixels, quads = size[0] * size[1], 2
    with counted(counting) as calls:
        lattice, _ = bilateral(size)
        calls.clear()
        values = values_of(1, channels, pixels)
        with mock.patch.object(_lattice_cuda, "_shared_bytes", return_value=room):
            _lattice_cuda.filter(lattice, values, empty)
    ((made, _),) = calls
    assert len(made) == launches
    splat, slice_ = made[0], made[-1]
    entries, rows = len(lattice.images[0][4]), lattice.vertices[0] + 1
    row = 16 * quads
    assert splat.arrays[0].read == splat.arrays[0].loaded == 4 * channels * pixels
    assert splat.written == row * entries
    weights_and_order = (4 + 2) * corners * pixels
    lists = (4 + 2) * entries
    assert splat.read <= 4 * channels * pixels + weights_and_order + lists + 64
    assert slice_.written == 4 * channels * pixels
    assert slice_.read <= weights_and_order + lists + row * rows + 64
    middle = made[1:-1]
    if room:
        # The partial rows, the lists and the neighbours once, and the rows out.
        (only,) = middle
        assert only.read <= row * entries + 4 * entries + 4 * (rows + 2) + 8 * corners * rows + 64
        assert only.written <= row * rows
    else:
        for launch in middle[1:]:
            assert launch.read <= row * rows + 8 * rows + 64
            assert launch.written == row * rows


# ---- faults and sanitizers ---------------------------------------------------------------------


def all_checks():
    """Every kernel at odd sizes."""
    for name in ("bilateral", "floats, channels last", "four features", "place", "points"):
        yield partial(check_filter, LATTICES[name])
        yield partial(check_filter, LATTICES[name], reverse=True, room=0)
    yield partial(check_filter, LATTICES["place"], batch=3)
    yield partial(check_filter, LATTICES["place"], batch=2, room=0)
    yield partial(check_filter, LATTICES["constant"], channels=5)
    yield partial(check_refused, np.inf, "finite")
    yield partial(check_filter, partial(free, 2, 30), channels=33)


def run_all(module):
    """What the sanitizers see."""
    run_checks(module, all_checks())


BUILD, ROWS, PIXELS = "permutohedral.cu", "permutohedral_rows.cu", "dense_crf.cu"
HEADER, EMBED = "cuda/permutohedral.h", "kernels/permutohedral.h"
FAULTS = {
    "tiles of an image": (HEADER, "(tile % columns << shift)", "(tile / columns << shift)"),
    "barrier of the axes": (ROWS, "__syncthreads();\n    const int32_t axis", "const int32_t axis"),
    "end of a list": (
        PIXELS,
        "lattice.starts[first + e + 1] : all",
        "lattice.starts[first + e] : all",
    ),
}
MORE_FAULTS = {
    "first partial": (ROWS, "k = lattice.begin[before + v]; k", "k = lattice.begin[v] + 1; k"),
    "axes in order": (
        ROWS,
        "reverse ? lattice.corners - 1 - step : step;\n  const",
        "step;\n  const",
    ),
    "sort by key alone": (BUILD, "|| (first == second && left > right)", ""),
    "barrier of the sort": (BUILD, "      }\n      __syncthreads();", "      }"),
    "last stage of the sort": (BUILD, "size <= count; size *= 2", "size < count; size *= 2"),
    "heads of equal keys": (BUILD, "keys[k] != keys[k - 1]", "keys[k] == keys[k - 1]"),
    "warps before": (BUILD, "if (warp < static_cast", "if (warp <= static_cast"),
    "image in the key": (BUILD, "static_cast<uint64_t>(b) <<", "static_cast<uint64_t>(0) <<"),
    "axis of a rank": (BUILD, "axis_of_rank[d - r + 1]", "axis_of_rank[r - 1]"),
    "probing stops": (BUILD, "if (found == kEmpty || found == key) return", "return"),
    "one channel only": (BUILD, "(points.channels_last ? c : c * pixels)", "0"),
    "padding is a pixel": (BUILD, "pixel >= 0 ? weight[r] : 0.0f", "0.5f"),
    "copy of a row": (ROWS, "blockIdx.y * all + i", "i"),
    "row of no vertex": (ROWS, "both.previous ? both.previous - before", "true ? both.previous"),
    "weight of a neighbour": (ROWS, "from[v] + T(0.5) * (next", "from[v] + T(0.25) * (next"),
    "pixels of a group": (PIXELS, "kPixels + threadIdx.x / kGroup;\n      Q", "kPixels;\n      Q"),
    "lattice of the image": (PIXELS, "(blockIdx.y) * tiling.tiles", "(0) * tiling.tiles"),
    "rows of the image": (PIXELS, "term.result() + copy *", "term.result() + 0 *"),
    "tie of residuals": (EMBED, "residual < elevated[j]", "residual <= elevated[j]"),
}


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
        ("asan", (BUILD, "if (v > vertices) return", "if (v > vertices + 1) return"), "overflow"),
        ("asan", (BUILD, "if (corners[k] >= pairs) continue;", ""), "overflow"),
        ("asan", (ROWS, "return {i / quads,", "return {i / quads + 1,"), "overflow"),
        ("tsan", FAULTS["barrier of the axes"], "data race"),
        ("tsan", MORE_FAULTS["barrier of the sort"], "data race"),
    ],
)
def test_sanitizers_see_faults(flavour, fault, report):
    done = emulator.run_sanitized(__name__, flavour, (fault,))
    assert done.returncode != 0
    assert report in done.stderr
