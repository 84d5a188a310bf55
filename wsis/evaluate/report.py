"""One self-contained HTML page per run: numbers with their protocol, curves, and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from wsis.engine.logs import write_text_atomic
from wsis.errors import MissingExtraError
from wsis.evaluate.conventions import Tally
from wsis.evaluate.protocols import DEFAULT, Protocol
from wsis.offline.cams import make_seeds, pseudo_mask
from wsis.offline.masks import voc_palette
from wsis.offline.predict import predict
from wsis.types import BACKGROUND, IGNORE

try:
    import jinja2
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError(error.name or "jinja2", "train", "the report") from error

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset
    from wsis.models.network import Network
    from wsis.pseudo import PseudoRule

LABEL_HINT = "CAMs and pseudo masks are made with the image's label given, predictions without it."

MASK_HINT = "The network learnt from masks; predictions are made without the image's label."

SIDE = 320
"""Long side of a picture in the report, pixels."""

_NO_CURVE = {"epoch", "step", "lr", "seconds"}
_QUALITY = ("map", "miou", "iou", "accuracy", "top1", "top5")
_PLOT = (3.65, 2.6)  # inches: three plots fit beside each other
_ACCENT = "#2f6f4f"
_INK = "#3a3f44"


@dataclass(frozen=True)
class Panel:
    """Pictures of one image, side by side.

    Attributes:
        title: name of the image.
        note: what to say of it: its classes, its IoU.
        pictures: caption and ``[H, W, 3] uint8`` picture, in order.
    """

    title: str
    note: str
    pictures: tuple[tuple[str, np.ndarray], ...]


def sample_indices(total: int, count: int) -> list[int]:
    """`count` positions spread evenly over a list of `total`: the same ones every time."""
    return sorted({int(i) for i in np.linspace(0, total - 1, num=min(count, total))})


def make_panels(
    model: Network,
    dataset: Dataset,
    indices: Sequence[int],
    *,
    protocol: Protocol = DEFAULT,
    rule: PseudoRule | None = None,
    cams: bool = True,
    device: torch.device | str | None = None,
) -> list[Panel]:
    """Image, CAM, refined CAM, pseudo mask, prediction and ground truth of some images.

    CAMs and pseudo masks are made with the image's label given, the prediction without it.

    Args:
        model: the network, see `wsis.offline.predict.predict`.
        dataset: where the images lie.
        indices: which of them.
        protocol: its scales, flip, base_long, background and gate are used.
        rule: thresholds and refinement of the pseudo masks; RTC's by default.
        cams: False for a segmentation network, which has no CAMs to show.
        device: where the passes run; by default where the network's parameters lie.

    Returns:
        One panel per index.
    """
    colours = class_colours(dataset.mask_ids)
    panels = []
    for index in tqdm(indices, desc="pictures", unit="image", disable=not indices):
        image, label = dataset.image(index), dataset.labels[index]
        mask = predict(model, image, **protocol.prediction(), device=device).mask.numpy()
        note = ", ".join(np.array(dataset.classes)[label > 0]) or "no class"
        pictures = [("image", np.array(image))]
        if cams:
            seeds = make_seeds(model, image, label, **protocol.passes(), device=device)
            pictures.append(("CAM", overlay_heat(image, seeds.cam.numpy())))
            if seeds.refined is not None:
                pictures.append(("refined CAM", overlay_heat(image, seeds.refined.numpy())))
            pseudo = pseudo_mask(seeds.best, image, label, rule)
            pictures.append(("pseudo mask", overlay_mask(image, pseudo, colours)))
        pictures.append(("prediction", overlay_mask(image, mask, colours)))
        if dataset.has_mask(index):
            truth = dataset.mask(index)
            pictures.append(("ground truth", overlay_mask(image, truth, colours)))
            tally = Tally(len(dataset.classes) + 1)
            tally.add(mask, truth, dataset.ids[index])
            if (miou := tally.scores().miou) is not None:
                note = f"{note} · IoU {miou:.1f}"
        panels.append(Panel(dataset.ids[index], note, tuple(pictures)))
    return panels


def class_colours(mask_ids: Sequence[int]) -> np.ndarray:
    """``[256, 3] uint8`` colour of every internal id: that of its file id in VOC's palette."""
    colours = voc_palette()
    colours[1 : len(mask_ids) + 1] = colours[list(mask_ids)]
    return colours


def overlay_heat(image: Image.Image, maps: np.ndarray) -> np.ndarray:
    """The strongest of ``[K, H, W]`` maps in [0, 1] as heat over the greyed image, RGB uint8."""
    heat = maps.max(axis=0).clip(0, 1)
    colour = matplotlib.colormaps["turbo"](heat)[..., :3] * 255
    return _blend(_grey(image), colour, 0.2 + 0.55 * heat)


def overlay_mask(image: Image.Image, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Class ids ``[H, W]`` in their colours over the greyed image; 255 as pale, RGB uint8."""
    strength = np.where(mask == BACKGROUND, 0.0, np.where(mask == IGNORE, 0.75, 0.65))
    return _blend(_grey(image), colours[mask].astype(np.float64), strength)


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    protocol: Mapping[str, Any],
    scores: Mapping[str, Any] | None,
    classes: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    config_text: str,
    versions: Mapping[str, Any],
    panels: Sequence[Panel],
    best: Sequence[Panel] = (),
    worst: Sequence[Panel] = (),
    mask_ids: Sequence[int] | None = None,
    curve: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Any] | None = None,
    localization: Mapping[str, Any] | None = None,
    hint: str = LABEL_HINT,
) -> None:
    """Write the page, whole or not at all. Nothing in it is loaded from elsewhere.

    Args:
        path: the HTML file.
        title: name of the run.
        summary: label -> figure; the first is printed large.
        protocol: ``protocol`` of a result (`Protocol.as_dict`).
        scores: ``scores`` of a result (`SegmentationScores.as_dict`); None where no masks of
            classes were scored.
        classes: the K foreground class names.
        history: rows of metrics.csv, one per epoch; numbers may be text, empty cells are left out.
        config_text: the run's configuration as YAML.
        versions: what ran on what: packages, platform, data fingerprints.
        panels: a fixed sample of images.
        best: the images with the highest IoU.
        worst: the images with the lowest IoU.
        mask_ids: file id of each class, which gives its colour; 1..K by default.
        curve: ``curve`` of `evaluate_segmentation`, or None.
        quality: result of `evaluate_cams`, or None.
        sweep: result of `wsis.evaluate.cam_sweep.sweep_cams`, or None.
        localization: ``columns`` and ``rows``, of a table of name -> figures; or None.
        hint: what to know of the pictures.

    Raises:
        InputError: the disk refuses.
    """
    colours = class_colours(mask_ids or range(1, len(classes) + 1))
    names = ["background", *classes]
    iou_of_classes = scores["iou"] if scores else ()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    page = environment.get_template("report.html.j2").render(
        title=title,
        summary=list(summary.items()),
        protocol=protocol,
        scores=scores,
        rows=[
            {"name": name, "iou": iou, "colour": "#{:02x}{:02x}{:02x}".format(*colour)}
            for name, iou, colour in zip(names, iou_of_classes, colours, strict=False)
        ],
        plots=_history_svgs(history),
        curve=None if curve is None else {**curve, "svg": _curve_svg(curve)},
        quality=quality,
        sweep=None if sweep is None else {**sweep, "svg": _sweep_svg(sweep)},
        localization=localization,
        hint=hint,
        config_text=config_text,
        versions=list(versions.items()),
        sections=[
            (heading, [(p.title, p.note, [(c, _jpeg(a)) for c, a in p.pictures]) for p in group])
            for heading, group in (
                ("A fixed sample", panels),
                ("Best images", best),
                ("Worst images", worst),
            )
            if group
        ],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, page)


def _figure(value: Any, digits: int = 1) -> str:
    """A number for reading; None as a dash, text as it is."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _grey(image: Image.Image) -> np.ndarray:
    """``[H, W, 3] float64`` luminance, lightened so that colours stand out on it."""
    grey = np.array(image.convert("L"), np.float64)
    return np.repeat((60 + 0.7 * grey)[..., None], 3, axis=2)


def _blend(base: np.ndarray, colour: np.ndarray, strength: np.ndarray) -> np.ndarray:
    strength = strength[..., None]
    return ((1 - strength) * base + strength * colour).round().astype(np.uint8)


def _jpeg(pixels: np.ndarray) -> str:
    """Data URI of a picture, its long side reduced to `SIDE`."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _history_svgs(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """One plot of the losses, one of the qualities: text for those who cannot see it, data URI."""
    columns = _columns(history)
    axis = "epoch" if "epoch" in columns else "step"
    lines = {name: values for name, values in columns.items() if name not in _NO_CURVE}
    right = {n: v for n, v in lines.items() if n.lower().endswith(_QUALITY)}
    left = {n: v for n, v in lines.items() if n not in right}
    groups = (("Training losses", "loss", left), ("Validation scores", "%", right))
    plots = []
    x = dict(columns.get(axis, ()))
    for name_of_plot, label, group in groups:
        if not group or not x:
            continue
        figure = Figure(figsize=_PLOT, layout="constrained")
        plot = figure.add_subplot()
        # `total` last: the thick line lies on top.
        for name, points in sorted(group.items(), key=lambda item: item[0] == "total"):
            bold = name == "total" or label == "%"
            plot.plot(
                [x[row] for row, _ in points if row in x],
                [value for row, value in points if row in x],
                label=name,
                linewidth=2.2 if bold else 1.1,
                color=_ACCENT if name == "total" or (bold and len(group) == 1) else None,
                marker="o" if len(points) < 3 else None,
                markersize=3,
            )
        _style(plot, axis, label)
        plot.legend(fontsize=7, frameon=False, ncols=2 if len(group) > 4 else 1)
        plots.append((f"{name_of_plot} over {axis}s", _svg(figure)))
    return plots


def _columns(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Per name the (row, value) pairs that hold a finite number."""
    columns: dict[str, list[tuple[int, float]]] = {}
    for index, row in enumerate(history):
        for name, value in row.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if np.isfinite(number):
                columns.setdefault(name, []).append((index, number))
    return columns


def _curve_svg(curve: Mapping[str, Any]) -> str:
    """Mean IoU over the constant background score."""
    points = [
        (t, v) for t, v in zip(curve["thresholds"], curve["miou"], strict=True) if v is not None
    ]
    figure = Figure(figsize=_PLOT, layout="constrained")
    plot = figure.add_subplot()
    plot.plot(*zip(*points, strict=True), color=_ACCENT, linewidth=2)
    _style(plot, "constant background score", "mean IoU %")
    return _svg(figure)


def _sweep_svg(sweep: Mapping[str, Any]) -> str:
    """Mean IoU over the candidates, a line per power of the walk; points where there is one."""
    figure = Figure(figsize=(1.6 * _PLOT[0], _PLOT[1]), layout="constrained")
    plot = figure.add_subplot()
    candidates, best = sweep["candidates"], sweep["best"]
    for row in sweep["rows"]:
        points = [(x, y) for x, y in zip(candidates, row["miou"], strict=True) if y is not None]
        plain, chosen = row["beta"] is None, row["beta"] == best["beta"]
        plot.plot(
            *(zip(*points, strict=True) if points else ([], [])),
            label="no walk" if plain else f"beta {row['beta']:g}",
            linewidth=2.2 if chosen else 1.1,
            color=_ACCENT if chosen else ("#9aa0a6" if plain else None),
            linestyle="--" if plain and not chosen else "-",
            marker="o" if len(points) < 12 else None,
            markersize=3,
        )
    if best["miou"] is not None:
        plot.plot([best["value"]], [best["miou"]], "o", color=_ACCENT, markersize=6)
    alpha = sweep["candidate"] == "alpha"
    label = "alpha of the background (1 - max)^alpha" if alpha else "constant background score"
    _style(plot, label, "mean IoU %")
    plot.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _style(plot: Any, x: str, y: str) -> None:
    plot.set_xlabel(x, fontsize=8, color=_INK)
    plot.set_ylabel(y, fontsize=8, color=_INK)
    plot.tick_params(labelsize=7, color="#c9cdd1", labelcolor=_INK)
    plot.grid(True, color="#eceef0", linewidth=0.8)
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["left", "bottom"]].set_color("#c9cdd1")
    plot.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    data = io.BytesIO()
    # A fixed salt and no date: the same run gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "wsis"}):
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
