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

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from wsis.data.dataset import Dataset, check_id, read_json, read_list
from wsis.errors import InputError, MissingExtraError
from wsis.types import IGNORE


def open_coco(root: Path, split: str) -> Dataset:
    """Open COCO data.

    Args:
        root: see the module.
        split: `train` or `val`.

    Raises:
        InputError: layout not recognised, malformed annotations, missing image.
    """
    check_id(split, root)
    annotations, images = _find_layout(root, split)
    content = _read_annotations(annotations)
    column = {category["id"]: i for i, category in enumerate(content["categories"])}
    present: dict[int, set[int]] = defaultdict(set)
    for entry in content["annotations"]:
        if entry["category_id"] not in column:
            raise InputError(
                f"{annotations}: annotation {entry.get('id')} has category "
                f"{entry['category_id']}, which the file does not list"
            )
        present[entry["image_id"]].add(column[entry["category_id"]])
    by_name = {Path(image["file_name"]).stem: image for image in content["images"]}
    list_file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = read_list(list_file) if images.name == "JPEGImages" else sorted(by_name)
    absent = next((name for name in names if name not in by_name), None)
    if absent is not None:
        raise InputError(f"{list_file}: image '{absent}' is not in {annotations}")
    listed = [by_name[name] for name in names if present[by_name[name]["id"]]]
    labels = np.zeros((len(listed), len(column)), np.uint8)
    for row, image in enumerate(listed):
        labels[row, list(present[image["id"]])] = 1
    return Coco(
        name="coco",
        root=root,
        split=split,
        classes=[category["name"] for category in content["categories"]],
        ids=[Path(image["file_name"]).stem for image in listed],
        labels=labels,
        image_paths=[images / Path(image["file_name"]).name for image in listed],
        annotations=annotations,
        image_numbers=[image["id"] for image in listed],
    )


_READING = Lock()


class Coco(Dataset):
    """COCO images whose masks are rasterised on demand; needs pycocotools for them.

    Args:
        annotations: the JSON file; read again at the first mask, since training with labels does
            not need the outlines and they are large.
        image_numbers: id in the JSON file of each image.
        fields: as for `Dataset`.
    """

    def __init__(self, *, annotations: Path, image_numbers: Sequence[int], **fields: Any) -> None:
        super().__init__(**fields)
        self._annotations = annotations
        self._numbers = tuple(image_numbers)
        self._outlines: dict[int, list[dict[str, Any]]] | None = None
        self._class_ids: dict[int, int] = {}

    @property
    def has_masks(self) -> bool:
        """Always: the annotations hold the outlines."""
        return True

    @property
    def mask_source(self) -> str:
        """The annotation file and the rule of painting."""
        return f"{self._annotations.name} (small on top, crowd 255)"

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
        with _READING:  # threads ask together, once for all of them
            if self._outlines is None:
                self._outlines, self._class_ids = self._read_outlines()
        height, width = self.image_size(i)
        try:
            return rasterize(self._outlines[self._numbers[i]], self._class_ids, height, width)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self._annotations}: outlines of image '{self.ids[i]}' do not fit its "
                f"{height} x {width} pixels ({type(error).__name__}: {error})"
            ) from None

    def _read_outlines(self) -> tuple[dict[int, list[dict[str, Any]]], dict[int, int]]:
        """Annotations of each image of the split, and the internal id of each category."""
        content = _read_annotations(self._annotations)
        wanted = set(self._numbers)
        outlines: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in content["annotations"]:
            if entry["image_id"] in wanted:
                outlines[entry["image_id"]].append(entry)
        return outlines, {c["id"]: i for i, c in enumerate(content["categories"], 1)}


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


def _find_layout(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and folder of images."""
    if (root / "instances.json").is_file():
        return root / "instances.json", root / "JPEGImages"
    annotations = root / "annotations" / f"instances_{split}2014.json"
    if not annotations.is_file():
        raise InputError(
            f"{root}: expected annotations/instances_{split}2014.json, or instances.json with "
            "JPEGImages and ImageSets"
        )
    for images in (root / f"{split}2014", root / "images" / f"{split}2014"):
        if images.is_dir():
            return annotations, images
    raise InputError(f"{root}: expected images in {split}2014 or images/{split}2014")


def _read_annotations(path: Path) -> dict[str, Any]:
    """The annotation file with categories sorted by id."""
    content = read_json(path)
    try:
        content["categories"] = sorted(content["categories"], key=lambda category: category["id"])
        complete = (
            all({"id", "name"} <= c.keys() for c in content["categories"])
            and all({"id", "file_name"} <= image.keys() for image in content["images"])
            and all({"image_id", "category_id"} <= a.keys() for a in content["annotations"])
        )
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(
            f"{path}: expected COCO instances: categories (id, name), images (id, file_name) and "
            "annotations (image_id, category_id)"
        )
    return content
