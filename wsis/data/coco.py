"""MS COCO 2014, or a small set in the same annotation format; which one a folder has is detected.

COCO: `annotations/instances_<split>2014.json` with images in `<split>2014` or `images/<split>2014`.
Small: `instances.json`, `JPEGImages`, `ImageSets/Segmentation/<split>.txt`.

The 80 classes are the categories in the order of their ids (1..90 with gaps), and masks number
them 1..80. An image has the label of every category with an annotation, crowds included; images
without any are dropped, which leaves COCO's usual 82,081 for train and 40,137 for val.

Masks are rasterised from the annotations: instances by ascending area, the first that takes a
pixel keeps it, so small things lie on top; pixels of crowds that no instance takes are 255.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from wsis.data.coco_index import CocoIndex, read_index
from wsis.data.dataset import Dataset, check_id, read_list
from wsis.errors import InputError, MissingExtraError
from wsis.types import IGNORE

MASK_MAKER = "wsis (small on top, crowds 255)"
"""Name of the rule by which COCO masks are painted, for reports; see `rasterize`."""


def open_coco(root: Path, split: str) -> Dataset:
    """Open COCO data.

    Args:
        root: see the module.
        split: `train`, `val`, or the name of a list in `ImageSets/Segmentation` of images of one
            of them; a list whose name begins with `val` is of val, as `val_part` is.

    Raises:
        InputError: layout not recognised, malformed annotations, missing image.
    """
    check_id(split, root)
    annotations, images = _find_layout(root, split)
    index = read_index(annotations)
    stems = [Path(name).stem for name in index.file_names.tolist()]
    row_of = {stem: row for row, stem in enumerate(stems)}
    list_file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    listed = images.name == "JPEGImages" or split not in ("train", "val")
    names = read_list(list_file) if listed else sorted(row_of)
    absent = next((name for name in names if name not in row_of), None)
    if absent is not None:
        raise InputError(f"{list_file}: image '{absent}' is not in {annotations}")
    has_label = index.labels.max(axis=1, initial=0).tolist()
    rows = [row for name in names if has_label[row := row_of[name]]]
    return Coco(
        name="coco",
        root=root,
        split=split,
        classes=index.class_names.tolist(),
        ids=[stems[row] for row in rows],
        labels=index.labels[rows],
        image_paths=[images / str(index.file_names[row]) for row in rows],
        annotations=annotations,
        index=index,
        rows=rows,
    )


class Coco(Dataset):
    """COCO images whose masks are rasterised on demand; needs pycocotools for them.

    Args:
        annotations: the JSON file; outlines are read from it image by image.
        index: of that file.
        rows: position of each image in the index.
        fields: as for `Dataset`.
    """

    def __init__(
        self, *, annotations: Path, index: CocoIndex, rows: Sequence[int], **fields: Any
    ) -> None:
        super().__init__(**fields)
        self._annotations = annotations
        self._index = index
        self._rows = tuple(rows)
        self._class_ids = {c: i for i, c in enumerate(index.category_ids.tolist(), 1)}

    @property
    def has_masks(self) -> bool:
        """Always: the annotations hold the outlines."""
        return True

    @property
    def mask_source(self) -> str:
        """The annotation file, the rule of painting, and the hashes of both."""
        try:
            maker = maker_hash()
        except MissingExtraError:
            maker = "unknown without pycocotools"
        return (
            f"{self._annotations.name} (sha256 {self._index.digest[:12]}) painted by {MASK_MAKER} "
            f"(hash {maker})"
        )

    def has_mask(self, i: int) -> bool:
        """Every image has one."""
        return self.has_masks

    def mask_path(self, i: int) -> Path | None:
        """None: masks come from one file for all."""
        return None

    def mask(self, i: int) -> np.ndarray:
        """Ground truth of image i: `[H, W] uint8` ids 0..80, 255 for crowds.

        Raises:
            InputError: malformed outline.
            MissingExtraError: pycocotools is not installed.
        """
        height, width = self.image_size(i)
        entries = self._index.annotations(self._annotations, self._rows[i])
        try:
            return rasterize(entries, self._class_ids, height, width)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self._annotations}: outlines of image '{self.ids[i]}' do not fit its "
                f"{height} x {width} pixels ({type(error).__name__}: {error})"
            ) from None


def rasterize(
    annotations: Sequence[dict[str, Any]], class_ids: dict[int, int], height: int, width: int
) -> np.ndarray:
    """Paint COCO annotations of one image.

    Args:
        annotations: entries with `segmentation` (polygons, or RLE as a dict), `area`, `iscrowd`,
            `category_id`.
        class_ids: internal id 1..K of each category id.
        height: of the image.
        width: of the image.

    Returns:
        `[H, W] uint8`: the class of the smallest instance at a pixel (first listed of equal area),
        255 where only crowds are, else 0. Same rule as repository alicranck/coco2voc, but for
        crowds, which that paints as their class.

    Raises:
        MissingExtraError: pycocotools is not installed.
        ValueError: an outline whose size is not the image's.
    """
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise MissingExtraError("pycocotools", "data", "rasterising COCO masks") from error
    out = np.zeros((height, width), np.uint8)
    order = sorted(annotations, key=lambda entry: (bool(entry.get("iscrowd")), entry["area"]))
    for entry in order:
        outline = entry["segmentation"]
        if isinstance(outline, list):
            pieces = coco_mask.frPyObjects(outline, height, width)
            encoded = coco_mask.merge(pieces)
        elif isinstance(outline["counts"], list):
            encoded = coco_mask.frPyObjects(outline, *outline["size"])
        else:
            encoded = outline
        inside = coco_mask.decode(encoded).astype(bool)
        if inside.shape != out.shape:
            raise ValueError(f"an outline is {inside.shape[0]} x {inside.shape[1]}")
        value = IGNORE if entry.get("iscrowd") else class_ids[entry["category_id"]]
        out[inside & (out == 0)] = value
    return out


@cache
def maker_hash() -> str:
    """12 hex digits that name what `rasterize` does, pycocotools' part included.

    The SHA-256 of the mask of a fixed drawing, in which every rule decides some pixels: overlap,
    equal areas, pieces of one instance, crowds on, beside and below instances, both kinds of RLE.
    It changes when, and only when, such masks change.

    Raises:
        MissingExtraError: pycocotools is not installed.
    """
    mask = rasterize(_DRAWING, {1: 1, 3: 2, 7: 3, 90: 4}, 24, 32)
    return hashlib.sha256(mask.tobytes()).hexdigest()[:12]


def _drawn(category: int, area: float, outline: Any, crowd: int = 0) -> dict[str, Any]:
    return {"category_id": category, "area": area, "segmentation": outline, "iscrowd": crowd}


_PACKED = r">8`0000000000000000o47jJ000000000\1IkN00000000000g0"
_DRAWING = (
    _drawn(1, 200, [[2.5, 2.0, 20.0, 3.5, 18.5, 17.0, 3.0, 15.5]]),
    _drawn(3, 60, [[10.0, 5.0, 19.0, 5.0, 14.5, 14.0], [22.0, 2.0, 27.5, 2.0, 27.5, 6.5, 22, 6.5]]),
    _drawn(7, 60, [[12.0, 8.0, 25.0, 8.0, 25.0, 12.0, 12.0, 12.0]]),
    _drawn(1, 5, {"size": [24, 32], "counts": [300, 60, 408]}, 1),
    _drawn(90, 300, {"size": [24, 32], "counts": [480, 100, 20, 100, 68]}),
    _drawn(7, 900, {"size": [24, 32], "counts": _PACKED}, 1),
)


def _find_layout(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and folder of images."""
    if (root / "instances.json").is_file():
        return root / "instances.json", root / "JPEGImages"
    part = next((part for part in ("train", "val") if split.startswith(part)), split)
    annotations = root / "annotations" / f"instances_{part}2014.json"
    if not annotations.is_file():
        raise InputError(
            f"{root}: expected annotations/instances_{part}2014.json, or instances.json with "
            "JPEGImages and ImageSets"
        )
    for images in (root / f"{part}2014", root / "images" / f"{part}2014"):
        if images.is_dir():
            return annotations, images
    raise InputError(f"{root}: expected images in {part}2014 or images/{part}2014")
