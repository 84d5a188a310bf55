"""csrc/cuda/pseudo_masks.cu, run by the emulator: equal to plain torch, clean under sanitizers,
wrong where a fault is seeded, and no more memory traffic than the algorithm needs."""

from __future__ import annotations

import faulthandler
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulator
from tests.ops.test_pseudo_masks import (
    FOUR,
    UNITS,
    boxes,
    check_labels,
    check_stack,
    check_ties,
    check_unit,
    rand,
)

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


class Emulated:
    """The operators of wsis.ops.pseudo_masks on an emulated module."""

    def __init__(self, module, call=None):
        self.module = module
        self.call = call or (lambda function, *arguments: function(*arguments))

    def unit(self, cams, present, box):
        cams, present, box = (x.numpy() for x in (cams, present.to(torch.uint8), box))
        unit, scratch = np.full(len(cams), 7, cams.dtype), np.empty((len(cams), cams.shape[2]))
        self.call(self.module.pseudo_unit_cuda, cams, present, box, scratch, unit, 0)
        return torch.from_numpy(unit)

    def stack(self, cams, present, size, *, high, low, unit=None, room=None):
        room = cams.shape[1] if room is None else room
        cams, present = cams.numpy(), present.to(torch.uint8).numpy()
        unit = np.zeros(0, cams.dtype) if unit is None else unit.numpy()
        stack = np.full((len(cams), 2 * (room + 1), *size), -7, cams.dtype)
        counts = np.full(len(cams), -7, np.int32)
        ids = np.full((len(cams), room + 1), -7, np.int32)
        outputs = stack, counts, ids
        self.call(self.module.pseudo_stack_cuda, cams, present, unit, high, low, *outputs, 0)
        for image, count in zip(stack, counts, strict=True):
            assert (image[count:] == -7).all()  # planes past the count are left alone
        return tuple(map(torch.from_numpy, outputs))

    def labels(self, stack, counts, ids, box, size, *, ignore_index):
        masks = np.full((len(stack), *size), -7)
        arrays = (x.contiguous().numpy() for x in (stack, counts, ids, box))
        self.call(self.module.pseudo_labels_cuda, *arrays, masks, ignore_index, 0)
        return torch.from_numpy(masks)


CHECKS = [
    lambda ops: check_unit(ops.unit),
    lambda ops: check_unit(ops.unit, rand(2, 40, seed=9) < 0.3, (3, 300)),
    lambda ops: check_stack(ops.stack, unit=UNITS),
    lambda ops: check_stack(ops.stack, rand(2, 70, seed=9) < 0.3, ((21, 37), (11, 25))),
    lambda ops: check_stack(ops.stack, room=1),
    lambda ops: check_labels(ops.labels),
    lambda ops: check_labels(ops.labels, sizes=((5, 3), (7, 5)), ignore_index=-1),
    lambda ops: check_ties(ops.labels),
]


def run_all(module):
    """What the sanitizers see. A wrong value does not stop it: a report may come later."""
    wrong = []
    for check in CHECKS:
        try:
            check(Emulated(module))
        except AssertionError:
            wrong.append(check)
    assert not wrong


@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_equal_reference(module, monkeypatch, check, seed):
    monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
    check(Emulated(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [((1, 1), (1, 1)), ((7, 5), (3, 2)), ((16, 32), (8, 16))])
def test_sizes(module, sizes, dtype):
    ops = Emulated(module)
    check_unit(ops.unit, size=sizes[0], dtype=dtype)
    check_stack(ops.stack, sizes=sizes, dtype=dtype)
    check_labels(ops.labels, sizes=sizes, dtype=dtype)


def check_any(module, size, reduced, batch, classes, seed):
    ops, present = Emulated(module), rand(batch, classes, seed=seed) < 0.4
    check_unit(ops.unit, present, size)
    check_stack(ops.stack, present, (size, reduced))
    check_labels(ops.labels, present, (size, reduced))


ANY = {
    "size": st.tuples(st.integers(1, 24), st.integers(1, 24)),
    "reduced": st.tuples(st.integers(1, 24), st.integers(1, 24)),
    "batch": st.integers(1, 3),
    "classes": st.sampled_from([1, 3, 33]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**ANY)
def test_anything(module, size, reduced, batch, classes, seed):
    check_any(module, size, reduced, batch, classes, seed)


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(**(ANY | {"classes": st.integers(1, 81), "size": st.tuples(*[st.integers(1, 60)] * 2)}))
def test_anything_more(module, size, reduced, batch, classes, seed):
    check_any(module, size, reduced, batch, classes, seed)


def test_empty(module):
    ops = Emulated(module)
    none, box = torch.zeros(0, 2) > 0, torch.zeros(0, 4, dtype=torch.int64)
    made = ops.stack(torch.zeros(0, 2, 4, 4), none, (2, 2), high=0.5, low=0.2)
    assert ops.labels(*made, box, (4, 4), ignore_index=255).shape == (0, 4, 4)
    assert ops.unit(torch.zeros(0, 2, 4, 4), none, box).shape == (0,)


# ---- traffic -----------------------------------------------------------------------------------


def test_launches_and_bytes():
    """Every byte that is needed once, and nothing else."""
    counted = emulator.load(emulator.build("count"))
    launches = []

    def call(function, *arguments):
        launches.append((emulator.count(function, *arguments), arguments))

    ops, (height, width), (h, w) = Emulated(counted, call), (24, 40), (12, 20)
    batch, classes = FOUR.shape
    cams, box = rand(batch, classes, height, width), boxes(batch, (height, width))
    unit = ops.unit(cams, FOUR, box)
    made = ops.stack(cams, FOUR, (h, w), high=0.6, low=0.2, unit=unit)
    ops.labels(*made, box, (height, width), ignore_index=255)
    (units, _), (stacks, _), (labels, _) = launches
    assert [len(x) for x in (units, stacks, labels)] == [2, 1, 1]

    planes = int(FOUR.sum())
    in_boxes = [(y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in box.tolist()]
    needed = 4 * sum(int(FOUR[b].sum()) * in_boxes[b] for b in range(batch))
    assert units[0].arrays[0].read == units[0].arrays[0].loaded == needed
    assert units[0].arrays[3].written == units[1].arrays[3].read == 8 * batch * height

    # Factor 2: all input rows and columns are read, and all planes written, once.
    assert stacks[0].arrays[0].read == 4 * planes * height * width
    written = 4 * int(made[1].sum()) * h * w
    assert stacks[0].arrays[5].written == stacks[0].arrays[5].stored == written
    assert stacks[0].arrays[5].read == 0
    small = made[1].nbytes + made[2].nbytes + FOUR.nbytes + unit.nbytes
    assert stacks[0].read + stacks[0].written <= 4 * planes * height * width + written + small

    (label,) = labels
    assert label.arrays[4].written == label.arrays[4].stored == 8 * batch * height * width
    whole = [b for b in range(batch) if in_boxes[b] == height * width]
    least = 4 * sum(int(made[1][b]) for b in whole) * h * w
    assert least <= label.arrays[0].read <= 4 * int(made[1].sum()) * h * w


# ---- sanitizers and seeded faults --------------------------------------------------------------


CU, KERNEL = "pseudo_masks.cu", "kernels/pseudo_masks.h"
# What only reaches beyond its memory is for the address sanitizer.
FAULTS = {
    "barrier of the class list removed": (
        CU,
        "  __syncthreads();\n  return total;",
        "  return total;",
    ),
    "barrier of the row sums removed": (
        CU,
        "of_warp[threadIdx.x / kWarp] = sum;\n  __syncthreads();",
        "of_warp[threadIdx.x / kWarp] = sum;",
    ),
    "half of a warp is not added": (
        CU,
        "for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, "
        "step);\n  if (threadIdx.x % kWarp",
        "for (int step = kWarp / 4; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, "
        "step);\n  if (threadIdx.x % kWarp",
    ),
    "lanes count themselves": (CU, "((1u << threadIdx.x) - 1)", "((2u << threadIdx.x) - 1)"),
    "low half overlaps the high one": (
        CU,
        "static_cast<int64_t>(half) * reduced",
        "found * reduced",
    ),
    "image of a stack": (
        CU,
        "T* highs = stack + b * 2 * (sizes.room + 1)",
        "T* highs = stack + b * 2 * (sizes.room + 0)",
    ),
    "rows and columns of the box": (CU, "column < columns.begin", "row < columns.begin"),
}
MORE_FAULTS = {
    "classes past the first 32": (
        CU,
        "base < classes; base += kWarp",
        "base < kWarp; base += kWarp",
    ),
    "room is not kept": (CU, "found < room ? found : room", "found"),
    "one thread leaves before the barrier": (
        CU,
        "list_present(present + b * sizes.classes, sizes.classes, sizes.room, list);",
        "threadIdx.x == 40 ? 0 : list_present(present + b * sizes.classes, sizes.classes, "
        "sizes.room, list);",
    ),
    "last pixel": (CU, "pixel >= reduced) return", "pixel >= reduced - 1) return"),
    "x for y": (
        CU,
        "pixel % sizes.reduced_width, sizes.width",
        "pixel / sizes.reduced_width, sizes.width",
    ),
    "high threshold twice": (
        CU,
        "kernels::threshold(low, scale)",
        "kernels::threshold(high, scale)",
    ),
    "unit is not read": (
        CU,
        "unit ? unit[b] : T(1);\n  const auto",
        "unit ? unit[0] : T(1);\n  const auto",
    ),
    "ids of the neighbour": (
        CU,
        "ids + b * (sizes.room + 1);\n  *out",
        "ids + b * sizes.room;\n  *out",
    ),
    "second half read again": (
        CU,
        "p < half; ++p, plane += reduced)",
        "p < half; ++p, plane += p < half ? reduced : 0)",
    ),
    "box includes its end": (CU, "row >= rows.end", "row > rows.end"),
    "mean over the image": (
        CU,
        "(columns.end - columns.begin);\n  unit[b]",
        "sizes.width;\n  unit[b]",
    ),
    "corner of the resize": (KERNEL, "low + 1 < from ? low + 1 : low", "low + 1"),
    "half a pixel": (KERNEL, "(static_cast<T>(i) + T(0.5))", "(static_cast<T>(i) + T(0.0))"),
    "undecided the other way": (
        KERNEL,
        "at_high == kBackground && at_low !=",
        "at_high != kBackground && at_low ==",
    ),
    "threshold is not capped": (KERNEL, "product < T(1) ? product : T(1)", "product"),
}


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_FAULTS)]
)
def test_seeded_fault_is_caught(fault):
    path = emulator.build(edits=((FAULTS | MORE_FAULTS)[fault],))
    assert not survives(path), "the tests above cannot see this fault"


def test_shipped_kernels_survive():
    assert survives(emulator.build())


def survives(path):
    """Whether all checks pass in two thread orders; in a process of its own, which may crash."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            signal.alarm(60)
            torch.set_num_threads(1)
            module = emulator.load(path)
            for os.environ["WSIS_EMULATOR_SEED"] in ("0", "1"):
                run_all(module)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_are_silent(flavour):
    done = emulator.run_sanitized(__name__, flavour)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("flavour", "fault", "report"),
    [
        ("asan", (CU, "pixel >= pixels) return", "pixel > pixels) return"), "heap-buffer-overflow"),
        ("asan", (CU, "found == 0 || pixel >= reduced)", "found == 0)"), "heap-buffer-overflow"),
        (
            "asan",
            (CU, "i <= sizes.room; i +=", "i <= sizes.room + 1; i +="),
            "heap-buffer-overflow",
        ),
        ("asan", MORE_FAULTS["corner of the resize"], "heap-buffer-overflow"),
        ("tsan", FAULTS["barrier of the class list removed"], "data race"),
        ("tsan", FAULTS["barrier of the row sums removed"], "data race"),
    ],
)
def test_sanitizers_see_faults(flavour, fault, report):
    done = emulator.run_sanitized(__name__, flavour, (fault,))
    assert done.returncode != 0
    assert report in done.stderr
    assert "pseudo_masks" in done.stderr
