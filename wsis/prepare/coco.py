"""MS COCO 2014: `train2014.zip`, `val2014.zip`, `annotations_trainval2014.zip`, or unpacked.

Result: images and annotations as COCO has them, lists of the images with labels (`train`, `val`,
and `val_part`, the first 5,000 of `val` by id, with which AFA and ToCo validate while training; and
`train_tune`, every 41st of `train`, on which a background score may be chosen, with the rest,
`train_fit`),
and all masks as palette PNGs in `SegmentationClass` for other programs; `wsis` itself paints masks
from the annotations when it needs one. `SegmentationClass/maker.json` says how they were painted.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from wsis.data.coco import MASK_MAKER, maker_hash, open_coco
from wsis.data.coco_index import read_index
from wsis.data.dataset import Dataset, read_json
from wsis.engine.logs import write_json_atomic
from wsis.errors import InputError
from wsis.offline.masks import write_mask
from wsis.prepare.archives import extract
from wsis.prepare.record import Record, as_source, make_folder

ARCHIVES = ("annotations_trainval2014.zip", "train2014.zip", "val2014.zip")
KNOWN = {"train": 82081, "val": 40137}
KNOWN_CLASSES = 80
VAL_PART = 5000
"""ToCo's file `val_part.txt` has 4,999 line ends and 5,000 images: the last line has no end."""
TUNE_EVERY = 41
"""Leaves 2,001 images of train for choosing a background score, 2.4 %."""

_PART = 32
_WANTED = re.compile(
    r"annotations/instances_(?:train|val)2014\.json|(?:train|val)2014/COCO_\w+\.jpg"
)


def prepare_coco(
    source: Path,
    out: Path | None = None,
    *,
    partial: bool = False,
    masks: bool = True,
    processes: int | None = None,
) -> Record:
    """Build the COCO data set.

    Args:
        source: folder with the archives, or with the unpacked data.
        out: where to unpack; None: into `source`.
        partial: accept other counts than the known ones.
        masks: paint all masks to PNGs.
        processes: that paint; None: one per processor.

    Raises:
        InputError: neither archives nor data there, or they are damaged, hostile, incomplete, or
            have other counts.
        MissingExtraError: pycocotools is not installed.
    """
    root = _unpack(as_source(source), out)
    record = Record("coco", root, partial)
    for split, known in KNOWN.items():
        annotations = root / "annotations" / f"instances_{split}2014.json"
        index = read_index(annotations)
        record.counts[f"COCO {split}, all"] = len(index.numbers)
        if len(index.category_ids) != KNOWN_CLASSES and not partial:
            raise InputError(
                f"{annotations}: expected {KNOWN_CLASSES} categories, got "
                f"{len(index.category_ids)}; where a part is meant: --partial true"
            )
        data = open_coco(root, split)
        record.expect(
            f"COCO {split}, with labels", len(data), known, "annotations of 2017 or a part of them"
        )
        folder = root / "ImageSets" / "Segmentation"
        record.write_list(folder / f"{split}.txt", data.ids)
        parts = {"val_part": data.ids[:VAL_PART]}
        if split == "train":
            tune = data.ids[TUNE_EVERY - 1 :: TUNE_EVERY]
            parts = {"train_tune": tune, "train_fit": sorted({*data.ids} - {*tune})}
        for name, ids in parts.items():
            if not ids:  # of a part of COCO
                continue
            record.write_list(folder / f"{name}.txt", ids)
        record.about.setdefault("annotations", {})[split] = index.digest
        if masks:
            _paint_all(data, root / "SegmentationClass", processes)
    record.about["mask_maker"] = {"name": MASK_MAKER, "hash": maker_hash()}
    record.write()
    return record


def _unpack(source: Path, out: Path | None) -> Path:
    """Unpack what is not yet unpacked; returns the folder of COCO."""
    archives = [source / name for name in ARCHIVES if (source / name).is_file()]
    if not archives:
        if not (source / "annotations").is_dir():
            raise InputError(
                f"{source}: expected {', '.join(ARCHIVES)}, or the folders annotations, train2014 "
                "and val2014 they unpack to"
            )
        if out is not None and out.resolve() != source.resolve():
            raise InputError(f"{source} is unpacked already and is prepared in place; drop --out")
        return source
    root = out or source

    def place(name: str) -> Path | None:
        return root / name if _WANTED.fullmatch(name) else None

    for archive in archives:
        if not extract(archive, place):
            raise InputError(f"{archive}: holds nothing of COCO 2014's images or instances")
    return root


# ---- masks --------------------------------------------------------------------------------------


def _paint_all(data: Dataset, folder: Path, processes: int | None) -> None:
    """Paint the masks that are not there yet.

    Raises:
        InputError: the folder has masks of another or an unknown maker.
    """
    maker = {"name": MASK_MAKER, "hash": maker_hash()}
    note = folder / "maker.json"
    if note.is_file():
        if read_json(note) != maker:
            raise InputError(f"{note}: the masks there were made by another rule; remove {folder}")
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{folder}: holds masks of an unknown maker; move it away, or give --masks false"
        )
    make_folder(folder)
    write_json_atomic(note, maker)
    missing = [i for i, name in enumerate(data.ids) if not (folder / f"{name}.png").is_file()]
    processes = min(processes or os.cpu_count() or 1, max(1, len(missing) // _PART))
    bar = tqdm(total=len(missing), desc=f"masks of {data.split}", unit="mask", delay=1)
    with bar:
        if processes == 1:
            for i in missing:
                _paint(data, folder, i)
                bar.update()
            return
        parts = _parts(missing, _PART)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _start, (data, folder)) as pool:
            for count in pool.map(_paint_part, parts):
                bar.update(count)


def _parts(values: list[int], size: int) -> Iterator[list[int]]:
    rest = iter(values)
    while part := list(islice(rest, size)):
        yield part


_work: tuple[Dataset, Path] | None = None


def _start(data: Dataset, folder: Path) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    _work = data, folder


def _paint_part(part: list[int]) -> int:
    assert _work is not None
    for i in part:
        _paint(*_work, i)
    return len(part)


def _paint(data: Dataset, folder: Path, i: int) -> None:
    write_mask(folder / f"{data.ids[i]}.png", data.mask(i), data.mask_ids)
