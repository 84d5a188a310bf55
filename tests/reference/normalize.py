"""CAM normalisations written map by map from the formulas, in float64."""

from __future__ import annotations

import numpy as np

EPS = 1e-5


def max_norm_reference(x):
    """[..., h, w] -> [ [p]+ - min - e ]+ / (max - min + e) per map."""
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape[:-2]):
        p = np.maximum(x[index], 0)
        out[index] = np.maximum(p - p.min() - EPS, 0) / (p.max() - p.min() + EPS)
    return out


def seed_reference(cams):
    """[B, K, h, w] -> [B, C, h, w], background 1 - max."""
    a = np.zeros_like(cams)
    for index in np.ndindex(cams.shape[:-2]):
        p = np.maximum(cams[index], 0)
        a[index] = np.maximum(p - EPS, 0) / (p.max() + EPS)
    return np.concatenate([1 - a.max(1, keepdims=True), a], axis=1)


def ctr_reference(refined, background):
    """[B, C, h, w] -> [B, C, h, w], channel 0 constant."""
    out = np.full_like(refined, background)
    for b in range(refined.shape[0]):
        for c in range(1, refined.shape[1]):
            r = np.maximum(refined[b, c], 0)
            low, high = r.min(), r.max()
            r = np.where(r < low + EPS, 0, r)
            out[b, c] = (r - low - EPS) / (high - low + EPS)
    return out


def one_hot_max_reference(scores):
    """[B, C, h, w] -> the same with all but background and the largest foreground zero."""
    out = np.zeros_like(scores)
    out[:, 0] = scores[:, 0]
    for b, y, x in np.ndindex(scores.shape[0], *scores.shape[2:]):
        foreground = scores[b, 1:, y, x]
        out[b, 1:, y, x] = np.where(foreground == foreground.max(), foreground, 0)
    return out


def labels_reference(cams, label, low, high, box, ignore_index=255):
    """[B, K, H, W] and [B, K] -> [B, H, W], pixel by pixel."""
    batch, _, height, width = cams.shape
    out = np.full((batch, height, width), ignore_index)
    for b, y, x in np.ndindex(batch, height, width):
        y0, y1, x0, x1 = box[b]
        if y0 <= y < y1 and x0 <= x < x1:
            scores = cams[b, :, y, x] * label[b]
            best = scores.max()
            if best <= low:
                out[b, y, x] = 0
            elif best > high:
                out[b, y, x] = scores.argmax() + 1
    return out
