"""Localization scores of stored score maps, whoever made them, and of a trained run.

Images pass one by one: memory does not grow with their number.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wsis.data.localization import Localization, read_truth
from wsis.engine.logs import write_json_atomic
from wsis.errors import InputError
from wsis.evaluate.localization import FIXED, SIZE, mask_truth
from wsis.evaluate.localize_report import draw_maps, write_localization_report
from wsis.evaluate.protocols import Protocol, list_hash
from wsis.evaluate.score_maps import Seen, kinds_of, seed_maps, square_maps
from wsis.evaluate.scorer import Scorer
from wsis.evaluate.sheet import write_grid
from wsis.offline.masks import write_bytes_atomic

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset
    from wsis.models.network import Network

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
    scorer = Scorer(truth, {"maps": fixed}, step=step)
    for name in tqdm(truth.ids, desc="score", unit="map"):
        scorer.add({"maps": _read_scoremap(root / f"{name}.npy")})
    scores = {name: value for name, value in scorer.scores()["maps"].items() if value is not None}
    line = f"stored score maps; thresholds in steps of {step:g}"
    return scores | {"protocol": _protocol(truth, line)}


def evaluate_run_localization(
    model: Network,
    dataset: Dataset,
    *,
    protocol: Protocol,
    out: Path,
    side: int | None = None,
    step: float = 0.001,
    fixed: float = FIXED,
    tuning: Dataset | None = None,
    mask_root: str | Path | None = None,
    save: Path | None = None,
    page: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores of a network's maps of the true class: its CAM, and its refined CAM where it has one.

    A network that was trained to localize has a localization map, too, and is asked for the class.
    Images are those whose boxes are of one class. Maps come from `wsis.evaluate.score_maps`, are
    resized to 224 x 224 (bicubic) and scaled to [0, 1]. Writes ``localization.png`` and, for a
    `page`, ``report.html``.

    Args:
        model: the network.
        dataset: a split in VOC's layout with boxes (masks are scored too where all are there), or
            one with wsolevaluation's metadata.
        protocol: its scales, flip and base_long are used, and its checkpoint named.
        out: folder of the picture and of ``localization.json``.
        side: input size of a network trained to localize; None for others.
        step: between thresholds.
        fixed: threshold of GT-known, Top-1 and Top-5 localization, for maps of every kind.
        tuning: another split, on whose boxes that threshold is chosen for each kind instead.
        mask_root: of the metadata's masks.
        save: where maps are kept: ``<kind>/<image id>.npy`` as `evaluate_scoremaps` reads them.
        page: what the report says of the run (`wsis.evaluate.trained.page_of`); None writes none.

    Returns:
        JSON-ready: ``protocol``; ``cam``, ``refined``, ``localization`` (or None), each
        `BoxTally.scores` and ``PxAP`` (None without masks); ``classification`` (or None).

    Raises:
        InputError: no boxes for any image of the split, or a threshold is to be chosen on it.
    """
    out.mkdir(parents=True, exist_ok=True)
    truth, rows, classes = read_truth(dataset, mask_root)
    kinds = kinds_of(model, localizes=side is not None)
    cuts, chosen = dict.fromkeys(kinds, fixed), f"GT-known at {fixed:g}, fixed beforehand"
    if tuning is not None and truth.masks:
        raise InputError(
            f"{truth.source}: masks are scored by PxAP, which has no threshold to choose on "
            f"'{tuning.split}'"
        )
    if tuning is not None:
        cuts, where = _choose_thresholds(model, dataset, tuning, protocol, side=side, step=step)
        values = ", ".join(f"{kind} {value:g}" for kind, value in cuts.items())
        chosen = f"GT-known at {values}, chosen with the boxes of {where}"

    def mask(n: int) -> NDArray[np.uint8]:
        return _object_mask(dataset.mask(rows[n]), classes[n] + 1)

    masked = not truth.masks and all(map(dataset.has_mask, rows))
    scorer = Scorer(truth, cuts, step=step, masks=mask if masked else None)
    shown = set(np.linspace(0, len(rows) - 1, num=min(_PICTURES, len(rows))).astype(int).tolist())
    kept: dict[int, dict[str, NDArray[Any]]] = {}
    stream = _see(model, dataset, rows, classes, protocol, side)
    for n, seen in enumerate(tqdm(stream, desc="localize", unit="image", total=len(rows))):
        scorer.add(seen.maps, seen.rank)
        if n in shown:
            kept[n] = seen.maps
        if save is not None:
            for kind, scores in seen.maps.items():
                _write_scoremap(save / kind / f"{truth.ids[n]}.npy", scores)
    line = (
        f"maps of the true class; {_passes_line(protocol, side)}; checkpoint "
        f"{protocol.checkpoint}; thresholds in steps of {step:g}"
    )
    line += "" if truth.masks else f"; {chosen}"
    result: dict[str, Any] = {"protocol": _protocol(truth, line)}
    result |= {"refined": None, "localization": None, "classification": scorer.classification()}
    result |= scorer.scores()
    write_json_atomic(out / "localization.json", result)
    panels = draw_maps(dataset, truth, rows, kept, result)
    write_grid(
        out / "localization.png", [[p for _, p in panel.pictures] for panel in panels], tile=256
    )
    if page is not None:
        write_localization_report(out / "report.html", result, dataset, panels, page)
    return result


# ---- scoring -----------------------------------------------------------------------------------


def _see(
    model: Network,
    dataset: Dataset,
    rows: list[int],
    classes: list[int],
    protocol: Protocol,
    side: int | None,
) -> Iterator[Seen]:
    if side is None:
        return seed_maps(model, dataset, rows, classes, protocol.passes())
    return square_maps(model, dataset, rows, classes, side)


def _choose_thresholds(
    model: Network,
    dataset: Dataset,
    tuning: Dataset,
    protocol: Protocol,
    *,
    side: int | None,
    step: float,
) -> tuple[dict[str, float], str]:
    """The best threshold of each kind of map on another split, and what to call that split."""
    if set(tuning.ids) & set(dataset.ids):
        raise InputError(
            f"the threshold cannot be chosen on '{tuning.split}': it shares images with "
            f"'{dataset.split}', which is scored (the best threshold there is MaxBoxAcc's)"
        )
    truth, rows, classes = read_truth(tuning)
    kinds = kinds_of(model, localizes=side is not None)
    scorer = Scorer(truth, dict.fromkeys(kinds, FIXED), step=step)
    stream = _see(model, tuning, rows, classes, protocol, side)
    for seen in tqdm(stream, desc="choose thresholds", unit="image", total=len(rows)):
        scorer.add(seen.maps, seen.rank)
    scorer.flush()
    where = f"{tuning.split}, {len(rows)} images (list {list_hash(truth.ids)})"
    return {kind: tally.best_threshold() for kind, tally in scorer.boxes.items()}, where


def _passes_line(protocol: Protocol, side: int | None) -> str:
    if side is not None:
        return f"one pass, whole image to {side} x {side} (bicubic)"
    scales = " ".join(f"{s:g}" for s in protocol.scales)
    return f"scales {scales}, {'with' if protocol.flip else 'no'} flip, sum"


def _write_scoremap(path: Path, scores: NDArray[np.float64]) -> None:
    data = io.BytesIO()
    np.save(data, scores)
    write_bytes_atomic(path, data.getvalue())


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
