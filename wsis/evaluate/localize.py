"""Localization scores of stored score maps, whoever made them, and of a trained run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from wsis.data.dataset import read_mask
from wsis.data.localization import Localization, read_voc_boxes
from wsis.engine.logs import write_json_atomic
from wsis.errors import InputError
from wsis.evaluate.localization import (
    FIXED,
    SIZE,
    BoxTally,
    PixelTally,
    mask_truth,
    normalize_scores,
    resize_scores,
    scale_boxes,
)
from wsis.evaluate.protocols import Protocol, list_hash
from wsis.evaluate.report import overlay_heat
from wsis.evaluate.sheet import write_grid
from wsis.offline.cams import make_seeds
from wsis.ops.score_boxes import score_boxes

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset
    from wsis.models.rtc import RTC

_CHUNK = 32  # maps handed to the threads at once
_PICTURES = 6


def evaluate_scoremaps(
    folder: str | Path, truth: Localization, *, step: float = 0.001, fixed: float = FIXED
) -> dict[str, Any]:
    """Scores of maps in a folder, as the field's evaluator stores and scores them.

    Args:
        folder: has ``<image id>.npy`` for every image, ``[224, 224]`` float in [0, 1].
        truth: boxes, or masks.
        step: between thresholds; 0.001 in papers, 0.01 on the reference's command line.
        fixed: threshold of GT-known localization.

    Returns:
        JSON-ready: ``protocol``, and `BoxTally.scores`; or ``PxAP`` where the truth is masks.

    Raises:
        InputError: a map is missing or damaged, of another size, or outside [0, 1]; a mask is
            missing.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected <image id>.npy of every image in it")
    maps = (_read_scoremap(root / f"{name}.npy") for name in truth.ids)
    line = f"stored score maps; thresholds in steps of {step:g}"
    progress = tqdm(maps, desc="score", unit="map", total=len(truth.ids))
    result = _score(iter(progress), truth, step=step, fixed=fixed)
    return result | {"protocol": _protocol(truth, line)}


def evaluate_run_localization(
    model: RTC,
    dataset: Dataset,
    *,
    protocol: Protocol,
    out: Path,
    step: float = 0.001,
    fixed: float = FIXED,
) -> dict[str, Any]:
    """Scores of a network's maps of the true class: its CAM, and its refined CAM where it has one.

    Images are those whose boxes are of one class. Maps are made as for seeds at the image's size,
    then resized to 224 x 224 (bicubic) and scaled to [0, 1]. Writes ``localization.png``.

    Args:
        model: the network.
        dataset: a split in VOC's layout, with boxes; masks are scored too where all are there.
        protocol: its scales, flip and base_long are used.
        out: folder of the picture and of ``localization.json``.
        step: between thresholds.
        fixed: threshold of GT-known localization.

    Returns:
        JSON-ready: ``protocol``, ``cam`` and ``refined`` (or None), each `BoxTally.scores` and
        ``PxAP`` (None without masks).

    Raises:
        InputError: no boxes for any image of the split.
    """
    out.mkdir(parents=True, exist_ok=True)
    truth, classes = read_voc_boxes(dataset)
    place = {name: i for i, name in enumerate(dataset.ids)}
    rows = [place[name] for name in truth.ids]
    masks = all(map(dataset.has_mask, rows))
    kinds = ["cam", "refined"] if model.crr is not None else ["cam"]
    maps: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in kinds}
    pixels = {kind: PixelTally(step) for kind in kinds}
    for row, kind in zip(tqdm(rows, desc="score maps", unit="image"), classes, strict=True):
        label = np.zeros(len(dataset.classes), np.uint8)
        label[kind] = 1
        seeds = make_seeds(model, dataset.image(row), label, **protocol.passes())
        for name in kinds:
            seed = seeds.cam if name == "cam" else seeds.refined
            assert seed is not None
            scores = normalize_scores(resize_scores(seed[kind].numpy()))
            maps[name].append(scores.astype(np.float32))
            if masks:
                pixels[name].add(scores, _object_mask(dataset.mask(row), kind + 1))
    flip = "with" if protocol.flip else "no"
    line = (
        f"maps of the true class; scales {' '.join(f'{s:g}' for s in protocol.scales)}, {flip} "
        f"flip, sum; checkpoint {protocol.checkpoint}; thresholds in steps of {step:g}"
    )
    result: dict[str, Any] = {"protocol": _protocol(truth, line), "refined": None}
    for name in kinds:
        result[name] = _score(iter(maps[name]), truth, step=step, fixed=fixed)
        result[name]["PxAP"] = pixels[name].pxap() if masks else None
    write_json_atomic(out / "localization.json", result)
    _draw(out / "localization.png", dataset, truth, rows, maps, result)
    return result


def format_localization(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of name -> scores, as plain text."""
    columns = ("MaxBoxAccV2", "MaxBoxAcc", "GT-known", "PxAP")
    lines = [f"{'':<12}" + "".join(f"{column:>13}" for column in columns)]
    for name, scores in results.items():
        values = (scores.get(column) for column in columns)
        cells = (f"{'-':>13}" if value is None else f"{value:13.2f}" for value in values)
        lines.append(f"{name:<12}" + "".join(cells))
    return "\n".join(lines)


# ---- scoring -----------------------------------------------------------------------------------


def _score(
    maps: Iterator[NDArray[Any]], truth: Localization, *, step: float, fixed: float
) -> dict[str, Any]:
    if truth.masks:
        pixels = PixelTally(step)
        for scores, (masks, ignore) in zip(maps, truth.masks, strict=True):
            left_out = None if ignore is None else read_mask(ignore)
            pixels.add(scores, mask_truth(map(read_mask, masks), left_out))
        return {"images": len(truth.ids), "PxAP": pixels.pxap()}
    boxes = scale_boxes(truth.boxes, truth.sizes[truth.owner])
    tally = BoxTally(step, fixed)
    for start in range(0, len(truth.ids), _CHUNK):
        count = min(_CHUNK, len(truth.ids) - start)
        chunk = np.stack([next(maps) for _ in range(count)])
        mine = (truth.owner >= start) & (truth.owner < start + count)
        tally.add(chunk, boxes[mine], truth.owner[mine] - start)
    return tally.scores()


def _read_scoremap(path: Path) -> NDArray[Any]:
    try:
        scores = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; every image needs its score map") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: expected an array stored by numpy.save, got {error}") from None
    if not isinstance(scores, np.ndarray) or scores.shape != (SIZE, SIZE):
        shape = list(getattr(scores, "shape", []))
        raise InputError(f"{path}: expected a score map [{SIZE}, {SIZE}], got {shape}")
    if scores.dtype.kind != "f" or not (scores.min() >= 0 and scores.max() <= 1):
        raise InputError(
            f"{path}: expected float scores in [0, 1], got {scores.dtype} from {scores.min()} to "
            f"{scores.max()}"
        )
    return scores


def _object_mask(mask: NDArray[np.uint8], class_id: int) -> NDArray[np.uint8]:
    """Truth of PxAP from a class mask: other classes are background, 255 is left out."""
    return mask_truth([mask == class_id], mask == 255)


def _protocol(truth: Localization, line: str) -> dict[str, Any]:
    images = f"{len(truth.ids)} images (list {list_hash(truth.ids)})"
    kind = "masks" if truth.masks else "boxes"
    line = f"{line}; {images}; {kind} of {truth.source}; {SIZE} x {SIZE}"
    return {"images": len(truth.ids), "list_hash": list_hash(truth.ids), "line": line}


# ---- pictures ----------------------------------------------------------------------------------


def _draw(
    path: Path,
    dataset: Dataset,
    truth: Localization,
    rows: list[int],
    maps: Mapping[str, list[NDArray[Any]]],
    result: Mapping[str, Any],
) -> None:
    """A line per image: image, CAM, refined CAM; true boxes green, MaxBoxAcc's box red."""
    lines = []
    for n in np.linspace(0, len(rows) - 1, num=min(_PICTURES, len(rows))).astype(int):
        image = dataset.image(rows[n])
        true = truth.boxes[truth.owner == n]
        line = [_boxed(np.array(image), true, "lime")]
        for kind, scores in maps.items():
            at = result[kind]["MaxBoxAcc by overlap"]["0.5"]["threshold"]
            found = score_boxes(scores[n], at, "largest") * np.tile(image.size, 2) / SIZE
            large = np.array(Image.fromarray(scores[n]).resize(image.size))
            heat = _boxed(overlay_heat(image, large[None]), true, "lime")
            line.append(_boxed(heat, found, "red"))
        lines.append(line)
    write_grid(path, lines, tile=256)


def _boxed(pixels: NDArray[np.uint8], boxes: NDArray[Any], colour: str) -> NDArray[np.uint8]:
    picture = Image.fromarray(pixels)
    for box in boxes.tolist():
        ImageDraw.Draw(picture).rectangle(box, outline=colour, width=3)
    return np.array(picture)
