"""Boxes of score maps at 1,000 thresholds against the loop over thresholds with OpenCV.

The loop is that of the field's evaluator with all that can be spared taken out: thresholds that
cut at the same level are looked at once. Both must give the same overlaps.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.reference import score_boxes as reference
from wsis.ops import box_iou, box_overlaps

cv2 = pytest.importorskip("cv2")
MAPS, SIZE, THRESHOLDS = 8, 224, np.arange(0, 1, 0.001)


def class_activation_maps():
    """14 x 14 peaks, enlarged, from 0 to 1: as localization scores them. One true box each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:14, :14]
    maps = []
    for _ in range(MAPS):
        cy, cx, size = *rng.uniform(3, 11, 2), rng.uniform(2, 5)
        hill = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / size**2) + 0.3 * rng.random((14, 14))
        large = cv2.resize(hill, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
        maps.append((large - large.min()) / np.ptp(large))
    return np.stack(maps), np.sort(rng.integers(0, SIZE, (MAPS, 2, 2)), axis=1).reshape(MAPS, 4)


def every_threshold(maps, truth, contours, once):
    """``once``: thresholds that cut at the same level are looked at once."""
    best = np.empty((len(maps), len(THRESHOLDS)))
    for n, levels in enumerate((maps * 255).astype(np.uint8)):
        seen = {}
        for k, cut in enumerate((THRESHOLDS * levels.max()).astype(int).tolist()):
            if cut not in seen or not once:
                found = reference.opencv_boxes(levels, cut, contours == "largest")
                seen[cut] = box_iou(found, truth[n : n + 1]).max()
            best[n, k] = seen[cut]
    return best


WAYS = {
    "wsis": lambda maps, truth, contours: box_overlaps(
        maps, truth, np.arange(MAPS), THRESHOLDS, contours
    ),
    "opencv_loop": lambda *case: every_threshold(*case, once=False),
    "opencv_each_level_once": lambda *case: every_threshold(*case, once=True),
}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("metric", "contours"), [("MaxBoxAccV2", "all"), ("MaxBoxAcc", "largest")])
def test_boxes(benchmark, metric, contours, way):
    cv2.setNumThreads(1)
    case = (*class_activation_maps(), contours)
    if way == "wsis":
        assert np.array_equal(WAYS["wsis"](*case), every_threshold(*case, once=True))
    benchmark.group = f"{metric}, {MAPS} maps {SIZE} x {SIZE}, 1000 thresholds"
    benchmark.extra_info["baseline"] = way == "opencv_loop"
    benchmark.pedantic(WAYS[way], args=case, rounds=3 if "opencv" in way else 20, warmup_rounds=1)
