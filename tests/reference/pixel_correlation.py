"""PCM straight from its formula (method: SEAM): the full affinity matrix, one image at a time."""

import numpy as np


def pixel_correlation(cams, features, eps=1e-5):
    """out_cj = sum_i a_ci P_ij, P_ij = relu(f_i.f_j) / (sum_i relu(f_i.f_j) + eps); float64."""
    cams, features = np.asarray(cams, np.float64), np.asarray(features, np.float64)
    out = np.empty_like(cams)
    for b, (a, f) in enumerate(zip(cams, features, strict=True)):
        f = f.reshape(len(f), -1)
        f = f / (np.sqrt((f**2).sum(0)) + eps)
        weights = np.maximum(f.T @ f, 0)
        weights = weights / (weights.sum(0) + eps)
        out[b] = (a.reshape(len(a), -1) @ weights).reshape(a.shape)
    return out
