"""A localization data set in wsolevaluation's layout: coloured shapes, one object and box each."""

from __future__ import annotations

import numpy as np
from PIL import Image

CLASSES = ("red disc", "green square", "blue bar")
COLOURS = np.array([[220, 60, 60], [60, 200, 60], [60, 60, 230]])


def draw_object(rng, kind, width, height):
    """An RGB image with one object on noise, and the object's mask."""
    y, x = np.mgrid[:height, :width]
    size = rng.integers(min(width, height) // 3, min(width, height) * 2 // 3)
    cx, cy = rng.integers(size // 2, width - size // 2), rng.integers(size // 2, height - size // 2)
    dx, dy = np.abs(x - cx), np.abs(y - cy)
    mask = [dx**2 + dy**2 <= (size / 2) ** 2, np.maximum(dx, dy) <= size / 2.5, (dx <= size / 2)]
    mask = mask[kind] & (dy <= (size / 6 if kind == 2 else size))
    pixels = rng.integers(90, 160, (height, width, 3))
    pixels[mask] = COLOURS[kind] + rng.integers(-20, 20, (int(mask.sum()), 3))
    return pixels.astype(np.uint8), mask


def write_wsol_tree(root, counts, *, folder="CUB", size=(48, 40), masks=False):
    """`metadata` and `dataset`; boxes, or with `masks` their PNGs in `masks`."""
    metadata, images = root / "metadata" / folder, root / "dataset" / folder
    for number, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng(number)
        lines = {"image_ids": [], "class_labels": [], "image_sizes": [], "localization": []}
        for i in range(count):
            kind = i % len(CLASSES)
            name = f"{split}/{kind:03d}.kind/{i:03d}.png"
            pixels, mask = draw_object(rng, kind, *size)
            path = images / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            rows, columns = np.nonzero(mask)
            box = f"{columns.min()},{rows.min()},{columns.max()},{rows.max()}"
            if masks:
                box = f"{split}-{i}.png,"
                (root / "masks").mkdir(exist_ok=True)
                Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / box[:-1])
            lines["image_ids"].append(name)
            lines["class_labels"].append(f"{name},{kind}")
            lines["image_sizes"].append(f"{name},{size[0]},{size[1]}")
            lines["localization"].append(f"{name},{box}")
        (metadata / split).mkdir(parents=True)
        for stem, text in lines.items():
            (metadata / split / f"{stem}.txt").write_text("".join(f"{x}\n" for x in text))
    (metadata / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root
