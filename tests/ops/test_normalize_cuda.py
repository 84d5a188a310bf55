"""csrc/cuda/normalize*.cu, run by the emulator: equal to plain torch, clean under sanitizers, wrong
where a fault is seeded, and no more launches and memory traffic than the algorithm needs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulator
from tests.ops import test_normalize_norms as norms
from tests.ops import test_normalize_passes as passes
from tests.ops.emulated_normalize import Emulated
from wsis.ops._normalize import RULES
from wsis.ops.normalize import add_background, normalize_cams
from wsis.ops.norms import EPS, NORMS

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


# ---- what is checked -----------------------------------------------------------------------------


def check_passes(module, variant="seam", size=(45, 61), grids=((5, 7), (10, 14)), leading=(2, 3),
                 dtype=torch.float32, crop=None, masked=True, weight=1.0, seed=0):  # fmt: skip
    maps, flips = passes.passes(list(grids), leading, seed, dtype)
    label = (passes.draw(*leading, seed=seed) > -0.3) * weight if masked else None
    call = Emulated(module).normalize_cams
    passes.check(maps, size, call=call, variant=variant, flips=flips, label=label, crop=crop)


def check_background(module, kind="power", value=4.0, variant="rtc", masked=True, size=(37, 50)):
    maps, flips = passes.passes([(5, 7), (9, 4)], leading=(2, 3))
    label = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]) if masked else None
    options = {"variant": variant, "flips": flips, "label": label}
    scores = Emulated(module).normalize_cams(
        maps, size, **options, background=kind, background_value=value
    )
    expected = add_background(normalize_cams(maps, size, **options), kind, value)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


def check_labels(module, **case):
    passes.check_labels(Emulated(module).cams_to_labels, **case)


def check_norm(module, kind="seed", shape=(2, 3, 17, 13), dtype=torch.float64, seed=0):
    x = norms.sample(shape, seed, dtype)
    norms.check(kind, x, Emulated(module).norm(kind))


def check_ties(module):
    """The first of the positions that attain an extremum gets its gradient, wherever it is."""
    for size in ((1, 7), (67, 65)):
        x = norms.sample((1, 3, *size)).abs() + 0.5
        flat = x.flatten(2)
        flat[..., [1, 4, -1]], flat[..., [2, 5, -2]] = 9.0, 0.25
        for kind in norms.NORMS:
            norms.check(kind, x, Emulated(module).norm(kind))
    x = torch.tensor([1.0, 2.0]).double().repeat(3, 1).view(1, 3, 1, 2)
    norms.check("seed", x, Emulated(module).norm("seed"))


CHECKS = [
    check_passes,
    partial(check_passes, variant="afa", size=(17, 131), grids=((3, 20),), masked=False),
    partial(check_passes, variant="psa", size=(33, 140), crop=(18, 129)),
    partial(check_passes, size=(8, 9), grids=((3, 2),), weight=1e-4),  # so that eps matters
    partial(check_background, masked=False),
    check_background,
    partial(check_background, kind="complement", variant="toco"),
    check_labels,
    partial(check_labels, height=17, width=23, classes=5, seed=4),
    check_norm,
    partial(check_norm, kind="ctr", shape=(1, 3, 67, 65), dtype=torch.float32),
    partial(check_norm, kind="max_norm", shape=(2, 2, 67, 65)),
    check_ties,
]


@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_equal_plain_torch(module, monkeypatch, check, seed):
    monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
    check(module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("variant", passes.VARIANTS)
def test_variants(module, variant, dtype):
    check_passes(module, variant, dtype=dtype, grids=[(5, 7), (3, 2)], size=(20, 30))


@pytest.mark.parametrize("kind", norms.NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_norms(module, kind, dtype):
    check_norm(module, kind, (2, 3, 7, 5), dtype)


@pytest.mark.parametrize(("kind", "value"), [("constant", 0.2), ("power", 2.5), ("power", 32)])
def test_backgrounds(module, kind, value):
    check_background(module, kind, value)


ANY = {
    "variant": st.sampled_from(passes.VARIANTS),
    "kind": st.sampled_from(list(norms.NORMS)),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "seed": st.integers(0, 9999),
}


def check_any(module, grids, size, batch, classes, variant, kind, dtype, seed):
    check_passes(module, variant, size, grids, (batch, classes), dtype, seed=seed)
    check_norm(module, kind, (batch, classes + 1, *size), dtype, seed)
    check_labels(module, batch=batch, classes=classes, height=size[0], width=size[1], seed=seed)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    grids=st.lists(st.tuples(*[st.integers(1, 12)] * 2), min_size=1, max_size=2),
    size=st.tuples(*[st.integers(1, 20)] * 2),
    batch=st.integers(1, 2),
    classes=st.integers(1, 2),
    **ANY,
)
def test_anything(module, **case):
    check_any(module, **case)


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    grids=st.lists(st.tuples(*[st.integers(1, 130)] * 2), min_size=1, max_size=4),
    size=st.tuples(*[st.integers(1, 130)] * 2),
    batch=st.integers(0, 2),
    classes=st.integers(1, 4),
    **ANY,
)
def test_anything_more(module, **case):
    if case["batch"]:
        check_any(module, **case)


def test_empty(module):
    scores = Emulated(module).normalize_cams(
        [torch.zeros(0, 2, 3, 3)], (5, 5), variant="psa", flips=[False]
    )
    assert scores.shape == (0, 2, 5, 5)


@pytest.mark.parametrize(
    ("variant", "bad"),
    [(v, bad) for v in ("seam", "afa") for bad in (float("nan"), float("inf"))]
    + [("psa", -float("inf"))],
)
def test_a_value_that_is_not_finite_spoils_its_class_only(module, variant, bad):
    maps, flips = passes.passes([(5, 7)], leading=(2, 3))
    maps[1][1, 2, 3, 4] = bad
    scores = Emulated(module).normalize_cams(maps, (20, 30), variant=variant, flips=flips)
    assert scores[1, 2].isnan().all()
    assert scores[0].isfinite().all() and scores[1, :2].isfinite().all()


# Real threads make every shuffle and barrier slow, so few blocks: two tiles or chunks of a plane.
SANITIZED = [
    partial(check_passes, size=(18, 20), grids=((3, 4), (5, 4)), leading=(1, 2)),
    partial(check_passes, variant="afa", size=(9, 131), grids=((3, 5),), leading=(1, 1)),
    partial(check_background, size=(9, 20)),
    partial(check_labels, batch=1, height=17, width=23),
    partial(check_norm, shape=(1, 2, 7, 5)),
    partial(check_norm, kind="ctr", shape=(1, 2, 67, 65), dtype=torch.float32),
]


def run_all(module):
    """What the sanitizers see. A wrong value does not stop it: a report may come later."""
    wrong = []
    for check in SANITIZED:
        try:
            check(module)
        except AssertionError:
            wrong.append(check)
    assert not wrong


# ---- traffic -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting():
    return emulator.load(emulator.build("count"))


def count(function, arrays, call):
    """Launches of ``call(*arrays)``, which calls ``function``."""
    call.__module__ = function.__module__
    return emulator.count(call, *arrays)


@pytest.mark.parametrize("variant", ["seam", "toco"])
def test_passes_are_two_launches_and_every_score_is_written_once(counting, variant):
    rule, size, (batch, classes) = RULES[variant], (40, 150), (2, 3)
    maps, flips = passes.passes([(5, 20), (10, 40)], (batch, classes), dtype=torch.float32)
    label = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
    present, planes = int(label.sum()), label.size
    scores = np.zeros((batch, classes, *size), np.float32)
    tiles = counting.normalize_cams_tiles(*size)
    partial = np.zeros((planes, tiles, 2), np.float32)
    function = counting.normalize_cams_cuda
    arrays = [m.numpy() for m in maps]

    def call(label, scores, partial, *arrays):
        function(list(arrays), flips, label, scores, partial, *size, rule.relu_each,
                 rule.flip_max, NORMS[rule.norm], EPS, 0, 0)  # fmt: skip

    reduce, write = count(function, (label, scores, partial, *arrays), call)
    maps_bytes = sum(a.nbytes for a in arrays)
    for launch in (reduce, write):  # only maps of the label, each byte of them once
        assert sum(launch.arrays[3 + i].read for i in range(4)) == maps_bytes * present // planes
    assert reduce.arrays[1].written == 0
    assert reduce.arrays[2].written == reduce.arrays[2].stored == 8 * tiles * present
    assert write.arrays[1].written == write.arrays[1].stored == scores.nbytes
    assert write.arrays[1].read == 0
    # Four loads a pixel and pass would be 16 bytes; rows kept in registers make it a few.
    pixels = present * size[0] * size[1]
    loaded = sum(write.arrays[3 + i].loaded for i in range(4))
    assert loaded <= 4 * 16 * pixels / 3
    total = reduce.read + reduce.written + write.read + write.written
    floor = maps_bytes * present // planes + scores.nbytes
    assert total <= 1.5 * floor


def test_norms_read_maps_twice_and_write_scores_once(counting):
    batch, classes, n = 2, 3, 5000
    maps = norms.draw(batch, classes, n, dtype=torch.float32).numpy()
    scores, extrema = np.zeros_like(maps), np.zeros((batch, classes, 2), np.float32)
    chunks = counting.norm_planes_chunks(n)
    partial = np.zeros((batch * classes, chunks, 2), np.float32)
    codes = 0, 0, NORMS["dead_zone"], EPS, 0
    reduce, write = emulator.count(
        counting.norm_planes_cuda, maps, partial, scores, extrema, *codes
    )
    assert reduce.arrays[0].loaded == write.arrays[0].loaded == maps.nbytes
    assert reduce.arrays[2].written == 0
    assert write.arrays[2].stored == scores.nbytes and write.arrays[2].read == 0

    gradient, positions = np.zeros_like(maps), np.zeros(partial.shape, np.int32)
    arrays = scores, maps, extrema, partial, positions, gradient
    sums, write = emulator.count(counting.norm_planes_backward_cuda, *arrays, *codes)
    for launch in (sums, write):
        assert launch.arrays[0].loaded == launch.arrays[1].loaded == maps.nbytes
    assert sums.arrays[5].written == 0
    assert write.arrays[5].stored == gradient.nbytes


def test_background_and_labels_are_one_launch(counting):
    batch, classes, size = 2, 3, (9, 14)
    n = size[0] * size[1]
    scores = np.random.default_rng(0).random((batch, 1 + classes, n), np.float32)
    label = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
    (launch,) = emulator.count(counting.add_background_cuda, scores, label, 1, 4.0, 0.0, 0)
    assert launch.arrays[0].loaded == 4 * n * int(label.sum())
    assert launch.arrays[0].stored == 4 * n * batch
    cams, boxes = scores[:, 1:].copy().reshape(batch, classes, *size), np.array([[0, 9, 0, 14]] * 2)
    labels = np.zeros((batch, *size), np.int64)
    (launch,) = emulator.count(
        counting.cams_to_labels_cuda, cams, label, boxes, labels, 0.2, 0.4, 255, 0
    )
    assert launch.arrays[0].loaded == 4 * n * int(label.sum())
    assert launch.arrays[3].stored == labels.nbytes


# ---- sanitizers and seeded faults --------------------------------------------------------------


MERGE, PLANES, PIXELS = "normalize.cu", "normalize_planes.cu", "normalize_pixels.cu"
BLOCK = "cuda/block.h"
# Wrong, but within their memory: what reaches beyond it is for the address sanitizer.
FAULTS = {
    "barrier of a reduction removed": (BLOCK, "  __syncthreads();\n  V all", "  V all"),
    "left and right of a mirrored map": (
        MERGE,
        "pass.w - 1 - column.second : column.second",
        "pass.w - 1 - column.first : column.second",
    ),
    "row below is kept when it must be read": (
        MERGE,
        "tap.first == below ? bottom",
        "tap.first >= below ? bottom",
    ),
    "plane of a chunk": (PLANES, "plane = blockIdx.x / chunks;", "plane = blockIdx.x % chunks;"),
    "last of several positions": (PLANES, "a.high < b.high ? a", "a.high > b.high ? a"),
    "channels before the classes": (
        PLANES,
        "(image + 1) * planes.skip_in",
        "image * planes.skip_in",
    ),
    "ties are not counted": (PIXELS, "ties + T(1) : ties", "ties : ties"),
    "the later class wins a tie": (PIXELS, "channel = score > best", "channel = score >= best"),
    "bottom of the box": (PIXELS, "y < box[1]", "y <= box[1]"),
}
MORE_FAULTS = {
    "one thread leaves before the barrier": (
        MERGE,
        "const Extrema<T> all = join_block<kThreads>(mine, slots);",
        "if (threadIdx.x == 5) return;\n"
        "  const Extrema<T> all = join_block<kThreads>(mine, slots);",
    ),
    "taps of another pass": (MERGE, "passes.pass[i / kRows].h", "passes.pass[0].h"),
    "extrema of some tiles": (
        MERGE,
        "for (int32_t i = threadIdx.x; i < tiles; i += kThreads)",
        "for (int32_t i = threadIdx.x; i < tiles - 1; i += kThreads)",
    ),
    "weight forgotten": (MERGE, "total[k] *= weight;", "total[k] *= T(1);"),
    "plain and flipped swapped roles": (MERGE, "if (m % 2 == 0)", "if (m % 2 == 1)"),
    "tile of a column": (MERGE, "index / across * kRows", "index % across * kRows"),
    "chunk ends early": (PLANES, ": planes.n;\n    const", ": planes.n - 1;\n    const"),
    "sums of the first chunk only": (
        PLANES,
        "const int64_t row = 2 * (chunk.plane * chunks + i);",
        "const int64_t row = 2 * (chunk.plane * chunks);",
    ),
    "extrema written by every chunk's neighbour": (
        PLANES,
        "extrema[2 * chunk.plane + 1] = plane.high;",
        "extrema[2 * chunk.plane + 1] = plane.low;",
    ),
    "gradient of the minimum": (PLANES, "if (i == found.low && plane.low > T(0))", "if (false)"),
    "absent class is read": (PIXELS, "is_absent ? absent", "is_absent ? T(0)"),
    "image of a pixel": (
        PIXELS,
        "scores + image * (num_classes + 1) * n",
        "scores + image * num_classes * n",
    ),
    "row of a pixel": (PIXELS, "x = pixel % columns", "x = pixel % rows"),
    "share of the ties": (PIXELS, "const T part = g[0] / ties;", "const T part = g[0];"),
    "half of a warp is left out": (BLOCK, "int lanes = kWarp / 2", "int lanes = kWarp / 4"),
    "the last warp is left out": (BLOCK, "warp < kThreads / kWarp", "warp < kThreads / kWarp - 1"),
    "only the first thread's maximum": (
        MERGE,
        "partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = all.high;",
        "partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = mine.high;",
    ),
}


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_FAULTS)]
)
def test_seeded_fault_is_caught(monkeypatch, fault):
    edit = (FAULTS | MORE_FAULTS)[fault]
    broken = emulator.load(emulator.build(edits=(edit,)))
    for seed in ("0", "1"):
        monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
        for check in CHECKS:
            try:
                check(broken)
            except (AssertionError, RuntimeError):
                return
    pytest.fail("the tests above cannot see this fault")


def test_divergence_is_named():
    broken = emulator.load(emulator.build(edits=(MORE_FAULTS[next(iter(MORE_FAULTS))],)))
    with pytest.raises(RuntimeError, match="barrier divergence"):
        check_passes(broken)


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_are_silent(flavour):
    done = emulator.run_sanitized(__name__, flavour)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("flavour", "fault", "report"),
    [
        ("asan", (MERGE, "if (tile.y + k < frame.rows)", ""), "heap-buffer-overflow"),
        ("asan", (PLANES, ": planes.n;\n    const", ": planes.n + 1;\n    const"), "overflow"),
        ("asan", (PIXELS, "best, is_absent ? absent : out[(k + 1) * n]",
                  "best, out[(k + 2) * n]"), "heap-buffer-overflow"),
        ("tsan", FAULTS["barrier of a reduction removed"], "data race"),
        ("tsan", (PLANES, "if (threadIdx.x == 0 && chunk.begin == 0)", ""), "data race"),
    ],
)  # fmt: skip
def test_sanitizers_see_faults(flavour, fault, report):
    done = emulator.run_sanitized(__name__, flavour, (fault,))
    assert done.returncode != 0
    assert report in done.stderr
    # Frames have a file or a function, as the debug information of inlined code has it.
    assert fault[0] in done.stderr or "wsis::cuda" in done.stderr
