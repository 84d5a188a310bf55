"""A contact sheet: what the images and masks of a data set look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from wsis.data.dataset import Dataset
from wsis.errors import InputError
from wsis.evaluate.report import class_colours, overlay_mask, sample_indices
from wsis.offline.masks import write_picture


def write_contact_sheet(
    dataset: Dataset, path: Path, *, count: int = 12, columns: int = 6, tile: int = 192
) -> None:
    """Draw evenly spaced images, each over its mask where there is one, into one PNG.

    Args:
        dataset: images and, if any, masks.
        path: PNG file to write.
        count: images, spread evenly over the list.
        columns: images in a row.
        tile: side of the square that each image is fitted into, pixels.

    Raises:
        InputError: count, columns or tile below 1.
    """
    if min(count, columns, tile) < 1:
        raise InputError(f"count, columns and tile must be >= 1, got {count}, {columns}, {tile}")
    indices = sample_indices(len(dataset), count)
    colours = class_colours(dataset.mask_ids if dataset.has_masks else ())
    lines: list[list[np.ndarray]] = []
    for start in range(0, len(indices), columns):
        images = [(i, dataset.image(i)) for i in indices[start : start + columns]]
        lines.append([np.array(image) for _, image in images])
        if dataset.has_masks:
            lines.append(
                [
                    overlay_mask(image, dataset.mask(i), colours)
                    if dataset.has_mask(i)
                    else np.full((1, 1, 3), 255, np.uint8)
                    for i, image in images
                ]
            )
    write_grid(path, lines, tile=tile)


def write_grid(path: Path, lines: Sequence[Sequence[np.ndarray]], *, tile: int = 192) -> None:
    """Lines of RGB pictures, each fitted into a square, as one PNG.

    Args:
        path: PNG file to write.
        lines: ``[H, W, 3] uint8`` pictures, from the top.
        tile: side of the square of a picture, pixels.
    """
    sheet = Image.new("RGB", (tile * max(map(len, lines)), tile * len(lines)), "white")
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            fitted = ImageOps.contain(Image.fromarray(picture), (tile - 4, tile - 4))
            x = column * tile + (tile - fitted.width) // 2
            y = row * tile + (tile - fitted.height) // 2
            sheet.paste(fitted, (x, y))
    write_picture(path, sheet)
