from __future__ import annotations

import numpy as np
import pytest

from tests.reference import score_boxes as reference
from tests.workers import run_forked
from wsis.errors import InputError
from wsis.ops import _native, box_iou, box_overlaps, score_boxes


def score_map(levels):
    """Scores whose levels are these, away from the ties of rounding."""
    return np.minimum(1, (levels + 0.25) / 255)


@pytest.mark.parametrize("step", [0.01, 0.001])
@pytest.mark.parametrize(("rule", "contours"), [("single", "largest"), ("multi", "all")])
def test_golden_counts(golden, golden_spec, assert_golden, step, rule, contours):
    z, spec = golden("wsol_box_n24"), golden_spec("wsol_box_n24")
    best = box_overlaps(
        score_map(z["map_u8"]), z["gt_boxes_224"], z["gt_owner"], np.arange(0, 1, step), contours
    )
    name = f"num_correct_{rule}" + ("_fine" if step == 0.001 else "")
    correct = np.stack([(best >= d / 100).sum(axis=0) for d in spec["params"]["iou_thresholds"]])
    assert_golden(spec, name, correct.astype(np.int32), z[name])


@pytest.mark.parametrize(("rule", "contours"), [("single", "largest"), ("multi", "all")])
def test_golden_boxes(golden, golden_spec, assert_golden, rule, contours):
    z, spec = golden("wsol_box_n24"), golden_spec("wsol_box_n24")
    maps = score_map(z["map_u8"])[spec["params"]["box_images"]]
    found = [[score_boxes(m, t, contours) for t in np.arange(0, 1, 0.01)] for m in maps]
    counts = np.array([[len(boxes) for boxes in row] for row in found], np.int16)
    assert_golden(spec, f"box_count_{rule}", counts, z[f"box_count_{rule}"])
    boxes = np.concatenate([boxes for row in found for boxes in row]).astype(np.int16)
    assert_golden(spec, f"boxes_{rule}", boxes, z[f"boxes_{rule}"])


def test_golden_iou(golden, golden_spec, assert_golden):
    z, spec = golden("wsol_box_n24"), golden_spec("wsol_box_n24")
    assert_golden(spec, "iou", box_iou(z["iou_a"], z["iou_b"]).astype(np.float32), z["iou"])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (2, 2), (3, 3), (9, 13), (17, 11)])
def test_boxes_are_those_of_labelling(size):
    rng = np.random.default_rng(sum(size))
    for _ in range(8):
        levels = reference.random_map(rng, *size)
        for threshold in (0, 0.3, 0.5, 0.99):
            cut = int(threshold * levels.max())
            expected = reference.boxes_all(levels, cut) or [[0, 0, 0, 0]]
            assert score_boxes(levels, threshold).tolist() == expected


def compare_with_opencv(maps, thresholds, seed):
    pytest.importorskip("cv2")
    rng = np.random.default_rng(seed)
    for _ in range(maps):
        height, width = rng.integers(1, 40, 2)
        levels = reference.random_map(rng, height, width)
        corners = np.sort(rng.integers(0, min(height, width), (3, 2, 2)), axis=1)
        truth = corners.reshape(3, 4)
        steps = np.linspace(0, 1, thresholds, endpoint=False)
        for largest in (False, True):
            contours = "largest" if largest else "all"
            best = box_overlaps(levels[None], truth, [0, 0, 0], steps, contours)[0]
            cuts = (steps * levels.max()).astype(int)
            overlaps = {}
            for cut in set(cuts.tolist()):
                expected = reference.opencv_boxes(levels, cut, largest)
                overlaps[cut] = box_iou(expected, truth).max()
            assert best.tolist() == [overlaps[cut] for cut in cuts]
            cut = int(0.4 * levels.max())
            found = score_boxes(levels, 0.4, contours).tolist()
            assert found == reference.opencv_boxes(levels, cut, largest)


def test_equals_opencv():
    compare_with_opencv(maps=200, thresholds=25, seed=0)


@pytest.mark.long
def test_equals_opencv_in_full():
    compare_with_opencv(maps=5000, thresholds=100, seed=1)


def test_nothing_is_found_in_a_map_of_zeros():
    levels = np.zeros((1, 4, 5), np.uint8)
    assert score_boxes(levels[0], 0.2).tolist() == [[0, 0, 0, 0]]
    assert box_overlaps(levels, [[0, 0, 1, 0]], [0], [0.0, 1.0]).tolist() == [[0.5, 0.5]]
    full = np.full((1, 4, 5), 9, np.uint8)  # nothing is above the maximum itself
    assert box_overlaps(full, [[0, 0, 4, 3]], [0], [0.0, 1.0]).tolist() == [[1, 1 / 20]]


def test_maps_without_a_true_box_score_zero():
    levels = np.full((3, 4, 5), 9, np.uint8)
    best = box_overlaps(levels, [[0, 0, 4, 3]], [1], [0.5])
    assert best[:, 0].tolist() == [0, 1, 0]
    assert box_overlaps(levels, [], np.empty(0, int), [0.5]).tolist() == [[0]] * 3
    assert box_overlaps(levels[:0], [], np.empty(0, int), [0.5]).shape == (0, 1)


def case(maps=6):
    rng = np.random.default_rng(3)
    levels = np.stack([reference.random_map(rng, 31, 23) for _ in range(maps)])
    truth = np.array([[2, 3, 12, 20], [5, 5, 9, 9], [0, 0, 22, 30]])
    return levels, truth, np.array([4, 0, 4]), np.arange(0, 1, 0.1)


def test_threads_do_not_matter(monkeypatch):
    expected = box_overlaps(*case())
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    for threads in (1, 2, 3, 64):
        monkeypatch.setattr(_native, "num_threads", lambda n=threads: n)
        assert np.array_equal(box_overlaps(*case()), expected)


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(_native, "num_threads", lambda: 4)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    expected = box_overlaps(*case())  # threads have run in the parent
    assert all(np.array_equal(best, expected) for best in run_forked(box_overlaps, *case()))


BAD = {
    "shape": (lambda: score_boxes(np.zeros(4), 0.5), r"\[H, W\]"),
    "dtype": (lambda: score_boxes(np.zeros((2, 2), np.int64), 0.5), "int64"),
    "range": (lambda: score_boxes(np.full((2, 2), 1.5), 0.5), "1.5"),
    "nan": (lambda: score_boxes(np.full((2, 2), np.nan), 0.5), "nan"),
    "threshold": (lambda: score_boxes(np.zeros((2, 2)), 1.5), "thresholds"),
    "contours": (lambda: score_boxes(np.zeros((2, 2)), 0.5, "most"), "'most'"),
    "corner": (lambda: box_iou([[3, 0, 1, 1]], [[0, 0, 1, 1]]), r"\[3, 0, 1, 1\]"),
    "negative": (lambda: box_iou([[-1, 0, 1, 1]], [[0, 0, 1, 1]]), r"\[-1, 0, 1, 1\]"),
    "four": (lambda: box_iou([[0, 1, 1]], [[0, 0, 1, 1]]), r"\[M, 4\]"),
    "owner": (lambda: box_overlaps(np.zeros((1, 2, 2)), [[0, 0, 1, 1]], [1], [0.5]), "owner"),
    "owners": (lambda: box_overlaps(np.zeros((1, 2, 2)), [[0, 0, 1, 1]], [0, 0], [0.5]), "owner"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(InputError, match=message):
        call()
