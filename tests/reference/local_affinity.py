"""PAMR, PAR and VARM written pixel by pixel from the formulas, in float64."""

from __future__ import annotations

import numpy as np

DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def _at(image, y, x):
    """Value at (y, x), the border repeated outside."""
    height, width = image.shape[-2:]
    return image[..., min(max(y, 0), height - 1), min(max(x, 0), width - 1)]


def _softmax(values):
    e = np.exp(values - values.max())
    return e / e.sum()


def _weights(image, y, x, kind, offsets, dilations):
    height, width = image.shape[-2:]
    centre = image[:, y, x]
    around = np.array([_at(image, y + dy, x + dx) for dy, dx in offsets])
    difference = np.abs(around - centre)
    if kind == "pamr":
        samples = np.concatenate([around, np.repeat(centre[None], len(dilations), 0)])
        return _softmax(-(difference / (1e-8 + 0.1 * samples.std(0, ddof=1))).mean(1))
    sigma = around.std(0, ddof=1)
    if kind == "par":
        distance = np.array([np.hypot(*o) for o in offsets])
        position = -((distance / (distance.std(ddof=1) + 1e-8) / 0.3) ** 2)
        colour = -((difference / (sigma + 1e-8) / 0.3) ** 2).mean(1)
        return _softmax(colour) + 0.01 * _softmax(position)
    variation = []
    for dy, dx in offsets:
        here = _at(image, y + dy, x + dx)
        down = _at(image, y + dy + 1, x + dx) if y + 1 < height else here
        right = _at(image, y + dy, x + dx + 1) if x + 1 < width else here
        variation.append(((here - down) ** 2 + (here - right) ** 2).mean())
    colour = -((4 * difference / (sigma + 1e-8)) ** 2).mean(1)
    return _softmax(colour) - 0.01 * _softmax(np.array(variation))


def refine_reference(image, masks, kind, iterations, dilations):
    """Images [B, 3, H, W] and masks [B, C, H, W] float64 -> refined masks [B, C, H, W]."""
    offsets = [(d * dy, d * dx) for d in dilations for dy, dx in DIRECTIONS]
    height, width = image.shape[-2:]
    out = masks.copy()
    for b in range(len(image)):
        pixels = [(y, x) for y in range(height) for x in range(width)]
        weights = {p: _weights(image[b], *p, kind, offsets, dilations) for p in pixels}
        for _ in range(iterations):
            before = out[b].copy()
            for y, x in pixels:
                around = np.array([_at(before, y + dy, x + dx) for dy, dx in offsets])
                out[b][:, y, x] = weights[y, x] @ around
    return out
