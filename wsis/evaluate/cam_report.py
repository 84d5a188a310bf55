"""A sweep over stored CAMs: figures, table, pictures and page in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from wsis.engine import distributed
from wsis.engine.logs import versions, write_json_atomic
from wsis.evaluate.cam_candidates import Sweep
from wsis.evaluate.cam_sweep import Case, StoredCams, sweep_cams
from wsis.evaluate.conventions import Tally
from wsis.evaluate.report import (
    Panel,
    class_colours,
    overlay_heat,
    overlay_mask,
    sample_indices,
    write_report,
)
from wsis.evaluate.segmentation import format_table
from wsis.offline.refine_folder import operator_device
from wsis.offline.spread import scaled

if TYPE_CHECKING:
    from PIL import Image

    from wsis.data.dataset import Dataset

PICTURES = 8
"""Images in the report, spread evenly over those scored."""


def evaluate_cams_folder(
    maps: str | Path,
    dataset: Dataset,
    how: Sweep,
    out: str | Path,
    *,
    convention: str = "voc",
    protocol: str = "",
    limit: int | None = None,
    device: str = "auto",
    pictures: int = PICTURES,
) -> str:
    """Score stored CAMs under every candidate and write `metrics.json` and `report.html`.

    Args:
        maps: folder with a file of CAMs for every image.
        dataset: images, image-level labels and masks.
        how: the candidates.
        out: folder for both files.
        convention: name of the mean IoU convention.
        protocol: name of the protocol of CAMs that was asked for (`wsis.evaluate.named`).
        limit: only so many images, spread evenly over the list.
        device: where to walk.
        pictures: images in the report.

    Returns:
        The tables, the best candidate and where the report lies, as text for a terminal; empty in
        all processes but the first, which writes.

    Raises:
        InputError: as `wsis.evaluate.cam_sweep.sweep_cams`.
    """
    out = Path(out)
    cams = StoredCams(maps, dataset, how, limit=limit, device=operator_device(device))
    result = sweep_cams(cams, convention=convention, protocol=protocol)
    if not distributed.is_main():
        return ""
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "metrics.json", result)
    sample = [cams.indices[k] for k in sample_indices(len(cams.indices), pictures)]
    settings = {
        "maps": str(maps),
        "guides": None if how.guides is None else [how.guides.kind, str(how.guides.folder)],
        "betas": list(how.betas),
        "backgrounds": [round(float(value), 4) for value in how.backgrounds],
        "alphas": list(how.alphas),
        "radius": how.radius,
        "log_steps": how.log_steps,
    }
    write_report(
        out / "report.html",
        title=f"CAMs of {maps}",
        summary=_summary(result),
        protocol=result["protocol"],
        scores=result["scores"],
        classes=dataset.classes,
        history=(),
        config_text=yaml.safe_dump(settings, sort_keys=False),
        versions={**versions(), "data": dataset.fingerprint()[:12]},
        panels=_panels(cams, result, sample),
        mask_ids=dataset.mask_ids,
        sweep=result,
        hint="CAMs of the image's classes, before and after the walk; the mask is the best "
        "candidate's.",
    )
    return "\n".join(
        [
            format_table(dataset.classes, result["scores"]),
            "",
            format_sweep(result),
            "",
            *(f"{name}: {value}" for name, value in _summary(result).items()),
            f"protocol: {result['protocol']['line']}",
            f"report: {out / 'report.html'}",
        ]
    )


def format_sweep(result: dict[str, Any]) -> str:
    """The best candidate of every power as aligned plain text."""
    name = result["candidate"]
    lines = [f"{'beta':<8}  {'best ' + name:>15}  mean IoU %"]
    for row in result["rows"]:
        beta = "no walk" if row["beta"] is None else f"{row['beta']:g}"
        miou = "-" if row["best_miou"] is None else f"{row['best_miou']:.2f}"
        lines.append(f"{beta:<8}  {row['best']:>15g}  {miou:>10}")
    return "\n".join(lines)


def _summary(result: dict[str, Any]) -> dict[str, str]:
    best, plain = result["best"], result["rows"][0]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    name = result["candidate"]
    walk = "" if best["beta"] is None else f"beta {best['beta']:g}, "
    summary = {
        "mean IoU": number(best["miou"]),
        "best candidate": f"{walk}{name} {best['value']:g} ({best['chosen']})",
    }
    if best["beta"] is not None:
        better = best["miou"] is not None and plain["best_miou"] > best["miou"]
        summary["CAMs without the walk"] = (
            f"{number(plain['best_miou'])} ({name} {plain['best']:g})"
            f"{': better than any walk' if better else ''}"
        )
    if ends := at_ends(result):
        summary["at an end of what was tried"] = f"{', '.join(ends)}: try further"
    return summary


def at_ends(result: dict[str, Any]) -> list[str]:
    """What of the best candidate is the first or last of several: the best may lie beyond."""
    betas = [row["beta"] for row in result["rows"] if row["beta"] is not None]
    tried = {"beta": (betas, "beta"), result["candidate"]: (result["candidates"], "value")}
    return [
        f"{name} {result['best'][key]:g}"
        for name, (values, key) in tried.items()
        if len(values) > 1 and result["best"][key] in (values[0], values[-1])
    ]


def _panels(cams: StoredCams, result: dict[str, Any], indices: list[int]) -> list[Panel]:
    dataset = cams.dataset
    colours = class_colours(dataset.mask_ids)
    beta, value = result["best"]["beta"], result["best"]["value"]
    panels = []
    for index in tqdm(indices, desc="pictures", unit="image", disable=not indices):
        case = cams.read(index)
        image, truth = dataset.image(index), dataset.mask(index)
        pictures = [("image", np.array(image)), ("CAM", _heat(image, case, None))]
        if beta is not None:
            pictures.append(("after the walk", _heat(image, case, beta)))
        mask = case.mask(beta, value)
        pictures.append(("mask", overlay_mask(image, mask, colours)))
        pictures.append(("ground truth", overlay_mask(image, truth, colours)))
        tally = Tally(len(dataset.classes) + 1)
        tally.add(mask, truth, dataset.ids[index])
        note = ", ".join(np.array(dataset.classes)[dataset.labels[index] > 0]) or "no class"
        if (miou := tally.scores().miou) is not None:
            note = f"{note} · IoU {miou:.1f}"
        panels.append(Panel(dataset.ids[index], note, tuple(pictures)))
    return panels


def _heat(image: Image.Image, case: Case, beta: float | None) -> np.ndarray:
    """The strongest map as heat, brightest where it is largest."""
    maps = case.planes(beta)[1]
    maps = maps if len(maps) else torch.zeros(1, *case.size)
    return overlay_heat(image, scaled(maps).cpu().numpy())
