"""Mean field of a dense CRF from its formula, float64, on the slow lattice."""

from __future__ import annotations

import numpy as np

from tests.reference.permutohedral import filter_reference, normalisers_reference


def softmax(logits):
    """Over the first axis."""
    powers = np.exp(logits - logits.max(axis=0))
    return powers / powers.sum(axis=0)


def mix_matrix(compat, classes):
    """What the filtered labels are multiplied with: Potts, diagonal or symmetrised matrix."""
    compat = np.asarray(compat, np.float64)
    if compat.ndim == 0:
        return np.eye(classes) * compat
    return -np.diag(compat) if compat.ndim == 1 else -(compat + compat.T) / 2


def mean_field_reference(unary, terms, iterations, start=None):
    """Q ``[C, N]`` from energies ``[C, N]`` and terms ``(features, compat, normalization)``."""
    made = [(f, mix_matrix(c, len(unary)), *normalisers_reference(f, n)) for f, c, n in terms]
    q = softmax(-unary.astype(np.float64)) if start is None else start
    for _ in range(iterations):
        logits = -unary.astype(np.float64)
        for features, mix, before, after in made:
            logits = logits + mix @ (filter_reference(features, q * before)[0] * after)
        q = softmax(logits)
    return q
