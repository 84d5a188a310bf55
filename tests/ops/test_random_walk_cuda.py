"""csrc/cuda/{random_walk,stencil_affinity}.cu, run by the emulator: equal to the CPU operators, few
launches and bytes, clean under sanitizers, and wrong where a fault is seeded."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tests import emulator
from wsis.ops import _random_walk as native
from wsis.ops.stencil_affinity import flat, half_disc

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


def offsets_of(radius, symmetric=True):
    half = list(half_disc(radius))
    return flat(half if symmetric else half + [(-y, -x) for y, x in half])


def draw(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).random(shape).astype(dtype)


def close(got, expected, scale=1.0):
    tolerance = (1e-12 if expected.dtype == np.float64 else 4e-6) * scale
    assert got.dtype == expected.dtype
    assert np.abs(got - expected).max(initial=0) <= tolerance


# ---- walks -------------------------------------------------------------------------------------


def walk_arrays(maps, affinity):
    """result, powers, inverse, buffers: what is not written stays not a number."""
    batch, _, height, width = maps.shape
    shapes = (maps.shape, affinity.shape, (batch, height, width), (2, *maps.shape))
    return [np.full(shape, np.nan, maps.dtype) for shape in shapes]


def walk_options(dtype, offsets, symmetric, transposed, exponent, steps):
    found = native.coefficients(steps, native._TAIL[dtype]) if symmetric else ()
    products = len(found) - 1 if found else steps
    return (offsets, symmetric, transposed, exponent, products, list(found), 0)


def check_walk(
    module,
    shape=(2, 3, 9, 14),
    radius=5,
    steps=4,
    symmetric=True,
    transposed=False,
    dtype="float32",
    exponent=8,
):
    """shape: B, C, H, W."""
    offsets = offsets_of(radius, symmetric)
    batch, _, height, width = shape
    maps = draw(*shape, dtype=dtype)
    affinity = draw(batch, len(offsets) // 2, height, width, dtype=dtype, seed=1)
    options = (offsets, symmetric, transposed, exponent, steps)
    expected = torch.ops.wsis.random_walk(
        torch.from_numpy(maps), torch.from_numpy(affinity), *options
    ).numpy()
    result, *scratch = walk_arrays(maps, affinity)
    module.random_walk_cuda(
        maps, affinity, result, *scratch, *walk_options(expected_dtype(dtype), *options)
    )
    close(result, expected, max(1.0, float(np.abs(expected).max())))


def expected_dtype(dtype):
    return {"float32": torch.float32, "float64": torch.float64}[dtype]


WALKS = [
    {},
    {"dtype": "float64"},
    {"shape": (1, 1, 1, 1)},
    {"shape": (1, 2, 1, 200), "radius": 3},
    {"shape": (1, 5, 12, 11), "radius": 14, "dtype": "float64"},
    {"transposed": True},
    {"transposed": True, "steps": 1, "dtype": "float64"},
    {"symmetric": False, "exponent": 1},
    {"symmetric": False, "transposed": True, "dtype": "float64", "steps": 3},
    {"steps": 64},
    {"steps": 64, "transposed": True},
    {"shape": (1, 2, 6, 7), "steps": 256, "dtype": "float64", "exponent": 3},
]


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_walks(module, case):
    check_walk(module, **case)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [4, 6])
def test_many_pixels_share_their_weights(module, classes, dtype):
    """From 2^17 pixels on a thread has four maps."""
    check_walk(module, (1, classes, 2, 1 << 16), 2, 1, dtype=dtype, exponent=1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_operator_hands_over_what_the_binding_takes(module, monkeypatch, symmetric):
    """The Python side for CUDA tensors, with the emulator's functions and host memory."""
    monkeypatch.setattr(native, "cuda_function", lambda name: getattr(module, name))
    monkeypatch.setattr(native, "stream", lambda tensor: 0)
    monkeypatch.setattr(native, "view", lambda tensor: tensor.numpy())
    offsets = offsets_of(5, symmetric)
    maps = torch.from_numpy(draw(2, 3, 6, 7))
    affinity = torch.from_numpy(draw(2, len(offsets) // 2, 6, 7, seed=1))
    for steps in (2, 256):
        options = (offsets, symmetric, False, 8, steps)
        expected, result = torch.empty_like(maps), torch.empty_like(maps)
        native._walk_cpu(maps, affinity, expected, options)
        native._walk_cuda(maps, affinity, result, options)
        close(result.numpy(), expected.numpy())


def test_many_steps_agree_with_products(module, monkeypatch):
    """The recurrence and the plain products of the same kernel."""
    maps, affinity = draw(1, 2, 9, 8, dtype="float64"), draw(1, 34, 9, 8, dtype="float64")
    results = []
    for found in (native.coefficients(256, 1e-17), ()):
        result, *scratch = walk_arrays(maps, affinity)
        products = len(found) - 1 if found else 256
        options = (offsets_of(5), True, False, 8, products, list(found), 0)
        module.random_walk_cuda(maps, affinity, result, *scratch, *options)
        results.append(result)
    assert not np.array_equal(*results)
    close(*results)


def test_constant_maps_stay_to_the_bit(module):
    maps, affinity = np.full((1, 2, 7, 9), 0.7, np.float32), draw(1, 34, 7, 9)
    result, *scratch = walk_arrays(maps, affinity)
    module.random_walk_cuda(
        maps, affinity, result, *scratch, offsets_of(5), True, False, 8, 16, [], 0
    )
    assert np.array_equal(result, maps)


# ---- affinities --------------------------------------------------------------------------------


def check_pairs(module, shape=(2, 6, 9, 14), radius=5, dtype="float32"):
    """shape: B, F, H, W. Both directions."""
    offsets = offsets_of(radius)
    batch, _, height, width = shape
    features = draw(*shape, dtype=dtype) * 3
    features[..., : width // 2] = features[..., :1]  # equal ones, whose slope is 0
    planes = (batch, len(offsets) // 2, height, width)
    gradient = draw(*planes, dtype=dtype, seed=1) - 0.5
    ops = torch.ops.wsis
    expected = ops.pair_affinity(torch.from_numpy(features), offsets)
    expected_gradient = ops.pair_affinity_backward(
        torch.from_numpy(gradient), torch.from_numpy(features), expected, offsets
    )
    affinity = np.full(planes, np.nan, dtype)
    module.pair_affinity_cuda(features, affinity, offsets, 0)
    close(affinity, expected.numpy())
    result = np.full(shape, np.nan, dtype)
    module.pair_affinity_backward_cuda(gradient, features, affinity, result, offsets, 0)
    close(result, expected_gradient.numpy())


def check_paths(module, shape=(2, 9, 14), radius=5, dtype="float32", levels=4):
    """shape: B, H, W. Both directions; with so many values ties are frequent."""
    offsets = offsets_of(radius)
    edge = np.round(draw(*shape, dtype=dtype) * levels) / dtype_of(dtype)(levels)
    planes = (shape[0], len(offsets) // 2, *shape[1:])
    gradient = draw(*planes, dtype=dtype, seed=1) - 0.5
    ops = torch.ops.wsis
    expected, expected_chosen = ops.path_affinity(torch.from_numpy(edge), offsets)
    expected_gradient = ops.path_affinity_backward(
        torch.from_numpy(gradient), expected_chosen, offsets
    )
    affinity, chosen = np.full(planes, np.nan, dtype), np.full(planes, 255, np.uint8)
    module.path_affinity_cuda(edge, chosen, affinity, offsets, 0)
    assert np.array_equal(affinity, expected.numpy())
    assert np.array_equal(chosen, expected_chosen.numpy())
    result = np.full(shape, np.nan, dtype)
    module.path_affinity_backward_cuda(gradient, chosen, result, offsets, 0)
    close(result, expected_gradient.numpy(), 20)


def dtype_of(name):
    return np.dtype(name).type


SIZES = [
    {},
    {"dtype": "float64"},
    {"radius": 1},
    {"radius": 10, "dtype": "float64"},
]


@pytest.mark.parametrize("case", [*SIZES, {"shape": (1, 1, 1, 1)}, {"shape": (1, 17, 1, 200)}])
def test_pairs(module, case):
    check_pairs(module, **case)


@pytest.mark.parametrize("case", [*SIZES, {"shape": (1, 1, 1)}, {"shape": (1, 3, 150)}])
def test_paths(module, case):
    check_paths(module, **case)


def test_a_bad_edge_value_is_handed_on(module):
    edge = draw(1, 6, 7)
    edge[0, 2, 3] = np.nan
    offsets = offsets_of(4)
    expected, _ = torch.ops.wsis.path_affinity(torch.from_numpy(edge), offsets)
    planes = tuple(expected.shape)
    affinity, chosen = np.zeros(planes, np.float32), np.zeros(planes, np.uint8)
    module.path_affinity_cuda(edge, chosen, affinity, offsets, 0)
    assert np.isnan(affinity).sum() >= 30
    np.testing.assert_array_equal(affinity, expected.numpy())


def test_order_of_threads_does_not_matter(module, monkeypatch):
    for seed in ("1", "2"):
        monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
        check_walk(module, steps=64)
        check_pairs(module)
        check_paths(module)


# ---- launches and bytes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting():
    return emulator.load(emulator.build("count"))


def test_a_step_is_one_launch_and_reads_half_of_the_affinities(counting):
    """Each pair's affinity once for both directions, and the maps once."""
    batch, classes, height, width, offsets = 2, 3, 12, 15, offsets_of(5)
    maps = draw(batch, classes, height, width)
    affinity = draw(batch, 34, height, width, seed=1)
    pixel = 4 * batch * height * width  # bytes of one number per pixel
    for steps in (4, 64):
        options = walk_options(torch.float32, offsets, True, False, 8, steps)
        launches = emulator.count(
            counting.random_walk_cuda, maps, affinity, *walk_arrays(maps, affinity), *options
        )
        assert len(launches) == 1 + options[4]
        powers, *products = launches
        assert powers.read <= 34 * pixel
        assert powers.written == 35 * pixel
        for launch in products:
            # also the value before, and the sum
            assert launch.read <= (34 + 1 + 3 * classes) * pixel
            assert launch.written in (classes * pixel, 2 * classes * pixel)
            assert launch.shared == 0


def test_affinities_are_one_launch_each(counting):
    offsets, shape = offsets_of(5), (2, 6, 9, 14)
    pixel = 4 * 2 * 9 * 14
    features, planes = draw(*shape), (2, 34, 9, 14)
    affinity, gradient = np.zeros(planes, np.float32), draw(*planes)
    (launch,) = emulator.count(counting.pair_affinity_cuda, features, affinity, offsets, 0)
    assert (launch.read, launch.written) == (6 * pixel, 34 * pixel)
    result = np.zeros(shape, np.float32)
    (launch,) = emulator.count(
        counting.pair_affinity_backward_cuda, gradient, features, affinity, result, offsets, 0
    )
    assert launch.read <= (2 * 34 + 6) * pixel
    assert launch.written == 6 * pixel
    edge, chosen = draw(2, 9, 14), np.zeros(planes, np.uint8)
    (launch,) = emulator.count(counting.path_affinity_cuda, edge, chosen, affinity, offsets, 0)
    assert (launch.read, launch.written) == (pixel, 34 * (pixel + pixel // 4))
    result = np.zeros(edge.shape, np.float32)
    (launch,) = emulator.count(
        counting.path_affinity_backward_cuda, gradient, chosen, result, offsets, 0
    )
    assert launch.read <= 34 * (pixel + pixel // 4)
    assert launch.written == pixel


# ---- faults and sanitizers ---------------------------------------------------------------------


def all_checks():
    """Every kernel at odd sizes."""
    yield partial(check_walk)
    yield partial(check_walk, transposed=True, steps=64, shape=(1, 5, 7, 12))
    yield partial(check_walk, symmetric=False, transposed=True, exponent=3)
    yield partial(check_walk, symmetric=False, shape=(1, 2, 3, 5), radius=5)
    yield partial(check_walk, steps=256, dtype="float64", shape=(1, 2, 5, 30), exponent=5)
    yield partial(check_pairs)
    yield partial(check_pairs, shape=(1, 3, 4, 40), radius=8, dtype="float64")
    yield partial(check_paths)
    yield partial(check_paths, shape=(1, 4, 40), radius=9, dtype="float64")


def run_all(module):
    """What the sanitizers see. A wrong value does not stop it."""
    wrong = []
    for one in all_checks():
        try:
            one(module)
        except AssertionError:
            wrong.append(one)
    assert not wrong


WALK, AFFINITY = "random_walk.cu", "stencil_affinity.cu"
SHARED, PATHS = "kernels/random_walk.h", "kernels/stencil_affinity.h"
FAULTS = {
    "previous term": (WALK, "k == 1 ? start : step.after", "k == 1 ? step.now : step.after"),
    "gradient of the partner": (AFFINITY, "sum -= kernels::toward", "sum += kernels::toward"),
}
MORE_FAULTS = {
    "partner outside": (WALK, "if (grid.contains(i.y + dy, i.x + dx)) own =", "own ="),
    "weight of the other direction": (WALK, "add(plane[back], back);", "add(plane[0], back);"),
    "ties of a path": (AFFINITY, "!first && !kernels::is_larger(one, largest)",
                       "!first && !(one >= largest)"),
    "column, not row": (WALK, "if (symmetric) sum += own;", "sum += own;"),
    "diagonal": (WALK, "double sum = 1;", "double sum = 0;"),
    "plane of an offset": (WALK, "weights + offsets.plane[k] * size", "weights + k / 2 * size"),
    "outside of the other side": (WALK, "contains(i.y - dy, i.x - dx) ? -away : 0;",
                                  "contains(i.y - dy, i.x) ? -away : 0;"),
    "adjoint not scaled": (WALK, "step.descale = walk.transposed && last;",
                           "step.descale = false;"),
    "directions of the adjoint": (WALK, "walk.symmetric || walk.transposed, walk.symmetric ||",
                                  "walk.symmetric || !walk.transposed, walk.symmetric ||"),
    "coefficient": (WALK, "c[k + 1]", "c[k]"),
    "own loss": (WALK, "const T loss = sums_to_one ? T(0) : T(1) - factor;",
                 "const T loss = T(0) * factor;"),
    "image of a pixel": ("cuda/stencil.h", "image = blockIdx.x / grid.blocks;",
                         "image = blockIdx.x / grid.blocks * 0;"),
    "power": (SHARED, "if (exponent % 2 == 1) result *= a;", "result *= a;"),
    "next term": (SHARED, "(change + change)", "change"),
    "share of a channel": (AFFINITY, "T(-1) / static_cast<T>(channels)", "T(-1)"),
    "slope at equal values": (PATHS, "difference < T(0) ?", "difference <= T(0) ?"),
    "width of a path": (PATHS, "off * off < dy * dy + dx * dx", "off * off <= dy * dy + dx * dx"),
    "order of a path": (PATHS, "for (int32_t sum = dy + across; sum >= 0; --sum)",
                        "for (int32_t sum = 0; sum <= dy + across; ++sum)"),
    "pairs of a pixel on a path": (AFFINITY, "if (chosen[at] == cell) sum",
                                   "if (chosen[at] >= cell) sum"),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_FAULTS)]
)
def test_seeded_fault_is_caught(fault):
    broken = emulator.load(emulator.build(edits=((FAULTS | MORE_FAULTS)[fault],)))
    with pytest.raises((AssertionError, RuntimeError)):
        run_all(broken)


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_are_silent(flavour):
    done = emulator.run_sanitized(__name__, flavour)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("flavour", "fault", "message"),
    [
        ("asan", (WALK, "grid.contains(i.y - dy, i.x - dx) ? -away : 0;", "-away;"),
         "heap-buffer-overflow"),
        ("asan", (AFFINITY, "if (!grid.contains(y, x) ||", "if (!grid.contains(0, 0) ||"),
         "heap-buffer-overflow"),
        ("tsan", (WALK, "step.now = k == 0 ? start :", "step.now = k == 0 ? buffers + size :"),
         "data race"),
        ("tsan", (WALK, "buffers + (k + 1) % 2 * size;", "buffers + k % 2 * size;"), "data race"),
    ],
)  # fmt: skip
def test_sanitizers_see_faults(flavour, fault, message):
    done = emulator.run_sanitized(__name__, flavour, (fault,))
    assert done.returncode != 0
    assert message in done.stderr
