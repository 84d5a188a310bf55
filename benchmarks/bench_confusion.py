"""Threshold sweep and confusion matrix against numpy, one image of Pascal VOC's size.

Two baselines for the sweep: the usual one, an argmax and a bincount per threshold, and a better one
that takes the argmax once. Both give the same counts, which is asserted before anything is timed.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference import confusion as reference
from wsis.ops import confusion_matrix, threshold_curve

K, H, W, T = 20, 375, 500, 60
THRESHOLDS = np.linspace(0, 0.6, T).astype(np.float32)


@pytest.fixture(scope="module")
def image():
    """Smooth scores of three present classes, as a CAM has them, and blocks of true classes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:H, :W]
    scores = np.zeros((K, H, W), np.float32)
    for k in (2, 7, 14):
        cy, cx = rng.integers(0, H), rng.integers(0, W)
        scores[k] = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 2e4)
    scores += rng.random((K, H, W), np.float32) * 0.02
    target = np.where(scores.max(0) > 0.4, scores.argmax(0) + 1, 0).astype(np.uint8)
    target[::25] = 255
    return scores, target


def numpy_one_argmax(scores, target, thresholds, num_classes):
    """The argmax does not depend on the threshold: take it once, then one bincount each."""
    counted = target != 255
    best, label = scores.max(0)[counted], scores.argmax(0)[counted] + 1
    offset = target[counted].astype(np.int64) * num_classes
    return np.stack(
        [np.bincount(offset + label * (best > t), minlength=num_classes**2) for t in thresholds]
    ).reshape(-1, num_classes, num_classes)


SWEEPS = {
    "numpy_pass_per_threshold": lambda s, t: reference.threshold_curve(s, t, THRESHOLDS, K + 1),
    "numpy_one_argmax": lambda s, t: numpy_one_argmax(s, t, THRESHOLDS, K + 1),
    "wsis": lambda s, t: threshold_curve(s, t, THRESHOLDS, num_classes=K + 1),
}


@pytest.mark.benchmark(group=f"threshold curve, {K} x {H} x {W}, {T} thresholds")
@pytest.mark.parametrize("way", SWEEPS)
def test_sweep(benchmark, image, way):
    expected = SWEEPS["numpy_pass_per_threshold"](*image)
    assert np.array_equal(SWEEPS[way](*image), expected)
    benchmark.extra_info["baseline"] = way == "numpy_pass_per_threshold"
    slow = way != "wsis"
    benchmark.pedantic(
        SWEEPS[way], args=image, rounds=3 if slow else 50, warmup_rounds=0 if slow else 2
    )


MATRICES = {
    "numpy_bincount": lambda p, t: reference.confusion_matrix(p, t, K + 1),
    "wsis": lambda p, t: confusion_matrix(p, t, K + 1),
}


@pytest.mark.benchmark(group=f"confusion matrix, {H} x {W} uint8")
@pytest.mark.parametrize("way", MATRICES)
def test_matrix(benchmark, image, way):
    scores, target = image
    pred = np.where(scores.max(0) > 0.3, scores.argmax(0) + 1, 0).astype(np.uint8)
    assert np.array_equal(MATRICES[way](pred, target), MATRICES["numpy_bincount"](pred, target))
    benchmark.extra_info["baseline"] = way == "numpy_bincount"
    benchmark.pedantic(MATRICES[way], args=(pred, target), rounds=50, warmup_rounds=2)
