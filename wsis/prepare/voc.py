"""PASCAL VOC 2012: `VOCtrainval_11-May-2012.tar` and `VOC2012test.tar`, or what they unpack to.

Result: `VOCdevkit/VOC2012` with images, annotations, masks and lists, and `cls_labels.npz`
(`ids [N]`, `labels [N, 20]`), the image-level labels of all listed images from the annotations.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

from wsis.data.dataset import open_dataset, read_list
from wsis.errors import InputError
from wsis.offline.masks import write_bytes_atomic
from wsis.prepare.archives import extract
from wsis.prepare.record import Record, as_source, find_folder

TRAINVAL, TEST = "VOCtrainval_11-May-2012.tar", "VOC2012test.tar"
KNOWN = {"train": 1464, "val": 1449, "trainval": 2913, "test": 1456}
"""Images of VOC 2012's segmentation lists."""

_BELOW = ("VOCdevkit/VOC2012", "VOC2012", "")
_WANTED = re.compile(
    r"VOCdevkit/VOC2012/((?:JPEGImages/\w+\.jpg)|(?:Annotations/\w+\.xml)"
    r"|(?:SegmentationClass/\w+\.png)|(?:ImageSets/Segmentation/\w+\.txt))"
)


def prepare_voc(source: Path, out: Path | None = None, *, partial: bool = False) -> Record:
    """Build the VOC data set.

    Args:
        source: folder with the archives, or with the unpacked data.
        out: where to unpack; None: into `source`.
        partial: accept other counts than the known ones.

    Raises:
        InputError: neither archives nor data there, or they are damaged, hostile, incomplete, or
            have other counts.
    """
    record = Record("voc", unpack_voc(source, out), partial)
    lists = record.root / "ImageSets" / "Segmentation"
    for split, known in KNOWN.items():
        if split == "test" and not (lists / "test.txt").is_file():
            record.warnings.append(f"no list test: {TEST} is not there")
            continue
        ids = read_list(lists / f"{split}.txt")
        record.expect(f"VOC list {split}", len(ids), known, "an edited list or another release")
        record.note_list(split, ids)
        _check_files(record.root, split, ids)
    write_labels(record.root, ["trainval"])
    record.write()
    return record


def unpack_voc(source: Path, out: Path | None) -> Path:
    """Unpack what is not yet unpacked; returns the folder of VOC 2012.

    Raises:
        InputError: neither archives nor data there, or a bad archive.
    """
    source = as_source(source)
    archives = [source / name for name in (TRAINVAL, TEST) if (source / name).is_file()]
    if not archives:
        base = find_folder(source, _BELOW, "JPEGImages")
        if base is None:
            raise InputError(
                f"{source}: expected {TRAINVAL} (and {TEST}), or the folder VOCdevkit they unpack "
                "to"
            )
        if out is not None and out.resolve() != source.resolve():
            raise InputError(f"{base} is unpacked already and is prepared in place; drop --out")
        return base
    base = (out or source) / "VOCdevkit" / "VOC2012"

    def place(name: str) -> Path | None:
        match = _WANTED.fullmatch(name)
        return base / match[1] if match else None

    for archive in archives:
        if not extract(archive, place):
            raise InputError(f"{archive}: expected VOCdevkit/VOC2012/JPEGImages/..., found none")
    return base


def write_labels(base: Path, splits: list[str]) -> None:
    """Write `cls_labels.npz` for the images of some lists, from the annotations."""
    rows: dict[str, np.ndarray] = {}
    for split in splits:
        data = open_dataset("voc", base, split)
        rows |= dict(zip(data.ids, data.labels[:], strict=True))
    ids = sorted(rows)
    encoded = io.BytesIO()
    np.savez(encoded, ids=np.array(ids), labels=np.stack([rows[name] for name in ids]))
    write_bytes_atomic(base / "cls_labels.npz", encoded.getvalue())


def _check_files(base: Path, split: str, ids: list[str]) -> None:
    """Every listed image has its files; test has neither annotations nor masks."""
    places = [("JPEGImages", "jpg")]
    if split != "test":
        places += [("Annotations", "xml"), ("SegmentationClass", "png")]
    for folder, suffix in places:
        absent = [name for name in ids if not (base / folder / f"{name}.{suffix}").is_file()]
        if absent:
            raise InputError(
                f"{base / folder}: {len(absent)} of {len(ids)} images of list {split} have no "
                f"file, the first is {absent[0]}.{suffix}; download the archive again"
            )
