"""SBD (Hariharan et al. 2011), `benchmark.tgz`: the list `trainaug` and its masks, beside VOC 2012.

`trainaug` is what the field trains on: VOC's `train` and every image of SBD that is not in VOC's
`val`. Masks of SBD go to `SegmentationClassAug`, but for the images of VOC's `train` and `val`,
whose own masks are better. Nothing of SBD is unpacked: masks are read from the archive's stream.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from wsis.data.dataset import read_list, read_size
from wsis.data.voc import VOC_CLASSES
from wsis.errors import InputError, MissingExtraError
from wsis.offline.masks import read_mask, write_mask
from wsis.prepare.archives import members
from wsis.prepare.record import Record, as_source, find_folder
from wsis.prepare.voc import prepare_voc, write_labels

ARCHIVE = "benchmark.tgz"
KNOWN_SBD = 11355
KNOWN_TRAINAUG = 10582

_BELOW = ("benchmark_RELEASE/dataset", "dataset", "")
_WANTED = re.compile(r"benchmark_RELEASE/dataset/(?:cls/(\w+)\.mat|(?:train|val)\.txt)")
_MASK_IDS = range(1, len(VOC_CLASSES) + 1)
_MAT_LIMIT = 1 << 24
_COMPRESSED = 15


def prepare_sbd(source: Path, out: Path | None = None, *, partial: bool = False) -> Record:
    """Add SBD to VOC; VOC is prepared first from the same folder.

    Args:
        source: folder with SBD's archive or unpacked data, and with VOC's.
        out: where to unpack VOC; None: into `source`.
        partial: accept other counts than the known ones.

    Raises:
        InputError: something is missing, damaged, hostile, or has other counts.
        MissingExtraError: scipy is not installed.
    """
    source = as_source(source)
    if not (source / ARCHIVE).is_file() and find_folder(source, _BELOW, "cls") is None:
        raise InputError(
            f"{source}: expected {ARCHIVE}, or the folder benchmark_RELEASE it unpacks to"
        )
    voc = prepare_voc(source, out, partial=partial)
    record = Record("sbd", voc.root, partial, warnings=list(voc.warnings))
    lists = voc.root / "ImageSets" / "Segmentation"
    train, val = read_list(lists / "train.txt"), read_list(lists / "val.txt")
    ids, replaced = _write_masks(source, voc.root, known={*train, *val})
    record.expect("SBD masks", len(ids), KNOWN_SBD, "an incomplete or another release")
    if replaced:
        record.warnings.append(f"SegmentationClassAug: {replaced} other masks were replaced")
    trainaug = sorted({*train, *ids} - {*val})
    record.expect("list trainaug", len(trainaug), KNOWN_TRAINAUG, "VOC or SBD is incomplete")
    record.write_list(lists / "trainaug.txt", trainaug)
    write_labels(voc.root, ["trainval", "trainaug"])
    record.about["masks"] = "SegmentationClass where VOC has one, else SBD's cls/*.mat"
    record.write()
    return record


def _write_masks(source: Path, base: Path, known: set[str]) -> tuple[set[str], int]:
    """Masks of the images that are not `known`; returns SBD's ids, and how many were replaced."""
    ids: set[str] = set()
    listed: set[str] = set()
    replaced = 0
    for name, data in _files(source):
        match = _WANTED.fullmatch(name)
        assert match is not None
        image = match[1]
        if image is None:
            listed |= set(data.decode("utf-8", "replace").split())
            continue
        if image in ids:
            raise InputError(f"{source / ARCHIVE}: refused, it holds '{name}' twice")
        ids.add(image)
        if image in known:
            continue
        mask = read_sbd(data, name)
        photograph = base / "JPEGImages" / f"{image}.jpg"
        if mask.shape != read_size(photograph):
            raise InputError(
                f"{name}: expected the size of {photograph}, {read_size(photograph)}, got "
                f"{mask.shape}"
            )
        replaced += _put(base / "SegmentationClassAug" / f"{image}.png", mask)
    absent = sorted(listed - ids)
    if absent:
        raise InputError(
            f"{source}: {len(absent)} of SBD's {len(listed)} listed images have no cls/*.mat, the "
            f"first is {absent[0]}; download {ARCHIVE} again"
        )
    return ids, replaced


def _put(path: Path, mask: np.ndarray) -> bool:
    """Write a mask unless it is there; returns whether another one was."""
    other = path.is_file()
    if other:
        try:
            if np.array_equal(read_mask(path, _MASK_IDS), mask):
                return False
        except InputError:
            pass
    write_mask(path, mask, _MASK_IDS)
    return other


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name in the archive and content of lists and masks, from the archive or the folder."""
    if (source / ARCHIVE).is_file():
        wanted = members(source / ARCHIVE, lambda name, _: bool(_WANTED.fullmatch(name)))
        yield from ((member.name, member.read()) for member in wanted)
        return
    from tqdm import tqdm

    folder = find_folder(source, _BELOW, "cls")
    assert folder is not None
    paths = [p for p in (folder / "train.txt", folder / "val.txt") if p.is_file()]
    paths += sorted((folder / "cls").glob("*.mat"))
    for path in tqdm(paths, desc="SBD masks", unit="mask", delay=1):
        name = f"benchmark_RELEASE/dataset/{path.relative_to(folder).as_posix()}"
        if _WANTED.fullmatch(name):
            yield name, path.read_bytes()


def read_sbd(data: bytes, name: str) -> np.ndarray:
    """The mask in one of SBD's `cls/*.mat` files.

    Args:
        data: the file: MATLAB 5, a struct `GTcls` with the field `Segmentation`.
        name: to name in errors.

    Returns:
        `[H, W] uint8` in 0..20.

    Raises:
        InputError: another file, or one that unpacks to more than 16 MiB.
        MissingExtraError: scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtraError("scipy", "data", "reading SBD's masks") from error
    _refuse_bomb(data, name)
    try:
        mask = np.asarray(loadmat(io.BytesIO(data))["GTcls"][0, 0]["Segmentation"])
    except Exception as error:  # scipy's reader raises many kinds on damaged files
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{name}: expected GTcls.Segmentation of SBD, got {reason}") from None
    if mask.ndim != 2 or mask.dtype.kind not in "iuf" or not np.isin(mask, range(21)).all():
        raise InputError(
            f"{name}: expected a mask [H, W] of 0..20, got {mask.dtype} {list(mask.shape)}"
        )
    return mask.astype(np.uint8)


def _refuse_bomb(data: bytes, name: str) -> None:
    """Follow the elements of a MATLAB 5 file and unpack the compressed ones, up to the limit."""
    # As scipy decides it: else the elements seen here would not be those it reads.
    order: Literal["little", "big"] = "little" if data[126:128] == b"IM" else "big"
    at, left = 128, _MAT_LIMIT
    while at + 8 <= len(data):
        kind = int.from_bytes(data[at : at + 4], order)
        size = int.from_bytes(data[at + 4 : at + 8], order)
        if kind == _COMPRESSED:
            try:
                opened = zlib.decompressobj().decompress(data[at + 8 : at + 8 + size], left)
            except zlib.error as error:
                raise InputError(f"{name}: damaged ({error})") from None
            left -= len(opened)
            if left <= 0:
                raise InputError(f"{name}: refused, it unpacks to more than {_MAT_LIMIT} bytes")
        at += 8 + size
