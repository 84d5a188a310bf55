"""PASCAL VOC, in two layouts; which one a folder has is detected.

Devkit: `JPEGImages`, `Annotations`, `SegmentationClass`, `ImageSets/Segmentation/<split>.txt`, in
the folder itself or in `VOC2012` or `VOCdevkit/VOC2012` below it. Masks of SBD images come from
`SegmentationClassAug`; where both folders have a mask VOC's own is taken, since the SBD-derived
PNGs differ slightly from it.

Flat: the same folders with `labels.json` in place of `Annotations`:
`{"classes": {id: name}, "labels": {image id: [class ids]}}`. The classes are those listed, in the
order of their ids, and masks hold these ids.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from wsis.data.dataset import Dataset, check_id, read_json, read_list
from wsis.errors import InputError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""The 20 classes in the order of their ids 1..20 (VOC devkit)."""


def open_voc(
    root: Path,
    split: str,
    *,
    labels: str | Path | None = None,
    label_ids: str | Path | None = None,
    difficult: bool = True,
) -> Dataset:
    """Open VOC data.

    Args:
        root: see the module.
        split: stem of the list in `ImageSets/Segmentation`; `trainaug` also finds
            `train_aug.txt`. A line is an image id or `/JPEGImages/ID.jpg ...`. Split `test` of the
            devkit has no labels: they are all zero.
        labels: devkit only; image-level labels from a file instead of `Annotations`: `.json`
            `{id: [20 numbers 0 or 1]}`, `.npz` with `ids [N]` and `labels [N, 20]`, or
            `.npy [N, 20]` with rows in the order of `label_ids`.
        label_ids: list file that names the rows of a `.npy`; by default the split's own list.
        difficult: devkit annotations only; count objects marked difficult, as the field does.

    Raises:
        InputError: layout not recognised, missing file, label outside the classes, pickled labels.
    """
    base = _find_base(root)
    ids = [_parse_line(line, base) for line in read_list(_find_list(base, split))]
    mask_ids: Sequence[int] = range(1, len(VOC_CLASSES) + 1)
    classes: Sequence[str] = VOC_CLASSES
    if (base / "labels.json").is_file():
        if labels is not None or label_ids is not None or not difficult:
            raise InputError(
                f"{base}: labels come from labels.json there; drop the options labels, label_ids "
                "and difficult"
            )
        classes, mask_ids, table = _labels_from_json(base / "labels.json", ids)
    elif labels is not None:
        table = _labels_from_file(Path(labels), Path(label_ids) if label_ids else None, ids)
    elif split == "test":
        table = np.zeros((len(ids), len(VOC_CLASSES)), np.uint8)
    else:
        table = _labels_from_annotations(base / "Annotations", ids, difficult=difficult)
    return Dataset(
        name="voc",
        root=root,
        split=split,
        classes=classes,
        mask_ids=mask_ids,
        ids=ids,
        labels=table,
        image_paths=[base / "JPEGImages" / f"{name}.jpg" for name in ids],
        mask_folders=[base / "SegmentationClass", base / "SegmentationClassAug"],
    )


def _find_base(root: Path) -> Path:
    for base in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (base / "JPEGImages").is_dir():
            return base
    raise InputError(
        f"{root}: expected VOC data with a folder JPEGImages, in it or in VOC2012 or "
        "VOCdevkit/VOC2012 below it"
    )


def _find_list(base: Path, split: str) -> Path:
    folder = base / "ImageSets" / "Segmentation"
    check_id(split, folder)
    spellings = {"trainaug": "train_aug", "train_aug": "trainaug"}
    for stem in (split, spellings.get(split, split)):
        if (folder / f"{stem}.txt").is_file():
            return folder / f"{stem}.txt"
    found = ", ".join(sorted(path.stem for path in folder.glob("*.txt"))) or "no list"
    raise InputError(f"{folder}: no list {split}.txt; found {found}")


def _parse_line(line: str, base: Path) -> str:
    entry = line.split()[0]
    if "/" not in entry:
        return check_id(entry, base / "ImageSets")
    folder, _, name = entry.lstrip("/").partition("/")
    if folder != "JPEGImages" or not name.endswith(".jpg"):
        raise InputError(
            f"{base / 'ImageSets'}: expected an image id or /JPEGImages/ID.jpg, got {line!r}"
        )
    return check_id(name.removesuffix(".jpg"), base / "ImageSets")


def _labels_from_json(
    path: Path, ids: Sequence[str]
) -> tuple[tuple[str, ...], tuple[int, ...], np.ndarray]:
    """Class names, their file ids, and `[N, K] uint8` labels of the images in `ids`."""
    content = read_json(path)
    try:
        names = {int(key): str(name) for key, name in content["classes"].items()}
        listed = {str(key): [int(c) for c in value] for key, value in content["labels"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f'{path}: expected {{"classes": {{id: name}}, "labels": {{image id: [class ids]}}}}'
        ) from None
    mask_ids = tuple(sorted(names))
    if not mask_ids or mask_ids[0] < 1 or mask_ids[-1] > 254:
        raise InputError(f"{path}: expected class ids in 1..254, got {list(mask_ids)}")
    column = {class_id: i for i, class_id in enumerate(mask_ids)}
    table = np.zeros((len(ids), len(mask_ids)), np.uint8)
    for row, name in enumerate(ids):
        if name not in listed:
            raise InputError(f"{path}: no labels for image '{name}', which the split lists")
        for class_id in listed[name]:
            if class_id not in column:
                raise InputError(
                    f"{path}: image '{name}' has label {class_id}, expected one of {list(mask_ids)}"
                )
            table[row, column[class_id]] = 1
    return tuple(names[class_id] for class_id in mask_ids), mask_ids, table


def _labels_from_annotations(folder: Path, ids: Sequence[str], *, difficult: bool) -> np.ndarray:
    """`[N, 20] uint8` from VOC's XML files."""
    column = {name: i for i, name in enumerate(VOC_CLASSES)}
    table = np.zeros((len(ids), len(VOC_CLASSES)), np.uint8)
    for row, image in enumerate(ids):
        path = folder / f"{image}.xml"
        try:
            objects = ElementTree.parse(path).getroot().findall("object")
        except OSError:
            raise InputError(
                f"{path}: no such file; expected VOC annotations, or give labels=FILE"
            ) from None
        except ElementTree.ParseError as error:
            raise InputError(f"{path}: expected XML, got {error}") from None
        for thing in objects:
            name = (thing.findtext("name") or "").strip()
            if name not in column:
                raise InputError(f"{path}: object '{name}' is none of VOC's 20 classes")
            if difficult or (thing.findtext("difficult") or "0").strip() != "1":
                table[row, column[name]] = 1
    return table


def _labels_from_file(path: Path, label_ids: Path | None, ids: Sequence[str]) -> np.ndarray:
    """`[N, 20] uint8` in the order of `ids` from a `.json`, `.npz` or `.npy` file."""
    if path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected {{image id: [20 numbers]}}")
        names = list(content)
        rows: Any = list(content.values())
    elif path.suffix == ".npz":
        arrays = _load_arrays(path)
        if not isinstance(arrays, dict) or not {"ids", "labels"} <= arrays.keys():
            raise InputError(f"{path}: expected arrays 'ids' [N] and 'labels' [N, 20]")
        names, rows = [str(name) for name in arrays["ids"]], arrays["labels"]
    else:
        rows = _load_arrays(path)
        names = [line.split()[0] for line in read_list(label_ids)] if label_ids else list(ids)
    try:
        table = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.zeros(0)
    if table.shape != (len(names), len(VOC_CLASSES)):
        raise InputError(
            f"{path}: expected labels [{len(names)}, {len(VOC_CLASSES)}], got {list(table.shape)}"
        )
    if not np.isin(table, (0, 1)).all():
        raise InputError(f"{path}: expected labels 0 or 1, got other values")
    position = {name: i for i, name in enumerate(names)}
    absent = next((name for name in ids if name not in position), None)
    if absent is not None:
        raise InputError(f"{path}: no labels for image '{absent}', which the split lists")
    return table[[position[name] for name in ids]].astype(np.uint8)


def _load_arrays(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise InputError(
            f"{path}: no plain array (the cls_labels.npy of this field is a pickled dict, which "
            "may run code when read and is refused); where you trust it, save it once as JSON "
            "{id: [20 numbers 0 or 1]}, or as .npz with ids and labels, and give that file"
        ) from None
