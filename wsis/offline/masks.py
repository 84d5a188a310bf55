"""Masks as palette PNGs, the form in which PASCAL VOC and its test server keep them."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from wsis.data.dataset import read_mask as read_values
from wsis.engine.logs import write_error
from wsis.errors import InputError
from wsis.types import IGNORE

NO_CLASS = 254
"""Internal id of a file id that names no class and cannot keep its own number (see `read_mask`)."""


def voc_palette() -> np.ndarray:
    """The PASCAL VOC colour map.

    Bit k of the class id, counted in threes, sets a bit of red, green and blue from the top down
    (VOC development kit, VOClabelcolormap): id 1 is (128, 0, 0), 255 is (224, 224, 192).

    Returns:
        ``[256, 3] uint8`` RGB.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            bit = (ids >> (3 * level + channel)) & 1
            palette[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return palette


def write_mask(path: str | Path, mask: np.ndarray, mask_ids: Sequence[int]) -> None:
    """Write a mask as a palette PNG with the ids of its data set, whole or not at all.

    Args:
        path: the PNG to write; its folder is made where it is missing.
        mask: ``[H, W]`` integer internal ids: 0 background, i + 1 for the class i, 255 undecided.
        mask_ids: file id of each class; ``mask_ids[i]`` is written for the internal id ``i + 1``.

    Raises:
        InputError: the mask is not ``[H, W]`` or holds an id outside 0..K and 255, or the disk
            refuses (what was there is then untouched).
    """
    mask = np.asarray(mask)
    count = len(mask_ids)
    if mask.ndim != 2 or mask.dtype.kind not in "iu":
        raise InputError(f"{path}: mask must be [H, W] integer, got {mask.shape} {mask.dtype}")
    outside = (mask != IGNORE) & ((mask < 0) | (mask > count))
    if outside.any():
        raise InputError(
            f"{path}: mask ids must be 0..{count} or {IGNORE}, got {int(mask[outside][0])}"
        )
    table = np.zeros(256, np.uint8)
    table[1 : count + 1] = mask_ids
    table[IGNORE] = IGNORE
    picture = Image.fromarray(table[mask])
    picture.putpalette(voc_palette().tobytes())
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    write_bytes_atomic(Path(path), encoded.getvalue())


def write_picture(path: str | Path, picture: Image.Image) -> None:
    """Write an RGB picture as PNG or JPEG (by the file's suffix), whole or not at all.

    Raises:
        InputError: the disk refuses.
    """
    path, encoded = Path(path), io.BytesIO()
    picture.save(encoded, format="PNG" if path.suffix == ".png" else "JPEG", quality=90)
    write_bytes_atomic(path, encoded.getvalue())


def read_mask(path: str | Path, mask_ids: Sequence[int]) -> np.ndarray:
    """Read a mask PNG (palette or 8-bit grey) that this or another project wrote.

    Args:
        path: the PNG.
        mask_ids: file id of each class, as for `write_mask`.

    Returns:
        ``[H, W] uint8`` internal ids. A file id that names no class stays outside 0..K, so that
        the scoring convention can judge it: it keeps its number where that is above K, else it
        becomes `NO_CLASS`.

    Raises:
        InputError: the file is missing, damaged, or neither palette nor 8-bit grey.
    """
    table = np.arange(256, dtype=np.uint8)
    table[1 : len(mask_ids) + 1] = NO_CLASS
    table[list(mask_ids)] = np.arange(1, len(mask_ids) + 1)
    table[IGNORE] = IGNORE
    return table[read_values(Path(path))]


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name in the same folder, then rename.

    Raises:
        InputError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error, len(data)) from error
