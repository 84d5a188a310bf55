"""CUB-200-2011: `CUB_200_2011.tgz`, or what it unpacks to.

Result: wsolevaluation's layout (Choe et al. 2020), which `wsis.data.wsol` opens: `dataset/CUB`, a
link to `CUB_200_2011/images`, and in `metadata/CUB/{train,test}` the lists `image_ids.txt`,
`class_labels.txt` (from 0), `image_sizes.txt` (width, height) and `localization.txt`
(`x0,y0,x1,y1` with `x1 = x + width`); names of classes in `metadata/CUB/classes.txt`. CUBV2, their
`val`, is not part of CUB.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tqdm import tqdm

from wsis.data.dataset import read_list, read_size
from wsis.engine.logs import write_error, write_text_atomic
from wsis.errors import InputError
from wsis.prepare.archives import extract
from wsis.prepare.record import Record, as_source, find_folder, make_folder

ARCHIVE = "CUB_200_2011.tgz"
KNOWN = {"train": 5994, "test": 5794}
KNOWN_CLASSES = 200

_BELOW = ("CUB_200_2011", "")
_WANTED = re.compile(r"CUB_200_2011/(\w+\.txt|images/[\w.\-]+/[\w.\-]+\.jpg)")
_IMAGE = re.compile(r"\w[\w.\-]*/\w[\w.\-]*\.jpg")


def prepare_cub(source: Path, out: Path | None = None, *, partial: bool = False) -> Record:
    """Build the CUB data set.

    Args:
        source: folder with the archive, or with the unpacked data.
        out: where to unpack, and where `metadata` goes; None: into `source`.
        partial: accept other counts than the known ones.

    Raises:
        InputError: neither archive nor data there, or they are damaged, hostile, incomplete, or
            have other counts.
    """
    source = as_source(source)
    base = _unpack(source, out)
    root = base.parent if base.name == "CUB_200_2011" else base
    record = Record("cub", out or root, partial)
    images = _table(base / "images.txt", 1)
    labels = _table(base / "image_class_labels.txt", 1)
    boxes = _table(base / "bounding_boxes.txt", 4)
    is_train = _table(base / "train_test_split.txt", 1)
    classes = _table(base / "classes.txt", 1)
    for name, table in (("labels", labels), ("boxes", boxes), ("split", is_train)):
        if table.keys() != images.keys():
            raise InputError(f"{base}: images.txt and the table of {name} list other images")
    for (path,) in images.values():
        if not _IMAGE.fullmatch(path):
            raise InputError(f"{base / 'images.txt'}: {path!r} is no path CLASS/IMAGE.jpg")
    if len(classes) != KNOWN_CLASSES and not partial:
        raise InputError(
            f"{base / 'classes.txt'}: expected {KNOWN_CLASSES} classes, got {len(classes)}; where "
            "a part is meant: --partial true"
        )
    _link(record.root / "dataset" / "CUB", base / "images")
    make_folder(record.root / "metadata" / "CUB")
    numbers = [str(n) for n in range(1, len(classes) + 1)]
    if classes.keys() != {*numbers}:
        raise InputError(f"{base / 'classes.txt'}: expected classes numbered from 1 without gaps")
    names = [classes[number][0] for number in numbers]
    record.write_list(record.root / "metadata" / "CUB" / "classes.txt", names)
    for split, known in KNOWN.items():
        chosen = [n for n, (flag,) in is_train.items() if (flag == "1") == (split == "train")]
        record.expect(f"CUB {split}", len(chosen), known, "an incomplete or another release")
        record.note_list(split, [images[number][0] for number in chosen])
        _write_split(
            record.root / "metadata" / "CUB" / split,
            base / "images",
            [
                (images[n][0], _class(labels[n][0], len(classes), base), _box(boxes[n], base))
                for n in chosen
            ],
        )
    record.write()
    return record


def _unpack(source: Path, out: Path | None) -> Path:
    archive = source / ARCHIVE
    if not archive.is_file():
        base = find_folder(source, _BELOW, "images.txt")
        if base is None:
            raise InputError(
                f"{source}: expected {ARCHIVE}, or the folder CUB_200_2011 it unpacks to"
            )
        return base
    base = (out or source) / "CUB_200_2011"

    def place(name: str) -> Path | None:
        match = _WANTED.fullmatch(name)
        return base / match[1] if match and ".." not in name else None

    if not extract(archive, place):
        raise InputError(f"{archive}: expected CUB_200_2011/images.txt, ..., found none")
    return base


def _link(link: Path, images: Path) -> None:
    """`dataset/CUB` leads to the images, by a relative path, so that both can be moved together."""
    if link.exists() and link.samefile(images):
        return
    make_folder(link.parent)
    try:
        link.symlink_to(os.path.relpath(images.resolve(), link.parent.resolve()))
    except OSError as error:
        raise write_error(link, error, 0) from error


def _table(path: Path, columns: int) -> dict[str, list[str]]:
    """Rows `number value ...` of one of CUB's files."""
    rows: dict[str, list[str]] = {}
    for line in read_list(path):
        number, *values = line.split()
        if len(values) != columns or number in rows:
            raise InputError(f"{path}: expected a number and {columns} values, got {line!r}")
        rows[number] = values
    return rows


def _class(text: str, count: int, base: Path) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= count:
        raise InputError(f"{base / 'image_class_labels.txt'}: {text!r} is no class of 1..{count}")
    return int(text) - 1


def _box(texts: list[str], base: Path) -> tuple[int, int, int, int]:
    try:
        x, y, width, height = map(float, texts)
        return int(x), int(y), int(x + width), int(y + height)
    except (ValueError, OverflowError):
        raise InputError(f"{base / 'bounding_boxes.txt'}: {texts} is no box") from None


def _write_split(
    folder: Path, images: Path, rows: list[tuple[str, int, tuple[int, int, int, int]]]
) -> None:
    """The four files of a split; sizes are read from the images' headers."""
    sizes = []
    for path, _, _ in tqdm(rows, desc=f"sizes of {folder.name}", unit="image", delay=1):
        height, width = read_size(images / path)
        sizes.append(f"{path},{width},{height}")
    make_folder(folder)
    for name, lines in (
        ("image_ids", [path for path, _, _ in rows]),
        ("class_labels", [f"{path},{label}" for path, label, _ in rows]),
        ("image_sizes", sizes),
        ("localization", [f"{path},{','.join(map(str, box))}" for path, _, box in rows]),
    ):
        write_text_atomic(folder / f"{name}.txt", "".join(f"{line}\n" for line in lines))
