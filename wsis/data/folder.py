"""Any images with a CSV: `<root>/<split>.csv` with the columns `image,labels`.

    image,labels
    images/rex.jpg,dog
    images/park.jpg,dog person

Image paths are relative to the CSV and may not leave its folder. Labels are separated by spaces,
or by `;` where names hold spaces; none means background only. The id of an image is its file name
without suffix and must be unique. Classes are the lines of `classes.txt`, else the sorted names in
`train.csv`. Masks, if any, are `masks/<id>.png` with 0, 1..K in the order of the classes, and 255.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath

import numpy as np

from wsis.data.dataset import Dataset, check_id, read_list, read_text
from wsis.errors import InputError


def open_folder(root: Path, split: str) -> Dataset:
    """Open a folder with CSV lists.

    Args:
        root: folder of the CSV files, see the module.
        split: stem of the CSV.

    Raises:
        InputError: missing CSV or image, malformed row, path that leaves the folder, two images
            of one name, label outside the classes.
    """
    check_id(split, root)
    path = root / f"{split}.csv"
    rows = _read_rows(path)
    classes = _classes(root, rows)
    column = {name: i for i, name in enumerate(classes)}
    table = np.zeros((len(rows), len(classes)), np.uint8)
    first_use: dict[str, str] = {}
    for row, (image, names) in enumerate(rows):
        stem = check_id(PurePosixPath(image).stem, path)
        if stem in first_use:
            raise InputError(
                f"{path}: '{first_use[stem]}' and '{image}' share the name '{stem}', under which "
                "masks are kept; rename one"
            )
        first_use[stem] = image
        for name in names:
            if name not in column:
                raise InputError(
                    f"{path}: '{image}' has label '{name}', expected one of {', '.join(classes)}"
                )
            table[row, column[name]] = 1
    return Dataset(
        name="folder",
        root=root,
        split=split,
        classes=classes,
        ids=list(first_use),
        labels=table,
        image_paths=[root / image for image in first_use.values()],
        mask_folders=[root / "masks"],
    )


def _read_rows(path: Path) -> list[tuple[str, list[str]]]:
    """(image path, class names) of each row."""
    reader = csv.DictReader(io.StringIO(read_text(path)), skipinitialspace=True)
    if reader.fieldnames is None or not {"image", "labels"} <= set(reader.fieldnames):
        raise InputError(f"{path}: expected the columns image,labels, got {reader.fieldnames}")
    rows = []
    for row in reader:
        image, labels = row["image"], row["labels"]
        if not image or labels is None or None in row:
            raise InputError(f"{path}: line {reader.line_num}: expected image,labels")
        if "\\" in image or ".." in PurePosixPath(image).parts or image.startswith("/"):
            raise InputError(
                f"{path}: line {reader.line_num}: image path {image!r} must be relative, with '/', "
                "and stay in the folder"
            )
        names = labels.split(";") if ";" in labels else labels.split()
        rows.append((image, [name.strip() for name in names if name.strip()]))
    if not rows:
        raise InputError(f"{path}: expected at least one image, the list is empty")
    return rows


def _classes(root: Path, rows: list[tuple[str, list[str]]]) -> list[str]:
    if (root / "classes.txt").is_file():
        names = read_list(root / "classes.txt")
        if len(set(names)) < len(names):
            raise InputError(f"{root / 'classes.txt'}: a class is listed twice")
        return names
    # Other splits may lack a class; numbering by the train split keeps ids the same in all.
    train = root / "train.csv"
    listed = _read_rows(train) if train.is_file() else rows
    names = sorted({name for _, row in listed for name in row})
    if not names:
        raise InputError(f"{root}: no image has a label; give classes.txt or fill in labels")
    return names
