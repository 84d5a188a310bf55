"""Affinity labels and losses, pair by pair and dense, in float64. Written from the formulas.

Pairs live in full ``N x N`` matrices here: that is what the operators avoid.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch


def half_disc(radius):
    """(dy, dx) of the partners: right of a pixel in its row, then the rows below."""
    inside = [
        (y, x)
        for y in range(radius)
        for x in range(-radius, radius + 1)
        if y * y + x * x < radius * radius
    ]
    return [(y, x) for y, x in inside if y > 0 or x > 0]


def pair_labels(mask, offsets, sources="interior", ignore=255):
    """``[K, h, w]``: 0 different, 1 one foreground class, 2 both background, 255 no such pair."""
    height, width = mask.shape
    out = np.full((len(offsets), height, width), 255, np.uint8)

    def inside(y, x):
        return 0 <= y < height and 0 <= x < width

    for y, x in itertools.product(range(height), range(width)):
        if sources == "interior" and not all(inside(y + dy, x + dx) for dy, dx in offsets):
            continue
        for k, (dy, dx) in enumerate(offsets):
            if not inside(y + dy, x + dx):
                continue
            a, b = int(mask[y, x]), int(mask[y + dy, x + dx])
            if ignore not in (a, b):
                out[k, y, x] = 0 if a != b else (2 if a == 0 else 1)
    return out


def affinity_loss(affinity, labels, eps=1e-5):
    """Background, foreground, negative and total of ``[B, K, h, w]``; torch, differentiable."""
    means = []
    for kind in (2, 1, 0):
        chosen = labels == kind
        a = affinity[chosen]
        value = -torch.log(1 + eps - a if kind == 0 else a + eps)
        means.append(value.sum() / (int(chosen.sum()) + eps))
    return (*means, means[0] / 4 + means[1] / 4 + means[2] / 2)


def displacement_loss(field, labels, offsets, eps=1e-5):
    """Foreground and background; torch, differentiable."""
    sums, counts = [field.sum() * 0, field.sum() * 0], [0, 0]
    for b, k, y, x in torch.nonzero((labels == 1) | (labels == 2)).tolist():
        dy, dx = offsets[k]
        difference = field[b, :, y, x] - field[b, :, y + dy, x + dx]
        group = 0 if labels[b, k, y, x] == 1 else 1
        target = torch.tensor([dy, dx], dtype=field.dtype) if group == 0 else 0
        sums[group] = sums[group] + (difference - target).abs().sum()
        counts[group] += 1
    return tuple(s / (2 * n + eps) for s, n in zip(sums, counts, strict=True))


def token_pairs(labels, radius=None, ignore=255, diagonal=True):
    """``[B, N, N]``: 1 one class, 0 two classes, 255 no part."""
    batch, height, width = labels.shape
    flat = labels.reshape(batch, -1).numpy()
    places = list(itertools.product(range(height), range(width)))
    out = np.full((batch, len(places), len(places)), 255)
    for b, i, j in np.ndindex(*out.shape):
        far = radius is not None and max(abs(np.subtract(places[i], places[j]))) > radius
        if ignore in (flat[b, i], flat[b, j]) or far or (i == j and not diagonal):
            continue
        out[b, i, j] = int(flat[b, i] == flat[b, j])
    return torch.from_numpy(out)


def pair_mean(values, pairs, positive):
    """``½ f(positives) / (n + 1) + ½ sum negatives / (n + 1)``; see its two callers."""
    same, different = pairs == 1, pairs == 0
    return (
        positive(values[same].sum(), same.sum()) + values[different].sum() / (different.sum() + 1)
    ) / 2


def afa_affinity_loss(attention, pairs):
    """From a matrix of pairs; torch, differentiable."""
    return pair_mean(attention, pairs, lambda total, count: (count - total) / (count + 1))


def token_contrast_loss(features, pairs):
    """From a matrix of pairs; torch, differentiable."""
    flat = features.flatten(2)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-8)
    cosine = torch.einsum("bdi,bdj->bij", unit, unit).abs()
    return pair_mean(cosine, pairs, lambda total, count: 1 - total / (count + 1))


def stencil_matrix(affinity, offsets):
    """``[N, N]`` symmetric, diagonal 1, of ``[K, h, w]``; pairs that leave the grid are dropped."""
    _, height, width = affinity.shape
    matrix = np.eye(height * width)
    for k, (dy, dx) in enumerate(offsets):
        for y, x in itertools.product(range(height), range(width)):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                i, j = y * width + x, (y + dy) * width + x + dx
                matrix[i, j] = matrix[j, i] = affinity[k, y, x]
    return matrix


def walk(maps, matrix, beta, times):
    """``maps [C, h, w]`` times the ``2^times``-th power of the transition, by squaring."""
    transition = matrix**beta
    transition = transition / transition.sum(0)
    for _ in range(times):
        transition = transition @ transition
    return (maps.reshape(len(maps), -1) @ transition).reshape(maps.shape)


def path(dy, dx):
    """The pixels closer than 1 to the line from (0, 0) to (dy, dx), inside their box."""
    box = itertools.product(range(min(0, dy), max(0, dy) + 1), range(min(0, dx), max(0, dx) + 1))
    length = np.hypot(dy, dx)
    return [(y, x) for y, x in box if abs(dy * x - dx * y) / length < 1 - 1e-9]


def path_affinity(edge, offsets):
    """``[K, h, w]`` of ``edge [h, w]``: 1 - the largest value on the path; 0 outside."""
    height, width = edge.shape
    out = np.zeros((len(offsets), height, width))
    for k, (dy, dx) in enumerate(offsets):
        for y, x in itertools.product(range(height), range(width)):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out[k, y, x] = 1 - max(edge[y + py, x + px] for py, px in path(dy, dx))
    return out
