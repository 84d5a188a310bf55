"""Mean IoU as each row of the conventions' table describes it: pixel by pixel, a function a row.

Every function takes predictions and truths (lists of 2-D integer arrays, 255 without ground truth)
and the number of classes C, and gives per-class IoU and their mean as ratios, NaN where there is
none; `Refused` stands for the original's exception.
"""

from __future__ import annotations

from collections import Counter

import numpy as np


class Refused(Exception):
    """The original stops here."""


def pixels(predictions, truths):
    for p, t in zip(predictions, truths, strict=True):
        yield from zip(p.ravel().tolist(), t.ravel().tolist(), strict=True)


def ratios(true_positive, false_positive, false_negative, size, epsilon=0.0):
    iou = []
    for c in range(size):
        union = true_positive[c] + false_positive[c] + false_negative[c] + epsilon
        iou.append(true_positive[c] / union if union else float("nan"))
    return iou


def count(pairs):
    """True positives, false positives, false negatives of each class."""
    tp, fp, fn = Counter(), Counter(), Counter()
    for p, t in pairs:
        if p == t:
            tp[t] += 1
        else:
            fp[p] += 1
            fn[t] += 1
    return tp, fp, fn


def average(values):
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def defined(iou):
    return [value for value in iou if value == value]


def voc_devkit(predictions, truths, size):
    """Ids >= C anywhere in the file are an error; a class that is nowhere makes the mean NaN."""
    if any(p.size and p.max() >= size for p in predictions):
        raise Refused
    iou = ratios(*count((p, t) for p, t in pixels(predictions, truths) if t < 255), size)
    return iou, average(iou)


def voc(predictions, truths, size):
    """The devkit's, but a class that is nowhere leaves the mean."""
    iou, _ = voc_devkit(predictions, truths, size)
    return iou, average(defined(iou))


def one_stage(predictions, truths, size):
    """Pixels with truth < C; an id >= C is an index error; epsilon 1e-20: nowhere counts 0."""
    matrix = [[0.0] * size for _ in range(size)]
    for p, t in pixels(predictions, truths):
        if t < size:
            if p >= size:
                raise Refused
            matrix[t][p] += 1.0
    iou = []
    for c in range(size):
        tp = matrix[c][c]
        fn = sum(matrix[c]) - tp
        fp = sum(row[c] for row in matrix) - tp
        iou.append(tp / (1e-20 + fn + fp + tp))
    return iou, average(iou)


def toco(predictions, truths, size):
    """Index C * truth + prediction of a flat matrix, image by image; mean over classes in truth."""
    matrix = np.zeros(size * size, np.int64)
    for p, t in zip(predictions, truths, strict=True):
        one = Counter()
        for a, b in pixels([p], [t]):
            if 0 <= b < size:
                one[size * b + a] += 1
        if one and max(one) >= size * size:
            raise Refused  # the histogram is too long to be reshaped
        for cell, number in one.items():
            matrix[cell] += number
    rows, columns = matrix.reshape(size, size).sum(1), matrix.reshape(size, size).sum(0)
    iou, in_truth = [], []
    for c in range(size):
        union = rows[c] + columns[c] - matrix[size * c + c]
        iou.append(matrix[size * c + c] / union if union else float("nan"))
        if rows[c] > 0:
            in_truth.append(iou[-1])
    return iou, average(in_truth)


def toco_pseudo(predictions, truths, size):
    """Pixels predicted 255 lose their ground truth; then as `toco`."""
    without = [np.where(p == 255, 255, t) for p, t in zip(predictions, truths, strict=True)]
    return toco([np.where(p == 255, 0, p) for p in predictions], without, size)


def irn(predictions, truths, size):
    """255 becomes background; a class that is nowhere leaves the mean. Other ids >= C: refused."""
    pairs = [(0 if p == 255 else p, t) for p, t in pixels(predictions, truths) if t != 255]
    if any(p >= size for p, _ in pairs):
        raise Refused
    iou = ratios(*count(pairs), size)
    return iou, average(defined(iou))


def seam(predictions, truths, size):
    """P, T and TP of each class where truth < 255; TP / (T + P - TP + 1e-10)."""
    positive, true, both = [0] * size, [0] * size, [0] * size
    for p, t in pixels(predictions, truths):
        if t < 255:
            for c in range(size):
                positive[c] += p == c
                true[c] += t == c
                both[c] += p == t == c
    iou = [both[c] / (true[c] + positive[c] - both[c] + 1e-10) for c in range(size)]
    return iou, average(iou)


def mmseg(predictions, truths, size):
    """Histograms over 0..C-1 in float32, summed image by image; percent to two decimals."""
    both, predicted, true = (np.zeros(size, np.float32) for _ in range(3))
    for p, t in zip(predictions, truths, strict=True):
        kept = [(a, b) for a, b in pixels([p], [t]) if b != 255]
        for c in range(size):
            both[c] += np.float32(sum(a == b == c for a, b in kept))
            predicted[c] += np.float32(sum(a == c for a, _ in kept))
            true[c] += np.float32(sum(b == c for _, b in kept))
    with np.errstate(invalid="ignore"):
        iou = both / (predicted + true - both)
    mean = np.nanmean(iou) if np.isfinite(iou).any() else np.float32("nan")
    return np.round(iou * 100, 2) / 100, np.round(mean * 100, 2) / 100


def torchmetrics(predictions, truths, size):
    """Flat index as `toco`; more than C + 1 values in an image raise; all in float32 from there.

    The weight of a class is 1, or 0 where its row and column are empty; 0 / 0 counts 0.
    """
    matrix = np.zeros((size, size), np.int64)
    for p, t in zip(predictions, truths, strict=True):
        if len(set(p.ravel().tolist())) > size + 1:
            raise Refused
        for a, b in pixels([p], [t]):
            if b != 255:
                if size * b + a >= size * size:
                    raise Refused
                matrix[(size * b + a) // size, (size * b + a) % size] += 1
    single = matrix.astype(np.float32)
    iou, kept = [], []
    for c in range(size):
        both, row, column = single[c, c], single[c].sum(), single[:, c].sum()
        union = column + row - both
        iou.append(both / union if union else np.float32("nan"))
        if row + column:
            kept.append(iou[-1])
    return iou, sum(kept) / np.float32(len(kept)) if kept else float("nan")


ROWS = {
    "voc": voc,
    "voc-devkit": voc_devkit,
    "rtc": seam,
    "toco": toco,
    "toco-pseudo": toco_pseudo,
    "irn": irn,
    "pamr": one_stage,
    "mmseg": mmseg,
    "torchmetrics": torchmetrics,
}
"""Name of each convention in wsis -> its description."""


def random_case(rng):
    """Predictions, truths and C: absent classes, 255 predicted, ids out of range, empty images."""
    size = int(rng.integers(1, 7))
    seen = rng.permutation(size)[: rng.integers(1, size + 1)]
    guessed = rng.permutation(size)[: rng.integers(1, size + 1)]
    kind = rng.choice(["classes", "classes", "unsure", "next", "far", "all"])
    extra = {
        "classes": [],
        "unsure": [255],
        "next": [size],
        "far": [int(rng.integers(size, 255))],
        "all": [size, size + 1, 200, 254, 255],
    }[kind]
    predictions, truths = [], []
    for _ in range(rng.integers(1, 4)):
        shape = tuple(rng.integers(1, 8, 2))
        void = [] if rng.random() < 0.3 else [255]
        truth = rng.choice([*seen, *void], shape)
        prediction = rng.choice([*guessed, *extra], shape)
        agree = rng.random(shape) < rng.random()
        agree &= truth != 255
        prediction = np.where(agree, truth, prediction)
        if rng.random() < 0.3:  # strange ids only where there is no ground truth, or never past it
            prediction = np.where((truth != 255) & (prediction >= size), truth, prediction)
        predictions.append(prediction.astype(np.uint8))
        truths.append(truth.astype(np.uint8))
    return predictions, truths, size
