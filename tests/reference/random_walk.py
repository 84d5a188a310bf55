"""Random walks straight from their formulas: dense matrices in float64 (method: PSA, IRN, AFA)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def half_disc(radius):
    """(0, 1..r-1), then (dy, dx) of the rows below, less than radius away."""
    rows = [(0, x) for x in range(1, radius)]
    for y in range(1, radius):
        rows += [(y, x) for x in range(1 - radius, radius) if x * x + y * y < radius * radius]
    return rows


def dense_affinity(affinity, offsets, symmetric=True):
    """[K, h, w] -> [N, N] with a diagonal of 1; entries whose partner lies outside are dropped."""
    affinity = np.asarray(affinity, np.float64)
    _, height, width = affinity.shape
    full = np.eye(height * width)
    for plane, (dy, dx) in zip(affinity, offsets, strict=True):
        for y in range(max(0, -dy), min(height, height - dy)):
            for x in range(max(0, -dx), min(width, width - dx)):
                i, j = y * width + x, (y + dy) * width + x + dx
                full[i, j] = plane[y, x]
                if symmetric:
                    full[j, i] = plane[y, x]
    return full


def transition(full, beta):
    """Column-normalised powers."""
    full = full**beta
    return full / full.sum(0, keepdims=True)


def random_walk(maps, affinity, offsets, beta=8, log_steps=8, symmetric=True):
    """[B, C, h, w]: maps T^(2^log_steps) by squaring."""
    maps = np.asarray(maps, np.float64)
    out = np.empty_like(maps)
    for b, x in enumerate(maps):
        matrix = transition(dense_affinity(affinity[b], offsets, symmetric), beta)
        for _ in range(log_steps):
            matrix = matrix @ matrix
        out[b] = (x.reshape(len(x), -1) @ matrix).reshape(x.shape)
    return out


def pair_affinity(features, offsets):
    """[B, K, h, w], torch operations, differentiable."""
    height, width = features.shape[-2:]
    planes = []
    for dy, dx in offsets:
        bottom, left, right = max(0, dy), max(0, -dx), max(0, dx)
        there = F.pad(features, (left, right, 0, bottom))
        there = there[..., dy : dy + height, dx + left : dx + left + width]
        one = torch.ones(height, width, dtype=features.dtype)
        inside = F.pad(one, (left, right, 0, bottom))
        inside = inside[dy : dy + height, dx + left : dx + left + width]
        planes.append(torch.exp(-(features - there).abs().mean(1)) * inside)
    return torch.stack(planes, 1)


def path(dy, dx):
    """Pixels of the path in IRN's order: far end first, then by falling |y| + |x|."""
    inside = [
        (y, x)
        for y in range(dy + 1)
        for x in range(min(dx, 0), max(dx, 0) + 1)
        if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
    ]
    return sorted(inside, key=lambda p: -abs(p[0]) - abs(p[1]))


def path_affinity(edge, offsets):
    """[B, h, w] -> [B, K, h, w] by max_pool2d over the path, as IRN; differentiable."""
    height, width = edge.shape[-2:]
    planes = []
    for dy, dx in offsets:
        low, high = max(0, -dx), min(width, width - dx)
        rows = height - dy
        plane = edge.new_zeros(edge.shape)
        if rows > 0 and high > low:
            values = torch.stack(
                [edge[:, y : y + rows, low + x : high + x] for y, x in path(dy, dx)], 1
            )
            flat = values.flatten(2)[:, None]
            largest = F.max_pool2d(flat, (values.shape[1], 1))[:, 0, 0]
            plane = F.pad(1 - largest.unflatten(1, (rows, high - low)), (low, width - high, 0, dy))
        planes.append(plane)
    return torch.stack(planes, 1)
