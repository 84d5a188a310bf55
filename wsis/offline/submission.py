"""Masks for the PASCAL VOC evaluation server: checked, named and packed as it wants them.

``results/VOC2012/Segmentation/comp6_test_cls/<id>.png`` in ``results.tgz`` (VOC devkit, section
"Submission"): indexed 8-bit PNGs of the photograph's size that hold 0..20. The server is often
down, so a manifest with the hash of every file is written beside the archive.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wsis.engine.logs import write_json_atomic
from wsis.errors import InputError
from wsis.offline.masks import write_bytes_atomic, write_mask

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset

Competition = Literal[5, 6]
NUM_CLASSES = 20
TEST_IMAGES = 1456
"""Images of VOC 2012's test list."""


def write_submission(
    dataset: Dataset,
    masks: Iterable[NDArray[Any]],
    out: str | Path,
    *,
    competition: Competition = 6,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write masks, archive and manifest.

    Args:
        dataset: the split whose images are wanted, VOC's classes or some of them.
        masks: ``[H, W]`` internal ids of every image in the list's order, without 255.
        out: folder for ``results/``, ``results.tgz`` and ``manifest.json``.
        competition: 5 for training on VOC's trainval alone, 6 for anything else; ImageNet weights
            and SBD's images are something else.
        about: what the manifest says of the masks' origin.

    Returns:
        The archive.

    Raises:
        InputError: a mask of another size than its image, or with an id outside the classes; names
            the image. No archive is written then.
    """
    if competition not in (5, 6):
        raise InputError(f"the competition must be 5 or 6, got {competition}")
    if dataset.name != "voc" or max(dataset.mask_ids) > NUM_CLASSES:
        raise InputError(
            f"the server takes VOC's 20 classes, got data set '{dataset.name}' with file ids "
            f"{list(dataset.mask_ids)}"
        )
    out = Path(out)
    folder = Path("results/VOC2012/Segmentation") / f"comp{competition}_test_cls"
    hashes = {}
    given = tqdm(masks, desc="submission", total=len(dataset), unit="image")
    for index, values in zip(range(len(dataset)), given, strict=True):
        name, mask = dataset.ids[index], np.asarray(values)
        height, width = dataset.image_size(index)
        if mask.shape != (height, width):
            raise InputError(
                f"image '{name}': the mask must be {height} x {width}, got {list(mask.shape)}"
            )
        if mask.size and (mask.min() < 0 or mask.max() > len(dataset.classes)):
            raise InputError(
                f"image '{name}': the server takes class ids only, got "
                f"{mask.min()} to {mask.max()} for {len(dataset.classes)} classes; 255 is none"
            )
        path = out / folder / f"{name}.png"
        write_mask(path, mask, dataset.mask_ids)
        hashes[f"{folder.as_posix()}/{name}.png"] = hashlib.sha256(path.read_bytes()).hexdigest()
    archive = out / "results.tgz"
    packed = _pack(out, list(hashes))
    write_bytes_atomic(archive, packed)
    manifest = {
        "archive": archive.name,
        "sha256": hashlib.sha256(packed).hexdigest(),
        "competition": f"comp{competition}",
        "split": dataset.split,
        "images": len(dataset),
        **(about or {}),
        "files": hashes,
    }
    write_json_atomic(out / "manifest.json", manifest)
    return archive


def _pack(root: Path, names: list[str]) -> bytes:
    """A ``.tgz`` that depends on names and contents alone."""
    encoded = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=encoded, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for name in names:
            content = (root / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return encoded.getvalue()
