"""Confusion counting, from the formula: one pass over the pixels per threshold."""

from __future__ import annotations

import numpy as np


def confusion_matrix(pred, target, num_classes, ignore_index=255):
    counted = target.astype(np.int64) != ignore_index
    cells = target[counted].astype(np.int64) * num_classes + pred[counted].astype(np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def threshold_curve(scores, target, thresholds, num_classes, class_ids=None, ignore_index=255):
    """scores [K, H, W]; one argmax over (threshold, scores..) and one bincount per threshold."""
    ids = np.arange(1, len(scores) + 1) if class_ids is None else np.asarray(class_ids)
    ids = np.concatenate([[0], ids])
    maps = np.concatenate([np.empty_like(scores[:1]), scores])
    matrices = []
    for threshold in thresholds:
        maps[0] = threshold  # first, so that argmax breaks ties towards the background
        matrices.append(confusion_matrix(ids[maps.argmax(0)], target, num_classes, ignore_index))
    return np.stack(matrices)
