"""What a run is: the hash by which a resumed one is known, and what its folder tells a reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from wsis.config import TrainConfig
from wsis.data.dataset import Dataset
from wsis.engine import distributed
from wsis.engine.logs import versions, write_json_atomic, write_text_atomic
from wsis.engine.quarantine import about as quarantine_of


def identity(config: TrainConfig, dataset: Dataset) -> str:
    """Hash of everything that a checkpoint depends on; a resumed run must have the same.

    Device, loader and compiler are not in it: they change no more than rounding. Nor are places:
    labels and the values of pseudo masks are in the fingerprint, which images that were left out
    change too.
    """
    relevant = config.as_dict()
    for free in ("threads", "device", "report_images", "quality_images", "predict", "save_every"):
        relevant.pop(free)
    for free in ("workers", "root", "labels", "loader", "on_error", "masks", "cache", "cache_gb"):
        relevant["data"].pop(free)
    relevant["optim"].pop("compile")
    relevant["fingerprint"] = dataset.fingerprint()
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def describe(
    config: TrainConfig, folder: Path, *, train: Dataset, val: Dataset, about: Mapping[str, Any]
) -> None:
    """Store what a reader of the folder needs: configuration, versions, data fingerprint.

    Args:
        config: the run, for `config.yaml`.
        folder: of the run.
        train: the training images.
        val: the held-out images.
        about: anything else for `about.json`.
    """
    text = yaml.safe_dump(json.loads(json.dumps(config.as_dict())), sort_keys=False)
    write_text_atomic(folder / "config.yaml", text)
    content = {
        "versions": versions(),
        "identity": identity(config, train),
        "train": _about(train),
        "val": _about(val),
        "world_size": distributed.world_size(),
        **about,
        "on_error": config.data.on_error,
    }
    if config.data.on_error == "skip":
        content["quarantine"] = quarantine_of(folder)
    write_json_atomic(folder / "about.json", content)


def processes_before(folder: Path) -> int | None:
    """How many processes trained the run that is resumed, where its folder says so."""
    try:
        return json.loads((folder / "about.json").read_text())["world_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _about(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "split": dataset.split,
        "images": len(dataset),
        "classes": list(dataset.classes),
        "mask_ids": list(dataset.mask_ids),
        "fingerprint": dataset.fingerprint(),
    }
