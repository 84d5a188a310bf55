"""The permutohedral lattice from its definition, one point at a time, in float64.

Features are lifted with the rows E_j = (1, .., 1, -j, 0, .., 0), scaled so that the blur has unit
variance. Positions are computed in float32, as everybody does: which vertices exist is a matter of
rounding.
"""

from __future__ import annotations

import numpy as np


def embed(features):
    """Vertices ``[N][d + 1]`` (tuples) and weights ``[N, d + 1]`` of points ``[d, N]`` float32."""
    d, count = features.shape
    deviation = np.float32(np.sqrt(2 / 3) * (d + 1))
    scale = [np.float32(1 / np.sqrt((i + 1) * (i + 2)) * deviation) for i in range(d)]
    vertices, weights = [], np.zeros((count, d + 1))
    for n in range(count):
        elevated, total = [np.float32(0)] * (d + 1), np.float32(0)
        for j in range(d, 0, -1):
            scaled = np.float32(features[j - 1, n]) * scale[j - 1]
            elevated[j] = total - np.float32(j) * scaled
            total = total + scaled
        elevated[0] = total
        elevated = np.array(elevated, np.float32)
        rounded = np.rint(elevated * np.float32(1 / np.float32(d + 1)))
        base = rounded.astype(np.int64) * (d + 1)
        residual = elevated - base.astype(np.float32)
        rank = np.zeros(d + 1, np.int64)
        for i in range(d + 1):
            for j in range(i + 1, d + 1):
                rank[i if residual[i] < residual[j] else j] += 1
        rank += int(rounded.sum())
        base[rank < 0] += d + 1
        base[rank > d] -= d + 1
        rank %= d + 1
        ordered = np.zeros(d + 1)
        ordered[rank] = (elevated - base) / (d + 1)
        weights[n, 0] = 1 + ordered[d] - ordered[0]
        for r in range(1, d + 1):
            weights[n, r] = ordered[d - r] - ordered[d - r + 1]
        vertices.append([tuple(base + r - (d + 1) * (rank > d - r)) for r in range(d + 1)])
    return vertices, weights


def filter_reference(features, values, reverse=False):
    """``[C, N]`` filtered with features ``[d, N]``, and the number of vertices."""
    d = len(features)
    vertices, weights = embed(features)
    rows = {v: i for i, v in enumerate({v: None for corners in vertices for v in corners})}
    at = np.array([[rows[v] for v in corners] for corners in vertices]).reshape(-1, d + 1)
    table = np.zeros((len(rows), len(values)))
    np.add.at(table, at, weights[:, :, None] * values.T[:, None].astype(np.float64))
    for axis in reversed(range(d + 1)) if reverse else range(d + 1):
        step = np.ones(d + 1, np.int64)
        step[axis] -= d + 1
        blurred = table.copy()
        for vertex, i in rows.items():
            for neighbour in (tuple(vertex + step), tuple(vertex - step)):
                if neighbour in rows:
                    blurred[i] += table[rows[neighbour]] / 2
        table = blurred
    out = np.einsum("nr,nrc->cn", weights, table[at]) / (1 + 2.0**-d)
    return out, len(rows)


def normalisers_reference(features, normalization):
    """Factors before and after the filter, ``[N]``."""
    ones = filter_reference(features, np.ones((1, features.shape[1])))[0][0]
    unit = np.ones_like(ones)
    if normalization == "none":
        return unit, unit
    if normalization == "symmetric":
        return (1 / np.sqrt(ones + 1e-20),) * 2
    factor = 1 / (ones + 1e-20)
    return (factor, unit) if normalization == "before" else (unit, factor)


def pixel_features(height, width, sxy, image=None, srgb=None):
    """``[2 + c, N]`` float32 of positions (x first) and an image ``[H, W, c]``."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    features = [x / np.float32(sxy), y / np.float32(sxy)]
    if image is not None:
        features += [image[..., c].astype(np.float32) / np.float32(srgb) for c in range(3)]
    return np.stack(features).reshape(len(features), -1)
