"""Boxes of a score map by plain labelling, threshold by threshold, and by OpenCV."""

from __future__ import annotations

from collections import deque

import numpy as np

EIGHT = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
FOUR = [(-1, 0), (1, 0), (0, -1), (0, 1)]


def components(mask, neighbours):
    """Sets of pixels, each in the order in which its first pixel is met."""
    seen = np.zeros_like(mask)
    for start in zip(*np.nonzero(mask), strict=True):
        if seen[start]:
            continue
        seen[start] = True
        pixels, queue = [], deque([start])
        while queue:
            y, x = queue.popleft()
            pixels.append((y, x))
            for dy, dx in neighbours:
                at = (y + dy, x + dx)
                if all(0 <= a < n for a, n in zip(at, mask.shape, strict=True)):
                    if mask[at] and not seen[at]:
                        seen[at] = True
                        queue.append(at)
        yield np.array(pixels)


def boxes_all(levels, level):
    """Sorted boxes around components and holes; a hole's outline runs over the pixels around it."""
    height, width = levels.shape
    lit = levels > level
    found = []
    for pixels in components(lit, EIGHT):
        (y0, x0), (y1, x1) = pixels.min(axis=0), pixels.max(axis=0)
        found.append([x0, y0, x1, y1])
    for pixels in components(~lit, FOUR):
        (y0, x0), (y1, x1) = pixels.min(axis=0), pixels.max(axis=0)
        if min(y0, x0) > 0 and y1 < height - 1 and x1 < width - 1:
            found.append([x0 - 1, y0 - 1, x1 + 1, y1 + 1])
    return sorted(
        [x0, y0, min(x1 + 1, width - 1), min(y1 + 1, height - 1)] for x0, y0, x1, y1 in found
    )


def opencv_boxes(levels, level, largest=False):
    """As the field's evaluator calls OpenCV."""
    import cv2

    height, width = levels.shape
    _, binary = cv2.threshold(levels, level, 255, cv2.THRESH_BINARY)
    contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]
    if len(contours) == 0:
        return [[0, 0, 0, 0]]
    if largest:
        contours = [max(contours, key=cv2.contourArea)]
    found = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        found.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
    return sorted(found)


def random_map(rng, height, width):
    """Levels of one of several kinds: noise, steps, smooth hills, rings; sometimes few levels."""
    kind = rng.integers(5)
    if kind == 0:
        values = rng.random((height, width))
    elif kind == 1:
        values = (rng.random((height, width)) < rng.random()) * 1.0
    else:
        y, x = np.mgrid[:height, :width]
        values = np.zeros((height, width))
        for _ in range(rng.integers(1, 6)):
            cy, cx, size = rng.random() * height, rng.random() * width, 1 + rng.random() * 9
            distance = np.hypot(y - cy, x - cx) / size
            values += np.exp(-((distance - (kind == 3)) ** 2))
        if kind == 4:
            values += 0.1 * rng.random((height, width))
        values /= values.max()
    steps = rng.choice([2, 3, 8, 255])
    return (np.floor(values * steps) / steps * 255).clip(0, 255).astype(np.uint8)
