"""The walk in plain torch, as the benchmarks' baselines: shifted views, and squaring."""

from __future__ import annotations

import torch


def directions(affinity, offsets):
    """Both directions of a symmetric affinity [K, h, w]: (dy, dx), and the pair's affinity at the
    pixel that receives."""
    height, width = affinity.shape[1:]
    found = []
    for plane, (dy, dx) in zip(affinity, offsets, strict=True):
        low, high = max(0, -dx), min(width, width - dx)
        own, other = torch.zeros_like(plane), torch.zeros_like(plane)
        if height > dy and high > low:
            own[: height - dy, low:high] = plane[: height - dy, low:high]
            other[dy:, low + dx : high + dx] = plane[: height - dy, low:high]
        found += [((dy, dx), own), ((-dy, -dx), other)]
    return found


def stencil(maps, affinity, offsets, beta, log_steps):
    """[C, h, w], one image: shifted views of padded maps, no array of all neighbours."""
    _, height, width = maps.shape
    taps = directions(affinity**beta, offsets)
    inverse = 1 / (1 + sum(weight for _, weight in taps))
    taps = [(offset, weight * inverse) for offset, weight in taps]
    reach = max((max(abs(dy), abs(dx)) for (dy, dx), _ in taps), default=0)
    inner = (slice(None), slice(reach, reach + height), slice(reach, reach + width))
    now = torch.nn.functional.pad(maps, [reach] * 4)
    after = torch.zeros_like(now)
    for _ in range(1 << log_steps):
        out = after[inner]
        torch.mul(now[inner], inverse, out=out)
        for (dy, dx), weight in taps:
            top, left = reach + dy, reach + dx
            out.addcmul_(now[:, top : top + height, left : left + width], weight)
        now, after = after, now
    return now[inner].contiguous()


def dense(maps, affinity, offsets, beta, log_steps):
    """[C, h, w], one image: the matrix, squared (PSA, IRN)."""
    _, height, width = maps.shape
    matrix = torch.eye(height * width, dtype=maps.dtype)
    places = torch.arange(height * width).reshape(height, width)
    for plane, (dy, dx) in zip(affinity, offsets, strict=True):
        low, high = max(0, -dx), min(width, width - dx)
        if height > dy and high > low:
            here = places[: height - dy, low:high]
            there = places[dy:, low + dx : high + dx]
            matrix[here, there] = plane[: height - dy, low:high]
            matrix[there, here] = plane[: height - dy, low:high]
    matrix = matrix**beta
    matrix = matrix / matrix.sum(0, keepdim=True)
    for _ in range(log_steps):
        matrix = torch.matmul(matrix, matrix)
    return torch.matmul(maps.flatten(1), matrix).reshape(maps.shape)
