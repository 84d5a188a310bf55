"""Where objects are, for localization metrics: boxes or masks of images with one class each.

Two sources: the metadata folders of wsolevaluation (Choe et al. 2020, arXiv 2007.04178), which the
field uses for CUB-200-2011, ILSVRC and OpenImages; and PASCAL VOC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from wsis.data.dataset import Dataset, check_id, read_json, read_list
from wsis.data.wsol import OneLabelImages
from wsis.errors import InputError


@dataclass(frozen=True)
class Localization:
    """Ground truth of a list of images.

    Attributes:
        source: where it comes from, for reports.
        ids: the images, as the list names them: may have folders and a suffix.
        sizes: ``[N, 2]`` int64, width and height of each.
        boxes: ``[M, 4]`` float64, ``x0 y0 x1 y1`` in pixels of the image.
        owner: ``[M]`` int64, the image of each box.
        masks: per image its instance masks and, last, what to leave out (None: nothing); empty
            where the truth is boxes.
    """

    source: str
    ids: tuple[str, ...]
    sizes: NDArray[np.int64]
    boxes: NDArray[np.float64]
    owner: NDArray[np.int64]
    masks: tuple[tuple[tuple[Path, ...], Path | None], ...] = ()


def read_metadata(folder: str | Path, mask_root: str | Path | None = None) -> Localization:
    """The folder of a split: ``image_ids.txt``, ``image_sizes.txt``, ``localization.txt``.

    Lines are ``path``, ``path,width,height`` and ``path,x0,y0,x1,y1``, repeated for more boxes; or,
    for masks, ``path,mask.png,ignore.png``, the last only in an image's first line.

    Args:
        folder: such as ``metadata/CUB/test``.
        mask_root: folder that the masks' paths are relative to; needed where there are masks.

    Raises:
        InputError: a file is missing, or a line is not as above; names file and line.
    """
    folder = Path(folder)
    ids = tuple(_check_path(line, folder) for line in read_list(folder / "image_ids.txt"))
    place = {name: i for i, name in enumerate(ids)}
    if len(place) != len(ids):
        raise InputError(f"{folder / 'image_ids.txt'}: an image is listed twice")
    sizes = np.zeros((len(ids), 2), np.int64)
    for image, (width, height) in _rows(folder / "image_sizes.txt", place, 2):
        sizes[image] = _numbers((width, height), folder / "image_sizes.txt")
    if not (sizes > 0).all():
        name = ids[int(np.argmin(sizes.min(axis=1)))]
        raise InputError(f"{folder / 'image_sizes.txt'}: no size for image '{name}'")
    path = folder / "localization.txt"
    first = read_list(path)[0].split(",")
    if len(first) < 4:
        return Localization(
            str(folder), ids, sizes, *_no_boxes(), _read_masks(path, place, mask_root)
        )
    boxes, owner = [], []
    for image, corners in _rows(path, place, 4):
        boxes.append(_numbers(corners, path))
        owner.append(image)
    return Localization(str(folder), ids, sizes, np.array(boxes), np.array(owner, np.int64))


def read_truth(
    dataset: Dataset, mask_root: str | Path | None = None
) -> tuple[Localization, list[int], list[int]]:
    """Where the objects of a split are: from its metadata, or as :func:`read_voc_boxes`.

    Args:
        dataset: the split.
        mask_root: of the metadata's masks.

    Returns:
        The truth, and for each of its images the position in the data set and the class.

    Raises:
        InputError: the split's images have no boxes or masks, or not as there.
    """
    class_ids = dataset.class_ids
    if isinstance(dataset, OneLabelImages) and class_ids is not None:
        truth = read_metadata(dataset.metadata, mask_root)
        if list(truth.ids) != list(dataset.paths):
            raise InputError(
                f"{dataset.metadata}: localization is scored on the whole list image_ids.txt, got "
                f"split '{dataset.split}'"
            )
        return truth, list(range(len(dataset))), class_ids.tolist()
    truth, classes = read_voc_boxes(dataset)
    place = {name: i for i, name in enumerate(dataset.ids)}
    return truth, [place[name] for name in truth.ids], classes.tolist()


def read_voc_boxes(dataset: Dataset) -> tuple[Localization, NDArray[np.int64]]:
    """Boxes of the images of a VOC split whose boxes are all of one class.

    Args:
        dataset: opened with `wsis.data.voc`. Boxes come from ``Annotations`` (VOC counts pixels
            from 1), or in the flat layout from ``boxes.json``:
            ``{"boxes": {image id: [[x0, y0, x1, y1, class id], ..]}}``. The list is
            ``ImageSets/WSOL/<split>.txt`` where there is one, else the split's own.

    Returns:
        The truth, and the position in ``dataset.classes`` of each image's class.

    Raises:
        InputError: no boxes there, or not as above.
    """
    base = _voc_base(dataset)
    listed = base / "ImageSets" / "WSOL" / f"{dataset.split}.txt"
    if listed.is_file():
        wanted = [check_id(line.split()[0], listed) for line in read_list(listed)]
        known = set(dataset.ids)
        for name in wanted:
            if name not in known:
                raise InputError(f"{listed}: image '{name}' is not in split '{dataset.split}'")
    else:
        wanted = list(dataset.ids)
    stored = base / "boxes.json" if (base / "boxes.json").is_file() else base / "Annotations"
    read = _flat_boxes(stored, dataset) if stored.is_file() else _annotated(stored)
    names: list[str] = []
    boxes, owner, classes = [], [], []
    for name in wanted:
        found = read(name)
        kinds = {kind for _, kind in found}
        if len(kinds) != 1:
            continue
        kind = kinds.pop()
        if kind not in dataset.classes:
            raise InputError(f"{base}: image '{name}' has a box of '{kind}', which is no class")
        boxes += [corners for corners, _ in found]
        owner += [len(names)] * len(found)
        classes.append(dataset.classes.index(kind))
        names.append(name)
    if not names:
        raise InputError(f"{base}: no image of split '{dataset.split}' has boxes of one class only")
    place = {name: i for i, name in enumerate(dataset.ids)}
    sizes = [dataset.image_size(place[name])[::-1] for name in names]
    truth = Localization(
        str((listed if listed.is_file() else stored).relative_to(base)),
        tuple(names),
        np.array(sizes, np.int64),
        np.array(boxes, np.float64),
        np.array(owner, np.int64),
    )
    return truth, np.array(classes, np.int64)


# ---- wsolevaluation's files --------------------------------------------------------------------


def _check_path(name: str, folder: Path) -> str:
    """Score maps are read from below a folder: a name may not lead elsewhere."""
    path = PurePosixPath(name)
    if "," in name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(f"{folder / 'image_ids.txt'}: {name!r} is no path below a folder")
    return name


def _rows(path: Path, place: dict[str, int], count: int) -> Any:
    """``(image, values)`` of every line."""
    for number, line in enumerate(read_list(path), 1):
        name, *values = line.split(",")
        if name not in place or len(values) != count:
            raise InputError(
                f"{path}: line {number} must be an image of image_ids.txt and {count} values, "
                f"got {line!r}"
            )
        yield place[name], values


def _numbers(values: Sequence[str], path: Path) -> list[float]:
    try:
        return [float(value) for value in values]
    except ValueError:
        raise InputError(f"{path}: expected numbers, got {','.join(values)!r}") from None


def _no_boxes() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return np.empty((0, 4)), np.empty(0, np.int64)


def _read_masks(path: Path, place: dict[str, int], mask_root: str | Path | None) -> Any:
    if mask_root is None:
        raise InputError(f"{path} names masks; say where they are with --mask_root FOLDER")
    root = Path(mask_root)
    masks: list[list[Path]] = [[] for _ in place]
    ignore: list[Path | None] = [None] * len(place)
    for number, line in enumerate(read_list(path), 1):
        name, *files = line.split(",")
        if name not in place or not 1 <= len(files) <= 2:
            raise InputError(
                f"{path}: line {number} must be an image of image_ids.txt, a mask and perhaps what "
                f"to ignore, got {line!r}"
            )
        image = place[name]
        masks[image].append(root / _check_path(files[0], path.parent))
        if len(files) == 2 and files[1]:
            ignore[image] = root / _check_path(files[1], path.parent)
    return tuple((tuple(m), i) for m, i in zip(masks, ignore, strict=True))


# ---- VOC's boxes -------------------------------------------------------------------------------


def _voc_base(dataset: Dataset) -> Path:
    path = dataset.image_path(0) if dataset.name == "voc" else None
    if path is None:
        raise InputError(
            f"boxes are read from data sets in VOC's layout, got '{dataset.name}'; for others give "
            "--scoremaps and --metadata"
        )
    return path.parent.parent


def _flat_boxes(path: Path, dataset: Dataset) -> Any:
    content = read_json(path)
    expected = f'{path}: expected {{"boxes": {{image id: [[x0, y0, x1, y1, class id], ..]}}}}'
    names = dict(zip(dataset.mask_ids, dataset.classes, strict=True))
    if not isinstance(content, dict) or not isinstance(content.get("boxes"), dict):
        raise InputError(expected)

    def read(name: str) -> list[tuple[list[float], str]]:
        try:
            rows = [
                (x0, y0, x1, y1, int(k)) for x0, y0, x1, y1, k in content["boxes"].get(name, [])
            ]
            return [([float(x) for x in box], names.get(k, str(k))) for *box, k in rows]
        except (TypeError, ValueError):
            raise InputError(f"{expected}; that of '{name}' is something else") from None

    return read


def _annotated(folder: Path) -> Any:
    def read(name: str) -> list[tuple[list[float], str]]:
        path = folder / f"{name}.xml"
        try:
            found = []
            for thing in ElementTree.parse(path).getroot().findall("object"):
                corners = [thing.findtext(f"bndbox/{c}") for c in ("xmin", "ymin", "xmax", "ymax")]
                box = [float(c or "") - 1 for c in corners]
                found.append((box, (thing.findtext("name") or "").strip()))
            return found
        except OSError:
            raise InputError(f"{path}: no such file; expected VOC annotations") from None
        except (ElementTree.ParseError, ValueError) as error:
            raise InputError(f"{path}: expected VOC annotations, got {error}") from None

    return read
