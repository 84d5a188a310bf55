"""Localization for readers: a table, pictures with boxes, and the page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsis.data.localization import Localization
from wsis.evaluate.localization import SIZE
from wsis.evaluate.report import Panel, overlay_heat, write_report
from wsis.ops.score_boxes import score_boxes

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset

KINDS = {"cam": "CAM", "refined": "refined CAM", "localization": "localization map"}
"""Kinds of maps by the names that readers know."""

COLUMNS = ("MaxBoxAccV2", "MaxBoxAcc", "GT-known", "Top-1 Loc", "Top-5 Loc", "PxAP")

HINT = (
    "Maps of the true class; true boxes green, the box at MaxBoxAcc's threshold (the best one for "
    "the images that were scored) red."
)

MASKED_HINT = "Maps of the true class; masks are scored by PxAP, which has no threshold and no box."


def describe_localization(result: Mapping[str, Any]) -> str:
    """What `evaluate_run_localization` found, as text for a terminal."""
    return "\n".join(
        [
            format_localization(_rows(result)),
            *(f"{name}: {value:.2f}" for name, value in (result["classification"] or {}).items()),
            f"protocol: {result['protocol']['line']}",
        ]
    )


def format_localization(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of name -> scores, as plain text."""
    lines = [f"{'':<17}" + "".join(f"{column:>13}" for column in COLUMNS)]
    for name, scores in results.items():
        values = (scores.get(column) for column in COLUMNS)
        cells = (f"{'-':>13}" if value is None else f"{value:13.2f}" for value in values)
        lines.append(f"{name:<17}" + "".join(cells))
    return "\n".join(lines)


def draw_maps(
    dataset: Dataset,
    truth: Localization,
    rows: Sequence[int],
    kept: Mapping[int, Mapping[str, NDArray[Any]]],
    result: Mapping[str, Any],
) -> list[Panel]:
    """Images and their maps; true boxes green, MaxBoxAcc's box red.

    Args:
        dataset: the images.
        truth: boxes, or masks, which are not drawn.
        rows: position in the data set of each image of `truth`.
        kept: per position in `truth` its maps by kind, ``[224, 224]`` in [0, 1].
        result: of `evaluate_run_localization`, for the thresholds.

    Returns:
        One panel per image of `kept`.
    """
    panels = []
    for n, maps in kept.items():
        image = dataset.image(rows[n])
        true = truth.boxes[truth.owner == n]
        pictures = [("image", _boxed(np.array(image), true, "lime"))]
        for kind, scores in maps.items():
            large = np.array(Image.fromarray(scores.astype(np.float32)).resize(image.size))
            heat = _boxed(overlay_heat(image, large[None]), true, "lime")
            if not truth.masks:
                at = result[kind]["MaxBoxAcc by overlap"]["0.5"]["threshold"]
                found = score_boxes(scores, at, "largest") * np.tile(image.size, 2) / SIZE
                heat = _boxed(heat, found, "red")
            pictures.append((KINDS[kind], heat))
        names = np.array(dataset.classes)[dataset.labels[rows[n]] > 0]
        panels.append(Panel(dataset.ids[rows[n]], ", ".join(names), tuple(pictures)))
    return panels


def write_localization_report(
    path: Path,
    result: Mapping[str, Any],
    dataset: Dataset,
    panels: Sequence[Panel],
    page: Mapping[str, Any],
) -> None:
    """The page of a run that was scored by its boxes.

    Args:
        path: the HTML file.
        result: of `evaluate_run_localization`.
        dataset: the images.
        panels: of `draw_maps`.
        page: ``title``, ``history``, ``config_text`` and ``versions``, see `write_report`.

    Raises:
        InputError: the disk refuses.
    """
    rows = _rows(result)
    name, scores = list(rows.items())[-1]  # of the maps that the method is for
    found = {c: f"{scores[c]:.2f}" for c in COLUMNS if scores.get(c) is not None}
    summary = {f"{column}, {name}": value for column, value in found.items()}
    classification = (result["classification"] or {}).items()
    boxed = any(scores.get("MaxBoxAcc") is not None for scores in rows.values())
    write_report(
        path,
        **page,
        summary=summary | {label: f"{value:.2f}" for label, value in classification},
        protocol=result["protocol"],
        scores=None,
        classes=dataset.classes,
        panels=panels,
        localization={
            "columns": COLUMNS,
            "rows": [(k, [scores.get(column) for column in COLUMNS]) for k, scores in rows.items()],
        },
        hint=HINT if boxed else MASKED_HINT,
    )


def _rows(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: result[kind] for kind, name in KINDS.items() if result[kind] is not None}


def _boxed(pixels: NDArray[np.uint8], boxes: NDArray[Any], colour: str) -> NDArray[np.uint8]:
    picture = Image.fromarray(pixels)
    for box in boxes.tolist():
        ImageDraw.Draw(picture).rectangle(box, outline=colour, width=3)
    return np.array(picture)
