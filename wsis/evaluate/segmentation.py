"""Mean IoU of a network or of stored masks, image by image, at the original resolution."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from wsis.data.threads import in_threads
from wsis.engine import distributed
from wsis.errors import InputError
from wsis.evaluate.classification import ClassificationTally
from wsis.evaluate.conventions import Tally, Unsure, scores
from wsis.evaluate.protocols import DEFAULT, Protocol
from wsis.offline.masks import read_mask, write_mask
from wsis.offline.predict import Pass, conclude
from wsis.offline.stream import stream_passes
from wsis.ops.confusion import threshold_curve
from wsis.types import IGNORE

if TYPE_CHECKING:
    from PIL import Image

    from wsis.data.dataset import Dataset
    from wsis.models.network import Network

T = TypeVar("T")

THRESHOLDS = np.arange(60) / 100
"""Background scores of the sweep, 0 to 0.59 (ChunyanWang1/RTC eval.py)."""

WITH_TRUTH = "chosen with ground truth: not a result"


def evaluate_segmentation(
    model: Network,
    dataset: Dataset,
    *,
    protocol: Protocol = DEFAULT,
    out: str | Path | None = None,
    limit: int | None = None,
    device: torch.device | str | None = None,
    loader: str = "torch",
    workers: int = 2,
) -> dict[str, Any]:
    """Predict the images of a data set without their labels and score the masks.

    Reading, passes, and refinement, scoring and writing go on at the same time, see
    `wsis.offline.stream`; memory grows by a few numbers per image only. Processes that torchrun
    started share the images out and all return the same: what one process alone returns.

    Images without ground truth are left out; where none has any, all are predicted, and the scores
    of masks are None.

    Args:
        model: the network, see `wsis.offline.predict.predict`.
        dataset: images, labels (for classification mAP only) and masks.
        protocol: scales, flip, background, gate, base_long, crf and convention to use, and what
            else is to be said of the numbers; the data set's part is filled in here. A CRF works on
            each image as it comes; nothing is stored for it.
        out: folder for the predicted masks as palette PNGs ``<id>.png``; None writes none.
        limit: only so many images, spread evenly over the list.
        device: where the passes run; by default where the network's parameters lie.
        loader: what decodes and resizes the images: `torch`, `dali` or `auto`.
        workers: threads that read, and as many that refine, score and write; 0 has none.

    Returns:
        JSON-ready: ``protocol``; ``scores`` (`SegmentationScores.as_dict`); ``confusion``
        ``[C][C]``; ``curve``: mean IoU over background scores, marked as chosen with ground truth
        (None where the background has no constant score);
        ``classification``: mAP of the image-level probabilities; ``images``: mean IoU of each.

    Raises:
        InputError: a mask is missing, or has another size than its image.
    """
    scored = any(map(dataset.has_mask, range(len(dataset))))
    indices = images_to_score(dataset, limit) if scored else list(range(len(dataset)))
    size = len(dataset.classes) + 1
    protocol = protocol.on(dataset, indices)
    settings = protocol.conclusion()
    swept = scored and protocol.background_power is None
    tally = Tally(size, protocol.convention)
    curve = Curve(size)

    def score(
        index: int, image: Image.Image, passes: list[Pass], truth: np.ndarray | None
    ) -> tuple[int, np.ndarray | None, np.ndarray]:
        prediction = conclude(passes, image, **settings)
        mask, counts, name = prediction.mask.numpy(), None, dataset.ids[index]
        if truth is not None:
            counts = tally.count(mask, truth, name)
            if swept:
                curve.add(prediction.scores.numpy(), truth)
        if out is not None:
            write_mask(Path(out) / f"{name}.png", mask, dataset.mask_ids)
        return index, counts, prediction.class_probs.numpy()

    classification = ClassificationTally(dataset.classes)
    images = []
    scoring = stream_passes(
        model,
        dataset,
        distributed.share(indices),
        score,
        **protocol.passes(),
        decode=True,
        beside=dataset.mask if scored else None,
        loader=loader,
        workers=workers,
        device=device,
    )
    with closing(scoring):
        for index, counts, probs in with_bar(scoring, len(indices), "predict"):
            if counts is not None:
                tally.take(counts)
                images.append(_image_row(index, dataset.ids[index], counts))
            classification.add(probs, dataset.labels[index])
    curve.merge()
    return {
        **_result(protocol, tally, images),
        "curve": _marked(curve.as_dict(protocol.convention), protocol) if swept else None,
        "classification": classification.scores(),
    }


def evaluate_folder(
    masks: str | Path,
    dataset: Dataset,
    *,
    convention: str = "voc",
    unsure: Unsure | None = None,
    name: str = "",
    limit: int | None = None,
    workers: int = 2,
) -> dict[str, Any]:
    """Score stored masks, whoever wrote them.

    Under torchrun the processes share the masks out and all return the same.

    Args:
        masks: folder with ``<id>.png`` for every image of the data set, palette or 8-bit grey,
            holding the data set's file ids.
        dataset: the ground truth.
        convention: name of the mean IoU convention.
        unsure: what a stored 255 means: `wrong` or `ignored`; None leaves it to the convention.
        name: of the protocol whose list and convention were asked for.
        limit: score only so many images, spread evenly over the list.
        workers: threads that read and score; 0 has none.

    Returns:
        As `evaluate_segmentation`, without curve and classification; ``coverage`` is the share
        of labelled pixels that are not 255, in percent.

    Raises:
        InputError: a mask is missing or damaged, has another size than the ground truth, or holds
            an id that the convention does not accept.
    """
    folder = Path(masks)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected <id>.png of every image in it")
    subject = "stored masks" if unsure is None else f"stored masks, 255 {unsure}"
    protocol = Protocol(
        scales=(), background=None, convention=convention, subject=subject, name=name
    )
    tally = Tally(len(dataset.classes) + 1, convention, unsure=unsure)
    coverage = Coverage()
    images, indices = [], images_to_score(dataset, limit)

    def score(index: int) -> tuple[int, np.ndarray]:
        truth, path = dataset.mask(index), folder / f"{dataset.ids[index]}.png"
        mask = read_mask(path, dataset.mask_ids)
        counts = tally.count(mask, truth, str(path))
        coverage.add(mask, truth)
        return index, counts

    scoring = in_threads(score, distributed.share(indices), workers=workers)
    with closing(scoring):
        for index, counts in with_bar(scoring, len(indices), "score"):
            tally.take(counts)
            images.append(_image_row(index, dataset.ids[index], counts))
    coverage.merge()
    result = _result(protocol.on(dataset, indices), tally, images)
    return {**result, "coverage": coverage.percent()}


def images_to_score(dataset: Dataset, limit: int | None) -> list[int]:
    """Which images a score is over: those with ground truth, or `limit` of them, evenly spread."""
    indices = [index for index in range(len(dataset)) if dataset.has_mask(index)]
    if not indices:
        raise InputError(
            f"data set '{dataset.name}' at {dataset.root or '(built in)'} has no masks to score "
            "against; predict masks without scoring them, or give the data set a mask folder"
        )
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    if limit is None or limit >= len(indices):
        return indices
    return [indices[k] for k in np.linspace(0, len(indices) - 1, num=limit).astype(int)]


class Curve:
    """Mean IoU as a function of the constant background score. Threads may add together.

    Args:
        num_classes: C, background included.
        thresholds: the background scores.
    """

    def __init__(
        self, num_classes: int, thresholds: Sequence[float] | np.ndarray = THRESHOLDS
    ) -> None:
        self.thresholds = np.asarray(thresholds, np.float32)
        self.confusion = np.zeros((len(self.thresholds), num_classes, num_classes), np.int64)
        self._adding = Lock()

    def add(
        self, maps: np.ndarray, truth: np.ndarray, class_ids: Sequence[int] | None = None
    ) -> None:
        """Count one image: ``[K, H, W] float32`` foreground scores, ``[H, W]`` ground truth.

        `class_ids` are those of the maps, where they are not 1 to K.
        """
        counts = threshold_curve(
            np.ascontiguousarray(maps, np.float32),
            truth,
            self.thresholds,
            class_ids=class_ids,
            num_classes=self.confusion.shape[1],
            ignore_index=IGNORE,
        )
        with self._adding:
            self.confusion += counts

    def merge(self) -> None:
        """Sum over the processes: every one then holds what all of them counted."""
        self.confusion = distributed.all_reduce_sum(torch.from_numpy(self.confusion)).numpy()

    def as_dict(self, convention: str) -> dict[str, Any]:
        """JSON-ready: thresholds, mean IoU at each, the best pair, and a warning."""
        miou = [scores(matrix, convention).miou for matrix in self.confusion]
        best = int(np.argmax([-1.0 if value is None else value for value in miou]))
        thresholds = [round(float(value), 4) for value in self.thresholds]
        return {
            "thresholds": thresholds,
            "miou": miou,
            "best_threshold": thresholds[best],
            "best_miou": miou[best],
            "note": WITH_TRUTH,
        }


class Coverage:
    """Share of the labelled pixels on which a mask decides (is not 255). For threads, too."""

    def __init__(self) -> None:
        self.decided = self.labelled = 0
        self._adding = Lock()

    def add(self, mask: np.ndarray, truth: np.ndarray) -> None:
        """Count one image, both ``[H, W]``."""
        labelled = truth != IGNORE
        counts = int(labelled.sum()), int((labelled & (mask != IGNORE)).sum())
        with self._adding:
            self.labelled += counts[0]
            self.decided += counts[1]

    def merge(self) -> None:
        """Sum over the processes."""
        counts = torch.tensor([self.labelled, self.decided])
        self.labelled, self.decided = distributed.all_reduce_sum(counts).tolist()

    def percent(self) -> float | None:
        """The share in percent, None without labelled pixels."""
        return 100 * self.decided / self.labelled if self.labelled else None


def best_and_worst(images: Sequence[Mapping[str, Any]], count: int) -> tuple[list[int], list[int]]:
    """Positions in the data set of the images with the best and the worst own mean IoU, in order.

    Args:
        images: the rows ``images`` of a result.
        count: how many of each; with few images none is in both.
    """
    scored = [index for index, row in enumerate(images) if row["miou"] is not None]
    ranked = sorted(scored, key=lambda index: (-images[index]["miou"], index))
    count = min(count, len(ranked) // 2)
    best, worst = ranked[:count], ranked[len(ranked) - count :][::-1]
    return [images[k]["index"] for k in best], [images[k]["index"] for k in worst]


def format_table(classes: Sequence[str], result_scores: Mapping[str, Any]) -> str:
    """Per-class IoU and means as aligned plain text.

    Args:
        classes: the K foreground class names.
        result_scores: ``scores`` of a result (`SegmentationScores.as_dict`).
    """
    names = ["background", *classes]
    rows = list(zip(names, result_scores["iou"], strict=True))
    means = [
        ("mean IoU", result_scores["miou"]),
        ("mean IoU, foreground", result_scores["miou_foreground"]),
        ("pixel accuracy", result_scores["pixel_accuracy"]),
    ]
    width = max(len(name) for name, _ in rows + means)
    rule = "-" * (width + 8)
    lines = [f"{name:<{width}}  {_number(value)}" for name, value in rows + means]
    head = f"{'class':<{width}}   IoU %"
    return "\n".join([head, rule, *lines[: len(rows)], rule, *lines[len(rows) :]])


def _marked(curve: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    """The curve is that of the scores; a CRF would have to run once per threshold."""
    if protocol.crf != "none":
        curve["note"] += ", and without the CRF"
    return curve


def _number(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.2f}"


def with_bar(own: Iterable[T], total: int, what: str) -> Generator[T, None, None]:
    """All results in list order from this process's own, with a progress bar."""
    results = distributed.in_order(own, total)
    yield from tqdm(
        results, desc=what, total=total, unit="image", disable=not distributed.is_main()
    )


def _image_row(index: int, name: str, counts: np.ndarray) -> dict[str, Any]:
    """Mean IoU of one image over the classes in its truth or prediction."""
    return {"index": index, "id": name, "miou": scores(counts).miou}


def _result(protocol: Protocol, tally: Tally, images: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "protocol": protocol.as_dict(),
        "scores": tally.scores().as_dict(),
        "confusion": tally.confusion[:, : tally.num_classes].tolist(),
        "images": images,
    }
