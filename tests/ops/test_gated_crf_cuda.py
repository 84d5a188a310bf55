"""csrc/cuda/gated_crf.cu, run by the emulator: equal to the CPU operator, one launch that touches
nothing but its arrays, clean under sanitizers, and wrong where a fault is seeded."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulator
from tests.ops.test_gated_crf import ONE, THREE, TWO, make_case
from wsis.ops import gated_crf

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


def arguments(size, classes, kernels, radius, dtype="float64", seed=0):
    probs, modalities = make_case(size, classes, getattr(torch, dtype), seed=seed)
    features, *rest = gated_crf._packed_kernels(probs, modalities, kernels)
    result = np.full(probs.shape, np.nan, dtype)
    return probs.numpy(), features.numpy(), result, *rest, radius


def check(module, size=(7, 9), classes=3, kernels=THREE, radius=2, dtype="float64", seed=0):
    values, features, result, *rest = arguments(size, classes, kernels, radius, dtype, seed)
    expected = gated_crf._filter(torch.from_numpy(values), torch.from_numpy(features), *rest)
    module.window_filter_cuda(values, features, result, *rest, 0)
    tolerance = 1e-13 if dtype == "float64" else 2e-6
    scale = max(1.0, float(expected.abs().max()))
    assert np.abs(result - expected.numpy()).max() <= tolerance * scale


CHECKS = [
    partial(check, size=(12, 13), kernels=TWO),  # more pixels than threads of a block
    partial(check, classes=8, size=(3, 4), radius=5),
    partial(check, classes=9, size=(9, 3), radius=1),
    partial(check, classes=50, size=(4, 5), kernels=ONE),
    partial(check, classes=25, size=(11, 12), dtype="float32"),
]


def run_all(module):
    """What the sanitizers see. A wrong value does not stop it."""
    wrong = []
    for one in CHECKS:
        try:
            one(module)
        except AssertionError:
            wrong.append(one)
    assert not wrong


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (16, 16)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sizes(module, size, dtype):
    check(module, size, dtype=dtype)


@pytest.mark.parametrize("case", CHECKS)
def test_kernel_equals_cpu(module, case, monkeypatch):
    for seed in ("0", "1"):
        monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
        case(module)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    classes=st.integers(1, 30),
    radius=st.integers(1, 6),
    kernels=st.sampled_from([ONE, TWO, THREE]),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 99),
)
def test_anything(module, size, classes, radius, kernels, dtype, seed):
    check(module, size, classes, kernels, radius, dtype, seed)


def test_one_launch_reads_and_writes_once():
    """Every byte that is needed, and of each window only what lies inside the image."""
    counted = emulator.load(emulator.build("count"))
    values, features, result, *rest = arguments((9, 11), 3, ONE, 2, "float32")
    (launch,) = emulator.count(counted.window_filter_cuda, values, features, result, *rest, 0)
    assert launch.arrays[0].read == values.nbytes
    assert launch.arrays[1].read == features.nbytes
    assert launch.arrays[2].written == launch.arrays[2].stored == result.nbytes
    pairs = sum(
        (min(y + 2, 8) - max(y - 2, 0) + 1) * (min(x + 2, 10) - max(x - 2, 0) + 1) - 1
        for y in range(9)
        for x in range(11)
    )
    assert launch.arrays[0].loaded == 2 * 3 * 4 * pairs


def test_empty(module):
    values, features, result, *rest = arguments((0, 5), 3, ONE, 2)
    module.window_filter_cuda(values, features, result, *rest, 0)


# ---- sanitizers and seeded faults --------------------------------------------------------------


def run_sanitized(flavour, edits=()):
    path = emulator.build(flavour, edits)
    program = (
        "from tests import emulator; from tests.ops import test_gated_crf_cuda as t; "
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


CU, KERNEL = "gated_crf.cu", "kernels/gated_crf.h"
FAULTS = {
    "last pixel left out": (CU, "if (index >= pixels) return;", "if (index + 1 >= pixels) return;"),
    "the centre counts": (CU, "if (dy == 0 && dx == 0) continue;", ""),
    "group of another image": (CU, "blockIdx.x / blocks % groups", "blockIdx.x / blocks % 1"),
}
MORE_FAULTS = {
    "top of the window": (CU, "y < call.radius ? -y : -call.radius", "-y"),
    "left of the window": (CU, "x < call.radius ? -x : -call.radius", "0"),
    "last column": (CU, "x + dx < call.width; ++dx", "x + dx + 1 < call.width; ++dx"),
    "last row": (CU, "dy <= call.radius && y", "dy < call.radius && y"),
    "values of another image": (CU, "values + (b * call.values + first)", "values + (first)"),
    "features of another image": (CU, "features + b * call.features * pixels", "features"),
    "values past the last": (CU, "if (g < count) sum[g] +=", "if (g < 1) sum[g] +="),
    "distance in the plane": (CU, "dy * dy + dx * dx)", "dy * dy + dx)"),
    "channels of the second kernel": (KERNEL, "here += plane, there += plane", "0"),
    "closeness": (KERNEL, "kernels.closeness[k] *", "kernels.closeness[0] *"),
    "half": (KERNEL, "far * T(-0.5)", "far * T(-1)"),
}


def survives(path):
    """Whether all checks pass; in a process of its own, which may crash."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            signal.alarm(60)
            torch.set_num_threads(1)
            run_all(emulator.load(path))
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_FAULTS)]
)
def test_seeded_fault_is_caught(fault):
    path = emulator.build(edits=((FAULTS | MORE_FAULTS)[fault],))
    assert not survives(path), "the checks cannot see this fault"


def test_shipped_kernel_survives():
    assert survives(emulator.build())


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_are_silent(flavour):
    done = run_sanitized(flavour)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize(
    "fault",
    [
        (CU, "if (index >= pixels) return;", "if (index > pixels) return;"),
        (CU, "x + dx < call.width; ++dx", "x + dx <= call.width; ++dx"),
        (CU, "if (g < count) to[g * pixels]", "to[g * pixels]"),
    ],
)
def test_address_sanitizer_sees_faults(fault):
    done = run_sanitized("asan", (fault,))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "gated_crf" in done.stderr
