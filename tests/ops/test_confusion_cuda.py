"""csrc/cuda/confusion.cu, run by the emulator: equal to numpy, clean under sanitizers, and wrong
where a fault is seeded."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tests import emulator
from tests.ops.test_confusion import INTEGERS, THRESHOLDS, curve, maps, score_maps
from tests.reference import confusion as reference

pytestmark = pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")


@pytest.fixture(scope="module")
def module():
    return emulator.load(emulator.build())


def matrix(module, pred, target, num_classes, ignore_index=255):
    """Counts and status of the emulated operator."""
    tally = np.zeros(num_classes**2 + 2, np.int64)
    module.confusion_matrix_cuda(
        pred.reshape(-1), target.reshape(-1), tally, num_classes, ignore_index, 0
    )
    return tally[:-2].reshape(num_classes, num_classes), tally[-2:].tolist()


def threshold_curve(module, scores, target, thresholds, num_classes, ids=None):
    """scores [B, K, n], target [B, n]."""
    ids = np.arange(1, scores.shape[1] + 1) if ids is None else np.array(ids)
    steps = len(thresholds)
    tally = np.zeros(steps * num_classes**2 + 2, np.int64)
    histogram = np.zeros(num_classes * len(ids) * (steps + 1), np.int64)
    thresholds = np.asarray(thresholds, scores.dtype)
    module.threshold_curve_cuda(
        scores, target, thresholds, ids, tally, histogram, num_classes, 255, 0
    )
    return tally[:-2].reshape(steps, num_classes, num_classes), tally[-2:].tolist()


def check_matrix(module, n=1291, num_classes=21, pred="int64", target="uint8", seed=0):
    pred_map, target_map = maps((n,), num_classes, pred, target, seed)
    counts, status = matrix(module, pred_map, target_map, num_classes)
    assert np.array_equal(counts, reference.confusion_matrix(pred_map, target_map, num_classes))
    assert status == [0, 0]


def check_curve(module, shape=(2, 13, 23), channels=3, thresholds=THRESHOLDS, dtype="float32"):
    batch, size = shape[0], shape[1:]
    scores = np.stack([score_maps(size, channels, dtype, seed) for seed in range(batch)])
    target = np.stack([maps(size, channels + 1, seed=seed)[1] for seed in range(batch)])
    counts, status = threshold_curve(
        module,
        scores.reshape(batch, channels, -1),
        target.reshape(batch, -1),
        thresholds,
        channels + 1,
    )
    expected = [curve(s, t, thresholds, channels + 1) for s, t in zip(scores, target, strict=True)]
    assert np.array_equal(counts, sum(expected))
    assert status == [0, 0]


def check_status(module):
    pred, target = maps((700,), 3)
    target[[500, 600]], pred[400], target[400] = 17, -1, 1
    assert matrix(module, pred, target, 3)[1] == [3, 700 - 400]
    scores = np.zeros((1, 2, 700), np.float32)
    assert threshold_curve(module, scores, target[None], [0.5], 3)[1] == [2, 700 - 500]


@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize("n", [1, 35, 256, 257, 1291])
def test_matrix(module, monkeypatch, n, seed):
    monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
    check_matrix(module, n)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_matrix_of_any_integer(module, dtype):
    check_matrix(module, 300, 7, pred=dtype, target=dtype)


@pytest.mark.parametrize("num_classes", [1, 2, 110, 111, 200])
def test_matrix_beyond_shared_memory(module, num_classes):
    check_matrix(module, 700, num_classes)


@pytest.mark.parametrize("seed", ["0", "1"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (2, 13, 23), (3, 16, 16)])
def test_curve(module, monkeypatch, shape, seed):
    monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
    check_curve(module, shape)


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
@pytest.mark.parametrize("channels", [1, 20])
def test_curve_sizes(module, channels, steps):
    check_curve(module, (1, 9, 31), channels, np.linspace(0, 1, steps), "float64")


def test_chosen_classes(module):
    scores, target = score_maps((9, 31), 4), maps((9, 31), 8)[1]
    ids = [7, 0, 3, 3]
    counts, _ = threshold_curve(
        module, scores.reshape(1, 4, -1), target.reshape(1, -1), THRESHOLDS, 8, ids
    )
    assert np.array_equal(counts, curve(scores, target, THRESHOLDS, 8, class_ids=ids))


def test_status(module):
    check_status(module)


@pytest.mark.long
def test_more_pixels_than_threads(module):
    check_matrix(module, 2048 * 256 + 3, 2)


def run_all(module):
    """What the sanitizers see: every kernel, odd sizes, within and beyond shared memory.

    A wrong value does not stop it: a sanitizer may see the reason only in a later check.
    """
    checks = [
        *(partial(check_matrix, n=n) for n in (1, 257, 515, 700)),
        partial(check_matrix, n=300, num_classes=111),
        check_curve,
        partial(check_curve, shape=(1, 9, 31), channels=20, thresholds=np.linspace(0, 1, 64)),
        check_status,
    ]
    wrong = []
    for check in checks:
        try:
            check(module)
        except AssertionError:
            wrong.append(check)
    assert not wrong


STRIDE = "const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;"
FLUSH = "for (int i = threadIdx.x; i < cells; i += blockDim.x)\n        if"
# Wrong, but within their memory: what reaches beyond it is for the address sanitizer.
FAULTS = {
    "first barrier removed": ("local[i] = 0;\n      __syncthreads();", "local[i] = 0;"),
    "last barrier removed": (f"__syncthreads();\n      {FLUSH}", FLUSH),
    "one thread leaves early": (
        f"counters.clear();\n  {STRIDE}\n  for",
        f"if (threadIdx.x == 7) return;\n  counters.clear();\n  {STRIDE}\n  for",
    ),
    "bound of the pixels narrowed": ("threadIdx.x; i < n;", "threadIdx.x; i < n - 1;"),
    "row and column swapped": ("cell_index(t, p, num_classes)", "cell_index(p, t, num_classes)"),
    "target of a row": ("row / num_channels, static", "row % num_channels, static"),
}
MORE_FAULTS = {
    "no room for the last bucket": ("(num_thresholds + 1)};", "num_thresholds};"),
    "last cell not cleared": (
        "i < cells; i += blockDim.x) local",
        "i + 1 < cells; i += 256) local",
    ),
    "stride of the threads": ("+ threadIdx.x; i < n;", "+ 2 * threadIdx.x; i < n;"),
    "image of a pixel": ("image = i / n", "image = i / (n + 1)"),
    "channel of a row": ("class_ids[row % num_channels]", "class_ids[(row + 1) % num_channels]"),
    "status off by one": (
        "report_bad(tally + cells, n - i)",
        "report_bad(tally + cells, n + 1 - i)",
    ),
    "row of the histogram": ("row) * (num_thresholds + 1)", "row) * num_thresholds"),
    "flush loses a cell": ("if (local[i] != 0)", "if (local[i] != 0 && i != 3)"),
}


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_FAULTS)]
)
def test_seeded_fault_is_caught(monkeypatch, fault):
    edit = (FAULTS | MORE_FAULTS)[fault]
    broken = emulator.load(emulator.build(edits=(("confusion.cu", *edit),)))
    caught = []
    for seed in ("0", "1"):
        monkeypatch.setenv("WSIS_EMULATOR_SEED", seed)
        for check in (check_matrix, check_curve, check_status):
            try:
                check(broken)
            except (AssertionError, RuntimeError) as error:
                caught.append(error)
    assert caught, "the tests above cannot see this fault"


def test_divergence_is_named():
    fault = FAULTS["one thread leaves early"]
    broken = emulator.load(emulator.build(edits=(("confusion.cu", *fault),)))
    with pytest.raises(RuntimeError, match="barrier divergence: 255 threads wait, 1/256 have left"):
        check_matrix(broken)


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_are_silent(flavour):
    done = emulator.run_sanitized(__name__, flavour)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("flavour", "fault", "report"),
    [
        ("asan", ("threadIdx.x; i < n;", "threadIdx.x; i <= n;"), "heap-buffer-overflow"),
        (
            "asan",
            ("i < cells; i += blockDim.x) local", "i <= cells; i += 256) local"),
            "heap-buffer-overflow",
        ),
        ("asan", ("if (row >= num_cl", "if (row > num_cl"), "heap-buffer-overflow"),
        ("tsan", FAULTS["first barrier removed"], "data race"),
        ("tsan", FAULTS["last barrier removed"], "data race"),
        ("tsan", ("atomicAdd(&local[cell], 1u);", "++local[cell];"), "data race"),
    ],
)
def test_sanitizers_see_faults(flavour, fault, report):
    done = emulator.run_sanitized(__name__, flavour, (("confusion.cu", *fault),))
    assert done.returncode != 0
    assert report in done.stderr
    assert "confusion.cu" in done.stderr
