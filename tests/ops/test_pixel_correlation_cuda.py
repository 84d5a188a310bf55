"""csrc/cuda/pixel_correlation.cu, run by the emulator: equal to the CPU operator, few launches and
bytes, clean under sanitizers, and wrong where a fault is seeded."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from tests import emulator
from wsis.ops import _pixel_correlation as native

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")

EPS = 1e-5


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


def draw(batch, classes, depth, pixels, dtype, seed=0):
    """cams, features, gradient."""
    random = np.random.default_rng(seed)
    shapes = ((batch, classes, pixels), (batch, depth, pixels), (batch, classes, pixels))
    cams, features, gradient = (random.standard_normal(s).astype(dtype) for s in shapes)
    features[..., : pixels // 9] = 0
    return cams, features, gradient


def forward(module, cams, features, temperature=0.0, maps=1, result=None):
    """saved, result; what is not written stays not a number."""
    batch, classes, pixels = cams.shape
    result = np.zeros_like(cams) if result is None else result
    saved = np.full((batch, classes + 1, pixels), np.nan, cams.dtype)
    units, norms = np.full_like(features, np.nan), np.full_like(features[:, 0], np.nan)
    options = native._options(EPS, temperature, maps)
    module.pixel_correlation_cuda(cams, features, saved, result, units, norms, *options, 0)
    return saved, result


def backward(module, gradient, cams, features, saved, temperature, wanted=(True, True), maps=1):
    """cams_gradient, features_gradient."""
    batch, classes, pixels = cams.shape
    outputs = [
        np.zeros_like(cams) if wanted[0] else None,
        np.full_like(features, np.nan) if wanted[1] else None,
    ]
    units, norms = np.full_like(features, np.nan), np.full_like(features[:, 0], np.nan)
    terms = np.full((batch, 2 * (classes + 1), pixels), np.nan, cams.dtype)
    options = native._options(EPS, temperature, maps)
    module.pixel_correlation_backward_cuda(
        gradient, cams, features, saved, *outputs, units, norms, terms, *options, 0
    )
    return outputs


def on_cpu(cams, features, gradient, temperature):
    """saved, result, cams_gradient, features_gradient."""
    ops, (cams, features, gradient) = (
        torch.ops.wsis,
        map(torch.from_numpy, (cams, features, gradient)),
    )
    result, saved = ops.pixel_correlation(cams, [features], EPS, temperature)
    cams_gradient, (features_gradient,) = ops.pixel_correlation_backward(
        gradient, cams, [features], saved, EPS, temperature, True, [True]
    )
    return [x.numpy() for x in (saved[0], result, cams_gradient, features_gradient)]


def close(got, expected):
    tolerance = 1e-12 if expected.dtype == np.float64 else 2e-6
    assert got.dtype == expected.dtype
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    assert np.abs(got - expected).max(initial=0) <= tolerance * scale


def check(module, shape=(2, 3, 5, 70), dtype="float32", temperature=0.0):
    cams, features, gradient = draw(*shape, dtype)
    expected = on_cpu(cams, features, gradient, temperature)
    saved, result = forward(module, cams, features, temperature)
    got = [saved, result, *backward(module, gradient, cams, features, saved, temperature)]
    for one, other in zip(got, expected, strict=True):
        close(one, other)


SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 70),  # tiles of 64 (float64: 32) pixels
    (1, 2, 17, 64),
    (1, 31, 16, 33),  # as many maps as the small kernel takes
    (1, 33, 3, 65),
    (1, 70, 4, 40),  # two groups of maps
    (1, 2, 130, 67),  # two groups of features
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_directions(module, shape, dtype):
    check(module, shape, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_softmax(module, shape, dtype):
    check(module, shape, dtype, 0.2)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_wanted(module, wanted):
    cams, features, gradient = draw(1, 2, 3, 67, "float64")
    saved, _ = forward(module, cams, features)
    all_of_it = backward(module, gradient, cams, features, saved, 0.0)
    some = backward(module, gradient, cams, features, saved, 0.0, wanted)
    for one, other, is_wanted in zip(some, all_of_it, wanted, strict=True):
        assert np.array_equal(one, other) if is_wanted else one is None


def test_maps_are_averaged(module):
    cams, features, _ = draw(1, 2, 3, 67, "float64")
    other = draw(1, 2, 6, 67, "float64", seed=1)[1]
    _, first = forward(module, cams, features)
    _, second = forward(module, cams, other)
    _, result = forward(module, cams, features, maps=2)
    forward(module, cams, other, maps=2, result=result)
    close(result, (first + second) / 2)


def test_order_of_threads_does_not_matter(module, monkeypatch):
    for seed in ("1", "2"):
        monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
        check(module)


def test_a_bad_value_spoils_its_image_only(module):
    cams, features, gradient = draw(2, 2, 3, 67, "float32")
    features[1, 0, 5] = np.nan
    saved, result = forward(module, cams, features)
    assert np.isnan(result[1]).all() and np.isfinite(result[0]).all()
    gradients = backward(module, gradient, cams, features, saved, 0.0)
    assert all(np.isfinite(g[0]).all() for g in gradients)


# ---- launches and bytes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting():
    return emulator.load(emulator.build("count"))


def test_nothing_of_the_size_of_all_pairs_is_touched(counting):
    batch, classes, depth, pixels = 2, 5, 7, 150
    cams, features, gradient = draw(batch, classes, depth, pixels, "float32")
    saved, result = (np.zeros((batch, c, pixels), np.float32) for c in (classes + 1, classes))
    units, norms = np.empty_like(features), np.empty_like(features[:, 0])
    options = native._options(EPS, 0.0, 1)
    pixel = 4 * batch * pixels  # bytes of one number per pixel
    unit, maps = emulator.count(
        counting.pixel_correlation_cuda, cams, features, saved, result, units, norms, *options, 0
    )
    assert (unit.read, unit.written) == (depth * pixel, (depth + 1) * pixel)
    assert maps.read == (depth + 2 * classes) * pixel
    assert maps.written == (2 * classes + 1) * pixel
    cams_gradient, features_gradient = np.zeros_like(cams), np.empty_like(features)
    terms = np.empty((batch, 2 * (classes + 1), pixels), np.float32)
    launches = emulator.count(
        counting.pixel_correlation_backward_cuda,
        *(gradient, cams, features, saved, cams_gradient, features_gradient, units, norms, terms),
        *options,
        0,
    )
    assert [launch.read // pixel for launch in launches] == [
        depth,
        3 * classes + 1,
        depth + 2 * classes,
        depth + 2 * (classes + 1),
        2 * depth + 1,
    ]
    assert [launch.written // pixel for launch in launches] == [
        depth + 1,
        2 * (classes + 1),
        classes,
        depth,
        depth,
    ]
    assert all(launch.shared == 0 for launch in launches)


# ---- faults and sanitizers ---------------------------------------------------------------------


def all_checks():
    """Every kernel at odd sizes."""
    for shape in ((2, 3, 5, 70), (1, 65, 17, 66), (1, 2, 130, 40)):
        yield partial(check, shape=shape)
    yield partial(check, shape=(1, 3, 18, 37), dtype="float64", temperature=0.3)


def run_all(module):
    """What the sanitizers see. A wrong value does not stop it."""
    wrong = []
    for one in all_checks():
        try:
            one(module)
        except AssertionError:
            wrong.append(one)
    assert not wrong


SOURCE, TILES = "pixel_correlation.cu", "cuda/pixel_correlation_tiles.h"
SHARED = "kernels/pixel_correlation.h"
FAULTS = {
    "barrier before a tile is read": (
        SOURCE,
        "    __syncthreads();\n    spread<T, kCount>(tile, source",
        "    spread<T, kCount>(tile, source",
    ),
    "barrier between factors": (
        TILES,
        "first += kStep) {\n    __syncthreads();",
        "first += kStep) {",
    ),
    "pixels beyond the image": (
        SOURCE,
        "if (pixel < shape.pixels && channel <= count)",
        "if (channel <= count)",
    ),
    "slope below zero": (SHARED, "similarity > none ? sum", "similarity >= none ? sum"),
    "terms not turned": (SOURCE, "k < half ? k + half : k - half", "k"),
    "second group of features": (SOURCE, "first + step * kStep + group", "step * kStep + group"),
}
MORE_FAULTS = {
    "second group of maps": (SOURCE, "maps_stride + first * n", "maps_stride"),
    "image of a block": (TILES, "return blockIdx.x / tiles;", "return 0 * tiles;"),
    "sum of the channel": (SOURCE, "channel == 0 ? T(1)", "channel == 1 ? T(1)"),
    "gradient of the divisor": (SOURCE, "sum -= h * out[c * n]", "sum += h * out[c * n]"),
    "along the feature": (SOURCE, "* scale - units[at] * dot", "* scale + units[at] * dot"),
    "last factor": (TILES, "first + k < depth", "first + k + 1 < depth"),
    "barrier of the divisor": (
        SOURCE,
        "(sums[0] + sum_eps);\n  __syncthreads();",
        "(sums[0] + sum_eps);",
    ),
    "barrier before features": (
        SOURCE,
        "if (begin >= shape.depth) break;\n      __syncthreads();",
        "if (begin >= shape.depth) break;",
    ),
    "last tile": (TILES, "(call.pixels + kSide<T> - 1) / kSide<T>", "call.pixels / kSide<T>"),
}


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_FAULTS)]
)
def test_seeded_fault_is_caught(fault):
    broken = emulator.load(emulator.build(edits=((FAULTS | MORE_FAULTS)[fault],)))
    with pytest.raises((AssertionError, RuntimeError)):
        run_all(broken)


def run_sanitized(flavour, edits=()):
    path = emulator.build(flavour, edits)
    program = (
        "from tests import emulator; from tests.ops import test_pixel_correlation_cuda as t; "
        f"from pathlib import Path; t.run_all(emulator.load(Path({str(path)!r})))"
    )
    environment = emulator.sanitizer_environment(flavour) | {"PYTHONPATH": str(emulator.ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=emulator.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_are_silent(flavour):
    done = run_sanitized(flavour)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("flavour", "fault", "message"),
    [
        (
            "asan",
            (SOURCE, "if (pixel < shape.pixels && channel <= count)", "if (channel <= count)"),
            "heap-buffer-overflow",
        ),
        ("tsan", FAULTS["barrier before a tile is read"], "data race"),
        ("tsan", FAULTS["barrier between factors"], "data race"),
        ("tsan", MORE_FAULTS["barrier before features"], "data race"),
    ],
)
def test_sanitizers_see_faults(flavour, fault, message):
    done = run_sanitized(flavour, (fault,))
    assert done.returncode != 0
    assert message in done.stderr
