"""Training images that cannot be read are left out, and the run remembers which.

The list is made once, before the first step, and lies in the run folder: a resumed run leaves out
the same images, whatever has become of the files. What is left is the data set of the run: order,
fingerprint and identity are those of a list that never had the bad ones. A file that goes bad
later ends the run with its name, as it does without a quarantine; to draw another image in its
place would make the run depend on the moment it happened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wsis.data.dataset import Dataset, read_json
from wsis.data.subset import Subset
from wsis.data.unreadable import unreadable
from wsis.engine import distributed
from wsis.engine.logs import write_error, write_json_atomic
from wsis.errors import InputError

FILE = "quarantine.json"
_SHOWN = 10


def quarantine(
    dataset: Dataset, folder: Path, *, masks: bool, threads: int, resume: bool
) -> Dataset:
    """The data set without its unreadable images, which are named in `folder/quarantine.json`.

    Every process of a launch looks at its share of the images.

    Args:
        dataset: the training images.
        folder: of the run; made if absent.
        masks: masks must be readable too.
        threads: images decoded at a time.
        resume: take the folder's list where it is one of this data set.

    Raises:
        InputError: not one image is readable, or the folder cannot be written.
    """
    stored = distributed.from_main(lambda: _stored(dataset, folder) if resume else None)
    bad = stored if stored is not None else _scan(dataset, masks=masks, threads=threads)
    if len(bad) == len(dataset):
        raise InputError(
            f"none of the {len(dataset)} images of '{dataset.split}' in {dataset.root} can be "
            f"read, the first: {next(iter(bad.values()))}"
        )
    if stored is None and distributed.is_main():
        _write(dataset, folder, bad)
        _tell(dataset, folder, bad)
    return _without(dataset, bad)


def without_quarantined(dataset: Dataset, folder: Path) -> Dataset:
    """The training images that a run used: without those that its folder names, if it names any.

    Args:
        dataset: the training images.
        folder: of the run.
    """
    return _without(dataset, _stored(dataset, folder) or {})


def about(folder: Path) -> dict[str, Any] | None:
    """What `about.json` says of the folder's list; None without one."""
    path = folder / FILE
    return read_json(path) if path.is_file() else None


def _scan(dataset: Dataset, *, masks: bool, threads: int) -> dict[int, str]:
    share = range(distributed.rank(), len(dataset), distributed.world_size())
    found = unreadable(
        dataset, masks=masks, threads=threads, positions=share, progress=distributed.is_main()
    )
    shares = distributed.gather_objects(found)
    return dict(sorted(pair for part in shares for pair in part.items()))


def _stored(dataset: Dataset, folder: Path) -> dict[int, str] | None:
    """The folder's list, by position; None where there is none, or one of another data set."""
    path = folder / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        if content["fingerprint"] != dataset.fingerprint():
            return None
        position = {name: i for i, name in enumerate(dataset.ids)}
        return {position[bad["image"]]: bad["reason"] for bad in content["bad"]}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected a list of unreadable images, got {json.dumps(content)[:60]}"
        ) from error


def _write(dataset: Dataset, folder: Path, bad: dict[int, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error, 0) from error
    named = [
        {
            "image": dataset.ids[i],
            "file": str(dataset.image_path(i) or dataset.ids[i]),
            "reason": reason,
        }
        for i, reason in bad.items()
    ]
    content = {"images": len(dataset), "left_out": len(bad), "fingerprint": dataset.fingerprint()}
    write_json_atomic(folder / FILE, {**content, "bad": named})


def _tell(dataset: Dataset, folder: Path, bad: dict[int, str]) -> None:
    if not bad:
        return
    print(f"left out {len(bad)} of {len(dataset)} training images: {folder / FILE}")
    for reason in list(bad.values())[:_SHOWN]:
        print(f"  {reason}")
    if len(bad) > _SHOWN:
        print(f"  and {len(bad) - _SHOWN} more")


def _without(dataset: Dataset, bad: dict[int, str]) -> Dataset:
    if not bad:
        return dataset
    return Subset(dataset, [i for i in range(len(dataset)) if i not in bad])
