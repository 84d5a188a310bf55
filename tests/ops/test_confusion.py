from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import confusion as reference
from tests.workers import run_forked
from wsis import _C
from wsis.errors import InputError
from wsis.ops import _native, confusion_matrix, threshold_curve

INTEGERS = ["uint8", "int16", "int32", "int64"]
SHAPES = [(1, 1), (7, 5), (0, 3), (61, 75)]
THRESHOLDS = np.linspace(0, 1, 13)


def maps(shape, num_classes, pred="int64", target="int64", seed=0):
    rng = np.random.default_rng(seed)
    pred_map = rng.integers(0, num_classes, shape).astype(pred)
    target_map = rng.integers(0, num_classes, shape)
    target_map[rng.random(shape) < 0.2] = 255
    target_map.flat[:1] = target_map.flat[-1:] = num_classes - 1  # the ends always count
    return pred_map, target_map.astype(target)


def score_maps(shape, channels, dtype=np.float32, seed=0):
    """Scores with many exact ties among themselves and with THRESHOLDS, and a few non-finite."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 15, (channels, *shape)) / 12
    scores[rng.random(scores.shape) < 0.01] = np.nan
    scores[rng.random(scores.shape) < 0.01] = np.inf
    scores[rng.random(scores.shape) < 0.01] = -np.inf
    return scores.astype(dtype)


def curve(scores, target, thresholds, num_classes, **options):
    """The reference, told that NaN never wins."""
    wide = np.where(np.isnan(scores), -np.inf, scores).astype(
        np.promote_types(scores.dtype, np.float32)
    )
    return reference.threshold_curve(wide, target, thresholds, num_classes, **options)


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    return np.asarray if request.param == "numpy" else torch.from_numpy


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target_dtype", INTEGERS)
@pytest.mark.parametrize("pred_dtype", INTEGERS)
def test_matrix_equals_reference(kind, shape, pred_dtype, target_dtype):
    pred, target = maps(shape, 21, pred_dtype, target_dtype)
    counts = confusion_matrix(kind(pred), kind(target), 21)
    assert type(counts) is type(kind(pred))
    assert np.array_equal(counts, reference.confusion_matrix(pred, target, 21))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    num_classes=st.sampled_from([1, 2, 21, 81, 200]),
    ignore_index=st.sampled_from([255, -1, -100, 0, 2**40]),
    seed=st.integers(0, 99),
)
def test_matrix_on_any_shape(shape, num_classes, ignore_index, seed):
    rng = np.random.default_rng(seed)
    pred = np.asarray(rng.integers(0, num_classes, shape))
    target = np.asarray(rng.integers(0, num_classes, shape))
    target = np.where(rng.random(shape) < 0.3, ignore_index, target)
    expected = reference.confusion_matrix(
        pred.reshape(-1), target.reshape(-1), num_classes, ignore_index
    )
    counts = confusion_matrix(pred, target, num_classes, ignore_index=ignore_index)
    assert np.array_equal(counts, expected)


def test_layout_does_not_matter(kind):
    pred, target = maps((40, 60), 5)
    scores = np.random.default_rng(0).random((60, 4, 40), np.float32).transpose(1, 2, 0)
    expected = confusion_matrix(pred, target, 5)
    strided_pred, strided_target = kind(np.asfortranarray(pred)), kind(np.repeat(target, 2, 1))
    assert np.array_equal(confusion_matrix(strided_pred, strided_target[:, ::2], 5), expected)
    plain = threshold_curve(np.ascontiguousarray(scores), target, THRESHOLDS, num_classes=5)
    strided = threshold_curve(kind(scores), strided_target[:, ::2], THRESHOLDS, num_classes=5)
    assert np.array_equal(strided, plain)


def test_arrays_may_be_read_only_or_require_grad():
    pred, target = maps((7, 5), 3)
    scores = score_maps((7, 5), 2)
    expected = threshold_curve(scores, target, THRESHOLDS, num_classes=3)
    for array in (pred, target, scores):
        array.flags.writeable = False
    assert np.array_equal(threshold_curve(scores, target, THRESHOLDS, num_classes=3), expected)
    assert confusion_matrix(pred, target, 3).sum() == (target != 255).sum()
    grad = torch.tensor(scores, requires_grad=True)
    counts = threshold_curve(grad, torch.tensor(target), THRESHOLDS, num_classes=3)
    assert not counts.requires_grad
    assert np.array_equal(counts, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_matter(monkeypatch, threads):
    monkeypatch.setattr(_native, "num_threads", lambda: threads)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    pred, target = maps((61, 75), 6)
    scores = score_maps((61, 75), 5)
    expected = reference.confusion_matrix(pred, target, 6)
    assert np.array_equal(confusion_matrix(pred, target, 6), expected)
    counts = threshold_curve(scores, target, THRESHOLDS, num_classes=6)
    assert np.array_equal(counts, curve(scores, target, THRESHOLDS, 6))


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(_native, "num_threads", lambda: 4)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    pred, target = maps((61, 75), 6)
    expected = confusion_matrix(pred, target, 6)  # threads have run in the parent
    results = run_forked(confusion_matrix, pred, target, 6)
    assert all(np.array_equal(counts, expected) for counts in results)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_curve_equals_one_pass_per_threshold(kind, shape, dtype):
    scores, (_, target) = score_maps(shape, 20, dtype), maps(shape, 21, target="uint8")
    counts = threshold_curve(kind(scores), kind(target), THRESHOLDS, num_classes=21)
    assert type(counts) is type(kind(scores))
    assert np.array_equal(counts, curve(scores, target, THRESHOLDS, 21))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 60, 1000])
def test_curve_at_any_number_of_thresholds(steps):
    rng = np.random.default_rng(steps)
    thresholds = np.sort(rng.choice(np.linspace(-0.1, 1.1, 40), steps)).astype(np.float32)
    scores, (_, target) = score_maps((17, 13), 3), maps((17, 13), 4)
    counts = threshold_curve(scores, target, thresholds, num_classes=4)
    assert np.array_equal(counts, curve(scores, target, thresholds, 4))


def test_curve_of_a_batch_with_chosen_classes(kind):
    ids = [7, 0, 3, 3]
    scores = np.stack([score_maps((9, 31), 4, seed=s) for s in range(3)])
    target = np.stack([maps((9, 31), 8, seed=s)[1] for s in range(3)])
    counts = threshold_curve(kind(scores), kind(target), THRESHOLDS, class_ids=ids, num_classes=8)
    single = [
        curve(s, t, THRESHOLDS, 8, class_ids=ids) for s, t in zip(scores, target, strict=True)
    ]
    assert np.array_equal(counts, sum(single))


def test_bfloat16_is_compared_in_float32():
    scores = torch.from_numpy(score_maps((7, 5), 3)).bfloat16()
    target = torch.from_numpy(maps((7, 5), 4)[1])
    counts = threshold_curve(scores, target, THRESHOLDS, num_classes=4)
    assert torch.equal(counts, threshold_curve(scores.float(), target, THRESHOLDS, num_classes=4))


def test_value_out_of_range_is_named(kind):
    pred, target = np.array([[0, 1, 2], [1, 9, -3]]), np.array([[0, 255, 2], [1, 1, 1]])
    with pytest.raises(InputError, match=r"pred must be in \[0, 3\).*got 9 at \[1, 1\] and at 1 m"):
        confusion_matrix(kind(pred), kind(target), 3)
    target[0, 2] = 21
    with pytest.raises(
        InputError, match=r"target must be in \[0, 3\).*got 21 at \[0, 2\] and at 2"
    ):
        confusion_matrix(kind(pred), kind(target), 3)
    scores = np.zeros((2, 2, 3), np.float32)
    with pytest.raises(InputError, match=r"got 21 at \[0, 0, 2\]$"):
        threshold_curve(kind(scores), kind(target), [0.5], num_classes=3)
    # What is not counted may hold anything.
    assert confusion_matrix(kind(np.array([77])), kind(np.array([255])), 3).sum() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred": np.zeros((2, 3), int)}, r"one shape, got \[2, 3\] and \[2, 2\]"),
        ({"pred": np.zeros((2, 2), np.float32)}, "pred must be one of uint8.*got float32"),
        ({"target": np.zeros((2, 2), bool)}, "target must be one of uint8.*got bool"),
        ({"pred": torch.zeros(2, 2, dtype=torch.int64)}, "both be torch.*got tensor and ndarray"),
        ({"pred": [[0, 0], [0, 0]]}, "got list and ndarray"),
        ({"num_classes": 0}, "num_classes must be in"),
    ],
)
def test_matrix_refuses(changes, message):
    arguments = {"pred": np.zeros((2, 2), int), "target": np.zeros((2, 2), int), "num_classes": 3}
    with pytest.raises(InputError, match=message):
        confusion_matrix(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": []}, "one or more ascending"),
        ({"thresholds": [0.2, 0.1]}, "one or more ascending"),
        ({"thresholds": [float("nan")]}, "one or more ascending"),
        ({"class_ids": [1]}, "class_ids must be 2 ids"),
        ({"class_ids": [1, 3]}, "class_ids must be 2 ids"),
        ({"num_classes": 2}, "class_ids must be 2 ids"),
        ({"scores": np.zeros((2, 2), np.float32)}, r"scores must be \[K, H, W\] or"),
        ({"scores": np.zeros((2, 2, 2), int)}, "scores must be one of float16"),
        ({"target": np.zeros((3, 2), int)}, "target must be scores' shape without K"),
    ],
)
def test_curve_refuses(changes, message):
    arguments = {
        "scores": np.zeros((2, 2, 2), np.float32),
        "target": np.zeros((2, 2), int),
        "thresholds": [0.5],
        "num_classes": 3,
    }
    with pytest.raises(InputError, match=message):
        threshold_curve(**(arguments | changes))


def test_bindings_guard_themselves():
    pred, tally, scratch = np.zeros(4, int), np.zeros(6, int), np.zeros((1, 6), int)
    call = _C.confusion_matrix_cpu
    with pytest.raises(ValueError, match="target must be of shape"):
        call(pred, pred[:3], tally, scratch, 2, 255)
    with pytest.raises(ValueError, match="contiguous"):
        call(np.zeros(8, int)[::2], pred, tally, scratch, 2, 255)
    with pytest.raises(ValueError, match="tally must be of shape"):
        call(pred, pred, tally, scratch, 3, 255)
    with pytest.raises(ValueError, match="pred must be uint8 or int16"):
        call(pred.astype(float), pred, tally, scratch, 2, 255)
    tally.flags.writeable = False
    with pytest.raises(ValueError, match="tally is read-only"):
        call(pred, pred, tally, scratch, 2, 255)
    with pytest.raises(TypeError):
        call([0], pred, tally, scratch, 2, 255)


class Foreign:
    """An array of another library: all there is is DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy, Foreign, _native.view])
def test_how_an_array_comes_in_does_not_matter(wrap):
    pred, target = maps((99,), 4)
    tally, scratch = np.empty(18, int), np.empty((1, 18), int)
    _C.confusion_matrix_cpu(wrap(pred), wrap(target), tally, scratch, 4, 255)
    assert np.array_equal(tally[:16].reshape(4, 4), reference.confusion_matrix(pred, target, 4))


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_other_instruction_sets(isa):
    """The choice is made once per process, so the others are run in one of their own."""
    program = (
        "from tests.ops.test_confusion import *; from wsis import _C\n"
        "print(_C.build_info()['isa_active'])\n"
        "test_curve_of_a_batch_with_chosen_classes(np.asarray)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True, env=os.environ | {"WSIS_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [isa]


def test_no_memory_is_kept():
    pred, target = (torch.from_numpy(m) for m in maps((64, 64), 4))
    before = sys.getrefcount(pred)
    for _ in range(100):
        confusion_matrix(pred, target, 4)
    assert sys.getrefcount(pred) == before


@pytest.mark.parametrize(
    "sample",
    [((4, 5), "uint8"), ((0,), "int64"), ((1, 1), "int32"), ((3, 7, 2), "int16")],
)
def test_opcheck_matrix(sample):
    shape, dtype = sample
    pred, target = (torch.from_numpy(m) for m in maps(shape, 3, dtype, "int64"))
    torch.library.opcheck(torch.ops.wsis.confusion_matrix, (pred, target, 3, 255))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1)])
def test_opcheck_curve(shape, dtype):
    scores = torch.from_numpy(score_maps(shape, 2, dtype))[None]
    target = torch.from_numpy(maps(shape, 3)[1])[None]
    arguments = (scores, target, [0.1, 0.5], [1, 2], 3, 255)
    torch.library.opcheck(torch.ops.wsis.threshold_curve, arguments)


def test_compiles_as_one_graph():
    pred, target = (torch.from_numpy(m) for m in maps((9, 8), 3))
    scores = torch.from_numpy(score_maps((9, 8), 2))

    def both(pred, target, scores):
        counts = confusion_matrix(pred, target, 3)
        return counts + 1, threshold_curve(scores, target, [0.1, 0.5], num_classes=3)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(pred, target, scores), both(pred, target, scores), strict=True
    ):
        assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match=r"a class is outside \[0, 3\)"):
        compiled(pred + 3, target, scores)


def test_numpy_needs_no_torch():
    program = """
        import sys
        sys.modules["torch"] = None  # importing it fails
        import numpy as np
        from wsis.ops import confusion_matrix, threshold_curve
        ones = np.ones((2, 2), np.uint8)
        assert confusion_matrix(ones, ones, 2)[1, 1] == 4
        scores = np.ones((1, 2, 2), np.float32)
        assert threshold_curve(scores, ones, [0.5, 1], num_classes=2)[:, 1].tolist() == [
            [0, 4], [4, 0]]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@pytest.mark.long
@settings(max_examples=5000, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 130), st.integers(0, 130)),
    channels=st.integers(1, 80),
    steps=st.integers(1, 100),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    seed=st.integers(0, 9999),
)
def test_curve_on_anything(shape, channels, steps, dtype, seed):
    scores = score_maps(shape, channels, dtype, seed)
    target = maps(shape, channels + 1, seed=seed)[1]
    thresholds = np.linspace(-0.2, 1.2, steps).astype(np.promote_types(dtype, np.float32))
    counts = threshold_curve(scores, target, thresholds, num_classes=channels + 1)
    assert np.array_equal(counts, curve(scores, target, thresholds, channels + 1))
