"""A contact sheet: what the images and masks of a data set look like."""

from __future__ import annotations

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
    rows = 2 if dataset.has_masks else 1
    width, height = min(columns, len(indices)), rows * -(-len(indices) // columns)
    sheet = Image.new("RGB", (tile * width, tile * height), "white")
    colours = class_colours(dataset.mask_ids)
    for place, index in enumerate(indices):
        image = dataset.image(index)
        pictures = [np.array(image)]
        if dataset.has_mask(index):
            pictures.append(overlay_mask(image, dataset.mask(index), colours))
        for row, picture in enumerate(pictures):
            fitted = ImageOps.contain(Image.fromarray(picture), (tile - 4, tile - 4))
            x = (place % columns) * tile + (tile - fitted.width) // 2
            y = ((place // columns) * rows + row) * tile + (tile - fitted.height) // 2
            sheet.paste(fitted, (x, y))
    write_picture(path, sheet)
