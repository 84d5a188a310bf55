"""The emulator's counters, on kernels whose traffic is known to the byte."""

from __future__ import annotations

import numpy as np
import pytest

from tests import emulator
from tests.ops.test_confusion import maps, score_maps

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build("count"))


def matrix_arguments(n, num_classes):
    pred, target = maps((n,), num_classes, "int64", "uint8")
    return pred, target, np.zeros(num_classes**2 + 2, np.int64), num_classes, 255, 0


def test_confusion_matrix_reads_each_map_once(module):
    n, num_classes = 1291, 6
    arguments = matrix_arguments(n, num_classes)
    target, tally = arguments[1:3]
    (launch,) = emulator.count(module.confusion_matrix_cuda, *arguments)
    assert launch.grid == (6, 1, 1)
    assert launch.block == (256, 1, 1)
    assert launch.shared == 4 * num_classes**2
    counted = int((target != 255).sum())
    assert launch.arrays[0] == emulator.Traffic(8 * counted, 0, 8 * counted, 0)
    assert launch.arrays[1] == emulator.Traffic(n, 0, n, 0)
    # Shared counters are flushed once a block, by atomics, and only where they are not 0.
    used = np.count_nonzero(tally[:-2])
    tallied = launch.arrays[2]
    assert tallied.read == tallied.written == 8 * used
    assert tallied.stored <= 8 * 6 * used
    assert launch.read == 8 * counted + n + 8 * used
    assert tally[:-2].sum() == counted


def test_confusion_matrix_beyond_shared_memory(module):
    n, num_classes = 500, 120
    arguments = matrix_arguments(n, num_classes)
    (launch,) = emulator.count(module.confusion_matrix_cuda, *arguments)
    assert launch.shared == 0
    assert launch.arrays[2].stored == 8 * int((arguments[1] != 255).sum())  # one atomic a pixel


def test_threshold_curve_is_two_launches(module):
    batch, channels, n, steps, num_classes = 2, 3, 300, 7, 4
    scores = np.stack([score_maps((n,), channels, seed=s) for s in range(batch)])
    target = np.stack([maps((n,), num_classes, target="uint8", seed=s)[1] for s in range(batch)])
    thresholds = np.linspace(0, 1, steps, dtype=np.float32)
    tally = np.zeros(steps * num_classes**2 + 2, np.int64)
    histogram = np.zeros(num_classes * channels * (steps + 1), np.int64)
    first, second = emulator.count(
        module.threshold_curve_cuda,
        *(scores, target, thresholds, np.arange(1, channels + 1), tally, histogram),
        *(num_classes, 255, 0),
    )
    counted = int((target != 255).sum())
    assert first.arrays[0].read == first.arrays[0].loaded == 4 * channels * counted
    assert first.arrays[1] == emulator.Traffic(target.size, 0, target.size, 0)
    assert first.arrays[4].written == 0
    assert second.kernel == "&spread_kernel"
    assert second.arrays[5].read == histogram.nbytes  # the histogram, once
    assert second.arrays[0].read == 0
    assert second.arrays[4].written == 8 * np.count_nonzero(tally[:-2])


def test_nothing_is_counted_outside_a_count(module):
    arguments = matrix_arguments(40, 3)
    module.confusion_matrix_cuda(*arguments)
    assert len(emulator.count(module.confusion_matrix_cuda, *arguments)) == 1
    assert len(emulator.count(module.confusion_matrix_cuda, *arguments)) == 1


def test_a_wasteful_kernel_is_seen():
    """Seeded fault: two threads of the grid share each pixel."""
    fault = (
        "confusion.cu",
        "for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;\n"
        "       i += stride) {",
        "for (int64_t i = static_cast<int64_t>(blockIdx.x / 2) * blockDim.x + threadIdx.x; i < n;\n"
        "       i += stride) {",
    )
    wasteful = emulator.load(emulator.build("count", (fault,)))
    arguments = matrix_arguments(512, 3)
    (launch,) = emulator.count(wasteful.confusion_matrix_cuda, *arguments)
    assert launch.arrays[1] == emulator.Traffic(256, 0, 512, 0)


def test_function_of_another_module_is_refused():
    plain = emulator.load(emulator.build())
    with pytest.raises(AttributeError, match="wsis_count_start"):
        emulator.count(plain.confusion_matrix_cuda, *matrix_arguments(4, 2))
