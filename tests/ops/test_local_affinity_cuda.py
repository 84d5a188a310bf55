"""csrc/cuda/local_affinity*.cu, run by the emulator: equal to the CPU operators, few launches and
bytes, clean under sanitizers, and wrong where a fault is seeded."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tests import emulator
from tests.ops.test_local_affinity import random_case
from wsis.ops import _local_affinity
from wsis.ops.local_affinity import DILATIONS, local_affinity

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")

KINDS = _local_affinity.KINDS
FAST = (1, 2, 3, 4, 7, 24)


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


def tap_weights(kind, dilations):
    return _local_affinity._position(kind, list(dilations))


def affinity(module, image, kind, dilations, *, packed=True, stats=True):
    """Emulated weights [B, P / 4, H, W, 4] and stats, each None if not asked for."""
    batch, channels, height, width = image.shape
    shape = (batch, 2 * len(dilations), height, width, 4)
    packed = np.full(shape, np.nan, image.dtype) if packed else None
    stats = np.full((batch, channels + 4, height, width), np.nan, image.dtype) if stats else None
    module.local_affinity_cuda(
        image, packed, stats, KINDS.index(kind), list(dilations), tap_weights(kind, dilations), 0
    )
    return packed, stats


def unpacked(packed):
    """[B, P / 4, H, W, 4] -> [B, P, H, W]."""
    batch, fours, height, width, _ = packed.shape
    return packed.transpose(0, 1, 4, 2, 3).reshape(batch, fours * 4, height, width)


def case(size, masks, dtype, batch=2, channels=3):
    image, m = random_case(size, masks, getattr(torch, dtype), batch=batch, channels=channels)
    return image.numpy(), m.numpy()


def close(got, expected, dtype):
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    assert got.dtype == expected.dtype
    assert np.abs(got - expected).max() <= tolerance * max(1, np.abs(expected).max())


def on_cpu(image, masks, kind, dilations, iterations, transposed, counts):
    counts = None if counts is None else torch.from_numpy(counts)
    arguments = (kind, list(dilations), iterations, transposed)
    image, masks = torch.from_numpy(image), torch.from_numpy(masks)
    return torch.ops.wsis.local_refine(image, masks, counts, *arguments).numpy()


def check_weights(module, kind="par", size=(7, 13), dilations=FAST, dtype="float32", channels=3):
    image, _ = case(size, 1, dtype, channels=channels)
    image[0, :, :3, :4] = 0.25  # flat
    expected = local_affinity(torch.from_numpy(image), kind, dilations).numpy()
    packed, _ = affinity(module, image, kind, dilations)
    close(unpacked(packed), expected, dtype)


def check_propagation(
    module,
    kind="varm",
    size=(7, 13),
    dilations=FAST,
    dtype="float32",
    masks=3,
    iterations=2,
    transposed=False,
    counts=None,
    lean=False,
):
    image, m = case(size, masks, dtype)
    if counts is not None:
        counts = np.array(counts, np.int32)
        for b, count in enumerate(counts):
            m[b, max(count, 0) :] = np.nan  # not read
    expected = on_cpu(image, m, kind, dilations, iterations, transposed, counts)
    result, scratch = np.full_like(m, np.nan), np.full_like(m, np.nan)
    rest = (iterations, transposed, 0)
    if lean:
        _, stats = affinity(module, image, kind, dilations, packed=False)
        position = tap_weights(kind, dilations)
        module.propagate_lean_cuda(
            *(m, image, stats, counts, result, scratch, KINDS.index(kind), list(dilations)),
            *(position, *rest),
        )
    else:
        packed, _ = affinity(module, image, kind, dilations)
        module.propagate_cuda(m, packed, counts, result, scratch, list(dilations), *rest)
    close(result, expected, dtype)


SIZES = [(1, 1), (7, 5), (1, 6), (11, 13)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dilations", [FAST, (1,), (2, 30)])
@pytest.mark.parametrize("size", SIZES)
def test_weights(module, kind, size, dilations):
    check_weights(module, kind, size, dilations)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 4])
def test_weights_of_other_images(module, kind, channels):
    check_weights(module, kind, (5, 6), FAST, "float64", channels)
    check_weights(module, kind, (5, 6), (1, 3), "float64", channels)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dilations", [FAST, (2, 30)])
@pytest.mark.parametrize("size", SIZES)
def test_propagation(module, size, dilations, transposed):
    check_propagation(module, size=size, dilations=dilations, transposed=transposed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lean_propagation(module, kind, transposed, dtype):
    check_propagation(
        module, kind, (5, 7), (1, 4), dtype, masks=9, transposed=transposed, lean=True
    )


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("masks", [1, 8, 11])
def test_masks_and_iterations(module, masks, iterations, lean):
    for dilations in (FAST, (1, 2)):
        check_propagation(
            module,
            "par",
            (4, 9),
            dilations,
            "float64",
            masks,
            iterations,
            transposed=iterations == 2,
            counts=[masks - 1, masks + 5] if masks > 1 else None,
            lean=lean,
        )


def test_order_of_threads_does_not_matter(module, monkeypatch):
    for seed in ("1", "2"):
        monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
        check_weights(module, "varm")
        check_propagation(module, counts=[2, 0])
        check_propagation(module, counts=[2, 0], transposed=True)


# ---- launches and bytes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting():
    return emulator.load(emulator.build("count"))


def test_one_launch_an_iteration_reads_weights_once(counting):
    """Per iteration 4 P + 4 N + 4 N bytes a pixel, once 4 K + 4 P more: kernels.md 6 and 8.3."""
    batch, masks, size = 2, 5, (20, 27)
    image, m = case(size, masks, "float32", batch)
    pixels = batch * size[0] * size[1]
    packed = np.empty((batch, 12, *size, 4), np.float32)
    (launch,) = emulator.count(
        counting.local_affinity_cuda, image, packed, None, 1, list(DILATIONS),
        tap_weights("par", DILATIONS), 0,
    )  # fmt: skip
    assert launch.read == 4 * 3 * pixels
    assert launch.written == 4 * 48 * pixels
    result, scratch = np.empty_like(m), np.empty_like(m)
    launches = emulator.count(
        counting.propagate_cuda, m, packed, None, result, scratch, list(DILATIONS), 4, False, 0
    )
    assert len(launches) == 4
    for launch in launches:
        # Of the masks only the pixels that some tap reaches.
        assert launch.arrays[1].loaded == launch.arrays[1].read == 4 * 48 * pixels
        assert launch.read <= 4 * (48 + masks) * pixels
        assert launch.written == 4 * masks * pixels


def test_only_counted_masks_are_touched(counting):
    image, m = case((9, 11), 6, "float32")
    packed, _ = affinity(counting, image, "pamr", DILATIONS)
    counts = np.array([2, 0], np.int32)
    result, scratch = np.empty_like(m), np.empty_like(m)
    first, last = emulator.count(
        counting.propagate_cuda, m, packed, counts, result, scratch, list(DILATIONS), 2, False, 0
    )
    assert first.arrays[0].read <= 4 * 2 * 99
    assert first.arrays[4].written == 4 * 2 * 99
    assert last.arrays[3].written == m.nbytes


# ---- faults and sanitizers ---------------------------------------------------------------------


def all_checks():
    """Every kernel at odd sizes."""
    for kind in KINDS:
        yield partial(check_weights, kind=kind, size=(5, 27))
        yield partial(check_weights, kind=kind, size=(5, 4), dilations=(1, 9))
        yield partial(check_propagation, kind=kind, size=(4, 5), dilations=(1, 9), lean=True)
    for transposed in (False, True):
        yield partial(check_propagation, size=(5, 27), counts=[3, 1], transposed=transposed)
        yield partial(check_propagation, dilations=(1, 9), masks=9, transposed=transposed)
        yield partial(
            check_propagation, size=(4, 5), dilations=(2,), transposed=transposed, lean=True
        )


def run_all(module):
    """What the sanitizers see. A wrong value does not stop it."""
    wrong = []
    for check in all_checks():
        try:
            check(module)
        except AssertionError:
            wrong.append(check)
    assert not wrong


AFFINITY, PROPAGATE = "local_affinity.cu", "local_affinity_propagate.cu"
PIXELS, SHARED = "cuda/local_affinity_pixels.h", "kernels/local_affinity.h"
FAULTS = {
    "rows swapped": (PIXELS, "rows[d][dy > 0])", "rows[d][dy < 0])"),
    "last pixel left out": (PIXELS, "index < height * width};", "index + 1 < height * width};"),
    "unused planes stay": (PROPAGATE, "if (!last) return;", "return;"),
    "buffers start wrong": (PROPAGATE, "left % 2 == 1 ?", "left % 2 == 0 ?"),
    "border receives once": (SHARED, "q == size - 1 || q - step >= size", "q - step >= size"),
}
MORE_FAULTS = {
    "clamp": (SHARED, "i < size ? i : size - 1", "i < size ? i : size - 2"),
    "image of a block": (PIXELS, "return {blockIdx.x / blocks,", "return {0 * blocks,"),
    "tap of four": (PIXELS, "return data[four * 4 + p % 4]", "return data[four * 4 + (p + 1) % 4]"),
    "groups of four": (AFFINITY, "(kCount / 4) + f) * from.size()", "(kCount / 4)) * from.size()"),
    "centre not counted": (AFFINITY, "if (kKind == Kind::kPamr) spread", "if (false) spread"),
    "last channel": (AFFINITY, "c < from.channels; ++c, plane", "c < 2; ++c, plane"),
    "frame of the rows": (PIXELS, "y + 1 < height ? T(1)", "y + 2 < height ? T(1)"),
    "second softmax": (PIXELS, "rest[3 * size()];\n", "rest[2 * size()];\n"),
    "group of planes": (PROPAGATE, "first += kGroup)", "first += kGroup + 1)"),
    "column of a source": (PROPAGATE, "x = first_x + k % columns", "x = first_x"),
    "counts of another image": (PROPAGATE, "counts[b], 0)", "counts[0], 0)"),
    "position of a tap": (SHARED, "k == 0 || k == 2 ||", "k == 1 || k == 2 ||"),
}


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
    "fault",
    [
        (AFFINITY, "(kCount / 4) + f) * from", "(kCount / 4) + f + 1) * from"),
        (PROPAGATE, "n < planes; ++n)", "n <= planes; ++n)"),
        (SHARED, "i < size ? i : size - 1", "i < size + 1 ? i : size - 1"),
    ],
)
def test_address_sanitizer_sees_faults(fault):
    done = emulator.run_sanitized(__name__, "asan", (fault,))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
