"""A run folder, opened: its network with the weights asked for, and what it says of itself."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from wsis.config import TrainConfig
from wsis.data.dataset import Dataset, read_json
from wsis.engine.build import build_model
from wsis.engine.checkpoint import CheckpointStore
from wsis.engine.device import pick_device
from wsis.errors import InputError
from wsis.models.network import Network
from wsis.models.weights import load_state, read_state


def load_model(config: TrainConfig, folder: Path, classes: int, weights: str = "last") -> Network:
    """The trained network of a run, in evaluation mode on the run's device, with its threads.

    Args:
        config: the run.
        folder: its folder.
        classes: K foreground classes.
        weights: `last` (the result of training), `best` (highest classification mAP on the val
            labels) or a weights file.

    Raises:
        InputError: no such weights, weights of another architecture, or a class gate asked of a
            network that has no image-level classifier.
    """
    if config.model.head != "rtc" and config.predict.gate:
        raise InputError(
            f"{folder} is a segmentation network ({config.model.head}) without an image-level "
            "classifier: a protocol with a class gate does not go with it"
        )
    if weights == "best":
        store = CheckpointStore(folder / "ckpt")
        path = store.pinned("best")
        if path is None:
            raise InputError(f"{folder} has no checkpoint pinned as best; use --weights last")
        groups, _ = store.load(path)
        # An averaged model carries its counter and the prefix of its wrapper.
        average = groups.get("ema", {})
        state = {k.removeprefix("module."): v for k, v in average.items() if k != "n_averaged"}
        state = state or groups["model"]
    else:
        path = folder / "weights.safetensors" if weights == "last" else Path(weights)
        if weights == "last" and not path.exists():
            raise InputError(f"{folder} holds no finished training; go on with --resume auto")
        state = read_state(path)
    if config.threads:
        torch.set_num_threads(config.threads)
    # The backbone's own pretrained weights would be overwritten at once: do not look for them.
    config.model.weights = "none"
    model = build_model(config.model, classes, supervision=config.supervision)
    load_state(model, state, str(path))
    return model.to(pick_device(config.device)).to(memory_format=torch.channels_last).eval()


def check_segments(config: TrainConfig) -> None:
    """InputError where a run cannot make masks of classes."""
    if config.model.decoder == "object":
        raise InputError(
            "this run was trained to localize (model.decoder object): it has no masks of classes; "
            "score it with wsis evaluate wsol"
        )


def read_about(folder: Path) -> dict[str, Any]:
    """What training wrote about its run: versions, classes, fingerprints."""
    path = folder / "about.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a run folder: it has no {path.name}")
    about = read_json(path)
    if not isinstance(about, dict) or not {"versions", "train", "val"} <= about.keys():
        raise InputError(f"{path}: expected what training writes there; take it from a copy")
    return about


def checkpoint_words(weights: str) -> str:
    """What a protocol says of the weights that `load_model` takes."""
    return {"best": "best on val labels"}.get(weights, weights)


def page_of(config: TrainConfig, folder: Path, scored: Dataset) -> dict[str, Any]:
    """What a report says of the run itself: arguments of `wsis.evaluate.report.write_report`.

    Args:
        config: the run.
        folder: its folder.
        scored: the images that the report is of.

    Raises:
        InputError: the folder lacks what training writes.
    """
    history = []
    if (metrics := folder / "metrics.csv").exists():
        with open(metrics, newline="", encoding="utf-8") as file:
            history = list(csv.DictReader(file))
    about = read_about(folder)
    return {
        "title": folder.name,
        "history": history,
        "config_text": yaml.safe_dump(json.loads(json.dumps(config.as_dict())), sort_keys=False),
        "versions": about["versions"]
        | {
            "train images": _images(**about["train"]),
            "scored images": _images(scored.name, scored.split, len(scored), scored.fingerprint()),
        },
    }


def _images(name: str, split: str, images: int, fingerprint: str, **_: Any) -> str:
    return f"{name} {split}, {images} images, {fingerprint[:12]}"
