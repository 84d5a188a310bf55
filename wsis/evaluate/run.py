"""A trained run folder, or a folder of masks, to numbers and a report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from wsis.config import TrainConfig
from wsis.data.dataset import Dataset, open_dataset
from wsis.data.localization import read_truth
from wsis.engine import distributed
from wsis.engine.build import open_split
from wsis.engine.logs import write_json_atomic
from wsis.engine.quarantine import without_quarantined
from wsis.errors import InputError
from wsis.evaluate.cam_quality import evaluate_cams
from wsis.evaluate.localize import evaluate_run_localization
from wsis.evaluate.localize_report import describe_localization
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.report import (
    LABEL_HINT,
    MASK_HINT,
    make_panels,
    sample_indices,
    write_report,
)
from wsis.evaluate.segmentation import (
    best_and_worst,
    evaluate_folder,
    evaluate_segmentation,
    format_table,
)
from wsis.evaluate.trained import checkpoint_words, load_model, page_of
from wsis.models.network import Network


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

    A run that was trained to localize is scored as by `wsis evaluate wsol` instead, and writes
    `localization.json`, `localization.png` and `report.html`.
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
        page=page_of(config, folder, dataset),
    )
    return f"{describe_localization(result)}\nreport: {out / 'report.html'}"


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
    write_report(
        out / "report.html",
        **page_of(config, folder, dataset),
        summary=_summary(result, quality),
        protocol=result["protocol"],
        scores=result["scores"],
        classes=dataset.classes,
        panels=panels(sample_indices(len(dataset), count)),
        best=panels(best),
        worst=panels(worst),
        mask_ids=dataset.mask_ids,
        curve=result["curve"],
        quality=quality,
        hint=LABEL_HINT if cams else MASK_HINT,
    )
