"""A trained run folder to numbers, report and masks: what the commands call."""

from __future__ import annotations

import csv
import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from PIL import Image
from tqdm import tqdm

from wsis.config import TrainConfig
from wsis.data.dataset import Dataset, open_dataset, read_image, read_json
from wsis.data.localization import read_truth
from wsis.engine import distributed
from wsis.engine.build import build_model, open_split
from wsis.engine.checkpoint import CheckpointStore
from wsis.engine.device import pick_device
from wsis.engine.logs import write_json_atomic
from wsis.engine.quarantine import without_quarantined
from wsis.errors import InputError
from wsis.evaluate.cam_quality import evaluate_cams
from wsis.evaluate.localize import describe_localization, evaluate_run_localization
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.report import (
    LABEL_HINT,
    MASK_HINT,
    class_colours,
    make_panels,
    overlay_mask,
    sample_indices,
    write_report,
)
from wsis.evaluate.segmentation import (
    best_and_worst,
    evaluate_folder,
    evaluate_segmentation,
    format_table,
)
from wsis.models.network import Network
from wsis.models.weights import load_state, read_state
from wsis.offline.export import Source, export_pseudo_masks
from wsis.offline.masks import write_mask, write_picture
from wsis.offline.predict import Pass, conclude
from wsis.offline.stream import stream_passes

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


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


def evaluate_run(
    config: TrainConfig,
    folder: Path,
    *,
    weights: str = "last",
    out: Path | None = None,
    background_choice: str = "",
    protocol: str = "",
) -> str:
    """Score a trained run on its val split, its CAMs on its training split; write all of it down.

    Processes of one `wsis.engine.distributed.session` share the images out; the first one writes
    what one process alone would write, the others return an empty text.

    A run that was trained to localize is scored as by `wsis evaluate wsol` instead.
    Writes `metrics.json`, `report.html` and `masks/` (palette PNGs). Numbers that need ground truth
    are left out where there is none.

    Args:
        config: the run, with the split and the inference to use.
        folder: the run's folder.
        weights: `last`, `best` or a weights file.
        out: where to write; the run's folder by default.
        background_choice: who chose the background score, where it was not the run.
        protocol: name of the protocol that was asked for (`wsis.evaluate.named`); the numbers say
            in what the configuration departs from it.

    Returns:
        The table and where the report lies, as text for a terminal.
    """
    out = folder if out is None else out
    if config.model.decoder == "object":
        return _localize(config, folder, weights, out) if distributed.is_main() else ""
    val_set = open_split(config.data, config.data.val_split)
    train_set = open_split(config.data, config.data.train_split)
    if config.data.on_error == "skip":
        train_set = without_quarantined(train_set, folder)
    model = load_model(config, folder, len(val_set.classes), weights)
    how = Protocol(
        **asdict(config.predict),
        background_choice=background_choice or _choice(config),
        checkpoint=checkpoint_words(weights),
        name=protocol,
    )
    inputs: dict[str, Any] = {"loader": config.data.loader, "workers": config.data.workers}
    result = evaluate_segmentation(model, val_set, protocol=how, out=out / "masks", **inputs)
    quality = None
    known = any(map(train_set.has_mask, range(len(train_set))))
    if config.supervision == "labels" and config.quality_images and known:
        limit = None if config.quality_images < 0 else config.quality_images
        quality = evaluate_cams(
            model, train_set, protocol=how, limit=limit, rule=config.pseudo, **inputs
        )
    if not distributed.is_main():
        return ""
    write_json_atomic(out / "metrics.json", result | {"cams": quality})
    _report(config, folder, out, model, val_set, how, result, quality)
    table = [format_table(val_set.classes, result["scores"])]
    if not result["images"]:
        table = [f"no ground truth for '{val_set.split}': masks were predicted, not scored"]
    return "\n".join(
        [
            *table,
            *(f"{name}: {value}" for name, value in _summary(result, quality).items()),
            f"protocol: {result['protocol']['line']}",
            f"report: {out / 'report.html'}",
        ]
    )


def evaluate_masks(
    masks: Path,
    *,
    dataset: str,
    root: str | None,
    split: str,
    convention: str,
    unsure: Literal["wrong", "ignored"] | None = None,
    workers: int = 2,
    protocol: str = "",
    out: Path | None = None,
) -> str:
    """Score a folder of mask PNGs, whoever wrote them; returns the table as text.

    `unsure` says what a stored 255 means; None leaves it to the convention. `protocol` is the name
    of the one whose list and convention were asked for. `metrics.json` is written into `out`, where
    it is given.
    """
    truth = open_dataset(dataset, root, split)
    result = evaluate_folder(
        masks, truth, convention=convention, unsure=unsure, name=protocol, workers=workers
    )
    if out is not None and distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(out / "metrics.json", result)
    table = format_table(truth.classes, result["scores"])
    return f"{table}\nprotocol: {result['protocol']['line']}"


def predict_files(
    config: TrainConfig, folder: Path, source: Path, out: Path, *, weights: str, overlay: bool
) -> int:
    """Masks of one image or of a folder of images; returns how many were written.

    Each mask is a palette PNG `<stem>.png` of the image's size that holds the data set's file
    ids; with `overlay` also `<stem>.overlay.jpg`. The training data is not needed.

    Raises:
        InputError: no image there, one that cannot be read, or a mask that would overwrite one.
    """
    if source.is_dir():
        files = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    else:
        files = [source]
    if not files or not files[0].exists():
        raise InputError(f"{source}: expected an image or a folder of images, found none")
    check_segments(config)
    masks = _targets(files, out)
    mask_ids = read_about(folder)["val"]["mask_ids"]
    model = load_model(config, folder, len(mask_ids), weights)
    protocol = Protocol(**asdict(config.predict))
    colours = class_colours(mask_ids)
    settings = protocol.conclusion()

    def write(i: int, image: Image.Image, passes: list[Pass], _: None) -> None:
        mask = conclude(passes, image, **settings).mask.numpy()
        write_mask(masks[i], mask, mask_ids)
        if overlay:
            picture = Image.fromarray(overlay_mask(image, mask, colours))
            write_picture(masks[i].with_suffix(".overlay.jpg"), picture)

    writing = stream_passes(
        model,
        _Files(files),
        range(len(files)),
        write,
        **protocol.passes(),
        decode=True,
        loader=config.data.loader,
        workers=config.data.workers,
    )
    with closing(writing):
        return sum(1 for _ in tqdm(writing, total=len(files), desc="predict", unit="image"))


class _Files:
    """Image files, read like a data set."""

    def __init__(self, files: list[Path]) -> None:
        self.ids = [file.stem for file in files]
        self.image_path, self.image = files.__getitem__, lambda i: read_image(files[i])


def make_pseudo_masks(
    config: TrainConfig, folder: Path, out: Path, *, source: Source, crf: str, weights: str
) -> tuple[int, int]:
    """Pseudo masks of a run's training split, its image-level labels given.

    Returns:
        How many were written, and how many were there; see `export_pseudo_masks`.

    Raises:
        InputError: CAMs of a network that has none, masks of a decoder that knows only objects, or
            as `export_pseudo_masks`.
    """
    if source == "cam" and config.model.head != "rtc":
        raise InputError(
            f"{folder} is a segmentation network ({config.model.head}) without CAMs; give "
            "--pseudo decoder"
        )
    if source == "decoder":
        check_segments(config)
    dataset = open_split(config.data, config.data.train_split)
    if config.data.on_error == "skip":
        dataset = without_quarantined(dataset, folder)
    return export_pseudo_masks(
        load_model(config, folder, len(dataset.classes), weights),
        dataset,
        out,
        source=source,
        rule=config.pseudo,
        prediction=Protocol(**asdict(config.predict)).prediction(),
        crf=crf,
        about={"run": folder.name, "checkpoint": weights},
        loader=config.data.loader,
        workers=config.data.workers,
    )


def _targets(files: list[Path], out: Path) -> list[Path]:
    """Where the masks go; InputError where one would overwrite a photograph or another mask."""
    targets: dict[Path, Path] = {}
    inputs = {file.resolve() for file in files}
    for file in files:
        target = (out / f"{file.stem}.png").resolve()
        if target in inputs:
            raise InputError(f"{target} is one of the images; choose another --out")
        if target in targets:
            raise InputError(f"{targets[target]} and {file} would both become {target.name}")
        targets[target] = file
    return list(targets)


def check_segments(config: TrainConfig) -> None:
    """InputError where a run cannot make masks of classes."""
    if config.model.decoder == "object":
        raise InputError(
            "this run was trained to localize (model.decoder object): it has no masks of classes; "
            "score it with wsis evaluate wsol"
        )


def _localize(config: TrainConfig, folder: Path, weights: str, out: Path) -> str:
    """Localization scores on the val split as text, or why there are none."""
    dataset = open_split(config.data, config.data.val_split)
    try:
        read_truth(dataset)
    except InputError as error:
        return f"localization on '{dataset.split}' was not scored: {error}"
    result = evaluate_run_localization(
        load_model(config, folder, len(dataset.classes), weights),
        dataset,
        protocol=Protocol(**asdict(config.predict), checkpoint=weights),
        out=out,
        side=config.data.crop,
    )
    return f"{describe_localization(result)}\nfigures and pictures: {out}"


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


def _choice(config: TrainConfig) -> str:
    """Who chose the background score; the official 0.17 names its own origin."""
    return "" if config.predict.background == 0.17 else "set in the run's configuration"


def _summary(result: dict[str, Any], quality: dict[str, Any] | None) -> dict[str, str]:
    """Label -> figure, the headline first."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    summary = {"mean IoU": number(result["scores"]["miou"])}
    summary["classification mAP"] = number(result["classification"]["map"])
    if quality is not None:
        for name, seed in (("CAM", quality["cam"]), ("refined CAM", quality["refined"])):
            if seed is not None:
                best, at = number(seed["best_miou"]), seed["best_threshold"]
                summary[f"{name} seed, train"] = f"{best} (background {at:g}, {seed['note']})"
        pseudo = quality["pseudo"]
        summary["pseudo masks, train"] = (
            f"{number(pseudo['ignored']['miou'])} (255 ignored), "
            f"{number(pseudo['wrong']['miou'])} (255 wrong), "
            f"covering {number(pseudo['coverage'])} %"
        )
    return summary


def _report(
    config: TrainConfig,
    folder: Path,
    out: Path,
    model: Network,
    dataset: Dataset,
    protocol: Protocol,
    result: dict[str, Any],
    quality: dict[str, Any] | None,
) -> None:
    cams = config.model.head == "rtc"

    def panels(indices: list[int]) -> list:
        return make_panels(
            model, dataset, indices, protocol=protocol, rule=config.pseudo, cams=cams
        )

    count = config.report_images
    best, worst = best_and_worst(result["images"], max(1, count // 2) if count else 0)
    history = []
    if (metrics := folder / "metrics.csv").exists():
        with open(metrics, newline="", encoding="utf-8") as file:
            history = list(csv.DictReader(file))
    about = read_about(folder)
    write_report(
        out / "report.html",
        title=folder.name,
        summary=_summary(result, quality),
        protocol=result["protocol"],
        scores=result["scores"],
        classes=dataset.classes,
        history=history,
        config_text=yaml.safe_dump(json.loads(json.dumps(config.as_dict())), sort_keys=False),
        versions=about["versions"]
        | {
            "train images": _images(**about["train"]),
            "scored images": _images(
                dataset.name, dataset.split, len(dataset), dataset.fingerprint()
            ),
        },
        panels=panels(sample_indices(len(dataset), count)),
        best=panels(best),
        worst=panels(worst),
        mask_ids=dataset.mask_ids,
        curve=result["curve"],
        quality=quality,
        hint=LABEL_HINT if cams else MASK_HINT,
    )


def _images(name: str, split: str, images: int, fingerprint: str, **_: Any) -> str:
    return f"{name} {split}, {images} images, {fingerprint[:12]}"
