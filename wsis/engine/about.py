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
from wsis.errors import InputError

# What changes no more than rounding, or nothing that is trained. Nor do places matter: labels and
# the values of pseudo masks are in the fingerprint, which images that were left out change too.
_FREE = frozenset(
    ("threads", "device", "report_images", "quality_images", "save_every", "optim.compile")
) | {
    f"data.{name}"
    for name in ("workers", "root", "labels", "loader", "on_error", "masks", "cache", "cache_gb")
}


def identity(config: TrainConfig, dataset: Dataset) -> str:
    """Hash of everything that a checkpoint depends on.

    Fields at their default are not in it, so that a field that comes with a later version changes
    no hash.
    """
    defaults = _relevant(TrainConfig().as_dict())
    relevant: dict[str, Any] = {
        name: value
        for name, value in _relevant(config.as_dict()).items()
        if value != defaults[name]
    }
    return _hash({**relevant, "fingerprint": dataset.fingerprint()})


def origin(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says of its run: ``identity``, ``config``, ``fingerprint``."""
    return {
        "identity": identity(config, dataset),
        "config": _relevant(config.as_dict()),
        "fingerprint": dataset.fingerprint(),
    }


def check_origin(
    state: Mapping[str, Any], config: TrainConfig, dataset: Dataset, folder: Path, path: Path
) -> bool:
    """Whether a checkpoint says of which run it is; one of another run is refused.

    Checkpoints before wsis stored `origin` in them hold a hash of the whole configuration; with
    them the run folder's `config.yaml` says what it was.

    Args:
        state: of the checkpoint.
        config: the run as it shall go on.
        dataset: its training images.
        folder: of the run.
        path: the checkpoint, for messages.

    Returns:
        False for such an older checkpoint of this run, which had better be written anew.

    Raises:
        InputError: the checkpoint's run differs; the message names the fields.
    """
    told, now = "config" in state, _relevant(config.as_dict())
    changes = []
    if told:
        changes = _changes(state["config"], now)
        same_data = state["fingerprint"] == dataset.fingerprint()
    elif not (same_data := state["identity"] == _whole_identity(now, dataset)):
        then = _stored(folder)
        changes = _changes(then, now) if then else [f"{folder / 'config.yaml'} cannot be read"]
        same_data = not then or state["identity"] == _whole_identity(then, dataset)
    if not same_data:
        changes.append("the training images, their labels or masks are not the same")
    if changes:
        raise InputError(
            f"{path} belongs to a run with another configuration, data set or masks: "
            f"{'; '.join(changes)}. Resume with the configuration in {folder / 'config.yaml'}, or "
            "choose another --out"
        )
    return told


def _stored(folder: Path) -> dict[str, Any]:
    """What a run folder's `config.yaml` says; nothing where there is none that can be read."""
    try:
        return _relevant(yaml.safe_load((folder / "config.yaml").read_text()))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Field by field; one that is new must have its default, which is what was done before it."""
    before = {**_relevant(TrainConfig().as_dict()), **then}
    gone = object()
    return [
        f"{name} was {json.dumps(value)}, "
        + ("is no field any more" if name not in now else f"is {json.dumps(now[name])}")
        for name, value in before.items()
        if now.get(name, gone) != value
    ]


def _relevant(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name with dots -> value as JSON has it, of all that matters for training."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + key
        if name == "predict" or name in _FREE:
            continue
        if isinstance(value, Mapping):
            flat |= _relevant(value, f"{name}.")
        else:
            flat[name] = json.loads(json.dumps(value))
    return flat


def _whole_identity(relevant: Mapping[str, Any], dataset: Dataset) -> str:
    """The hash in checkpoints without `origin`: of every field, nested."""
    nested: dict[str, Any] = {}
    for name, value in relevant.items():
        *rooms, last = name.split(".")
        place = nested
        for room in rooms:
            place = place.setdefault(room, {})
        place[last] = value
    return _hash({**nested, "fingerprint": dataset.fingerprint()})


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
