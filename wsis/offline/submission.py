"""Masks for the PASCAL VOC evaluation server: checked, named and packed as it wants them.

``results/VOC2012/Segmentation/comp6_test_cls/<id>.png`` in ``results.tgz`` (VOC devkit, section
"Submission"): indexed 8-bit PNGs of the photograph's size that hold 0..20. The server is often
down, so a manifest with the hash of every file is written beside the archive.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wsis.data.dataset import read_json
from wsis.engine.logs import write_error, write_json_atomic
from wsis.errors import InputError
from wsis.offline.masks import read_mask, write_bytes_atomic, write_mask

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset

Competition = Literal[5, 6]
NUM_CLASSES = 20
TEST_IMAGES = 1456
"""Images of VOC 2012's test list."""

ARCHIVE, MANIFEST, PLAN = "results.tgz", "manifest.json", "plan.json"


def remaining(
    dataset: Dataset,
    out: str | Path,
    *,
    competition: Competition = 6,
    about: Mapping[str, Any] | None = None,
    anew: bool = False,
) -> list[int]:
    """Which masks are still to be made, in a folder that a stopped submission may have left.

    The plan (list, competition, origin) is kept in ``plan.json``. Where it is another than that of
    the masks in the folder, those of this list are removed, and the archive with them: masks of two
    origins never meet.

    Args:
        dataset: as for `write_submission`.
        out: as there.
        competition: as there.
        about: as there; it must name all that the masks depend on.
        anew: make all of them, whatever is there.

    Returns:
        Positions in the data set, ascending.

    Raises:
        InputError: a competition or a data set that the server does not take, or the disk refuses.
    """
    _check(dataset, competition)
    out, folder = Path(out), folder_of(competition)
    plan = {"competition": competition, "ids": list(dataset.ids), **(about or {})}
    plan = json.loads(json.dumps(plan))
    stored = read_json(out / PLAN) if (out / PLAN).is_file() else None
    paths = [out / folder / f"{name}.png" for name in dataset.ids]
    if anew or stored != plan:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in (*paths, out / ARCHIVE, out / MANIFEST):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(out, error, 0) from error
        write_json_atomic(out / PLAN, plan)
    return [index for index, path in enumerate(paths) if not path.is_file()]


def write_submission(
    dataset: Dataset,
    masks: Iterable[NDArray[Any]],
    out: str | Path,
    *,
    todo: Sequence[int] | None = None,
    competition: Competition = 6,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write masks, archive and manifest.

    Every mask is checked before it is written, and those that lay there before it is packed.

    Args:
        dataset: the split whose images are wanted, VOC's classes or some of them.
        masks: ``[H, W]`` internal ids of the images in `todo`, in its order, without 255.
        out: folder for ``results/``, ``results.tgz`` and ``manifest.json``.
        todo: positions of the masks to write, as `remaining` gives them; the others lie there
            already. None writes all.
        competition: 5 for training on VOC's trainval alone, 6 for anything else; ImageNet weights
            and SBD's images are something else.
        about: what the manifest says of the masks' origin.

    Returns:
        The archive.

    Raises:
        InputError: a mask of another size than its image, or with an id outside the classes; names
            the image. No archive is written then.
    """
    _check(dataset, competition)
    out, folder = Path(out), folder_of(competition)
    todo = range(len(dataset)) if todo is None else todo
    given = tqdm(masks, desc="submission", total=len(todo), unit="image", disable=not todo)
    for index, values in zip(todo, given, strict=True):
        mask = _checked(dataset, index, np.asarray(values))
        write_mask(out / folder / f"{dataset.ids[index]}.png", mask, dataset.mask_ids)
    hashes = {}
    for index in range(len(dataset)):
        name = f"{folder.as_posix()}/{dataset.ids[index]}.png"
        _checked(dataset, index, read_mask(out / name, dataset.mask_ids))
        hashes[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    archive = out / ARCHIVE
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
    write_json_atomic(out / MANIFEST, manifest)
    return archive


def folder_of(competition: int) -> Path:
    """Where the server wants the masks, below the archive's root."""
    return Path("results/VOC2012/Segmentation") / f"comp{competition}_test_cls"


def _check(dataset: Dataset, competition: int) -> None:
    if competition not in (5, 6):
        raise InputError(f"the competition must be 5 or 6, got {competition}")
    if dataset.name != "voc" or max(dataset.mask_ids) > NUM_CLASSES:
        raise InputError(
            f"the server takes VOC's 20 classes, got data set '{dataset.name}' with file ids "
            f"{list(dataset.mask_ids)}"
        )


def _checked(dataset: Dataset, index: int, mask: NDArray[Any]) -> NDArray[Any]:
    """The mask, where the server takes it."""
    name, (height, width) = dataset.ids[index], dataset.image_size(index)
    if mask.shape != (height, width):
        raise InputError(
            f"image '{name}': the mask must be {height} x {width}, got {list(mask.shape)}"
        )
    if mask.size and (mask.min() < 0 or mask.max() > len(dataset.classes)):
        raise InputError(
            f"image '{name}': the server takes class ids only, got "
            f"{mask.min()} to {mask.max()} for {len(dataset.classes)} classes; 255 is none"
        )
    return mask


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
