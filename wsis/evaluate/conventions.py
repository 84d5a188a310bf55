"""Mean IoU under the conventions of this field.

All of them count one confusion matrix over the whole split, leave out pixels whose ground truth is
255 and take ``IoU_c = TP / (TP + FP + FN)``. They differ in what an out-of-range prediction counts
as, which classes enter the mean, and the precision of the sums; on a subset, on own data or on
COCO the same masks get different numbers. Percentages throughout.

Where the others print and go on, all of these raise: a missing file (1-stage-wseg), a mask of
another size, ground truth that is neither a class nor 255.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from wsis.errors import InputError
from wsis.ops.confusion import confusion_matrix
from wsis.types import BACKGROUND, IGNORE

Unsure = Literal["wrong", "ignored"]


@dataclass(frozen=True)
class Convention:
    """One way to average.

    Attributes:
        source: whose evaluation code behaves so.
        outside: what a predicted id outside 0..K does at a labelled pixel: `error`;
            `error_anywhere` (also where there is no ground truth); `missed` (counts against the
            true class only); `background` (255 becomes 0, others are errors); `cell` (lands at
            flat index C * truth + prediction of the matrix; past its end it is an error).
        mean_over: classes in the mean: `defined` (in truth or prediction; with an epsilon a class
            that is nowhere counts 0), `truth` (in the ground truth), `all` (a class that is nowhere
            leaves no mean).
        epsilon: added to the union.
        sums: `double`; `single` (float32 from the integer matrix on); `single_by_image` (float32
            image by image, results rounded to two decimals).
        unsure: what a predicted 255 is, where the caller does not say: see `Tally`.
        most_ids: whether more than C + 1 different ids in one predicted image are an error.
    """

    source: str
    outside: Literal["error", "error_anywhere", "missed", "background", "cell"]
    mean_over: Literal["defined", "truth", "all"]
    epsilon: float = 0.0
    sums: Literal["double", "single", "single_by_image"] = "double"
    unsure: Unsure | None = None
    most_ids: bool = False


CONVENTIONS = {
    "voc": Convention(
        "VOC devkit VOCevalseg, absent classes left out", "error_anywhere", "defined"
    ),
    "voc-devkit": Convention("VOC devkit VOCevalseg to the letter", "error_anywhere", "all"),
    "rtc": Convention("RTC eval.py = SEAM, PSA evaluation.py", "missed", "defined", epsilon=1e-10),
    "toco": Convention("ToCo, AFA utils/evaluate.py scores", "cell", "truth"),
    "toco-pseudo": Convention(
        "ToCo, AFA utils/evaluate.py pseudo_scores", "cell", "truth", unsure="ignored"
    ),
    "irn": Convention("IRN eval_cam.py, eval_sem_seg.py (chainercv)", "background", "defined"),
    "pamr": Convention("1-stage-wseg eval_seg.py", "error", "defined", epsilon=1e-20),
    "mmseg": Convention("mmsegmentation IoUMetric", "missed", "defined", sums="single_by_image"),
    "torchmetrics": Convention(
        "torchmetrics JaccardIndex, macro", "cell", "defined", sums="single", most_ids=True
    ),
}
"""The conventions by name; `voc` is the default everywhere."""


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a confusion matrix; percentages, None where a ratio is 0 / 0.

    Attributes:
        convention: name of the convention.
        iou: per class, background first, C values.
        miou: mean over the classes that the convention counts; None where it has none.
        miou_foreground: the same without background.
        pixel_accuracy: share of labelled pixels predicted right.
        mean_accuracy: mean over classes of the share of their pixels predicted right.
        pixels: labelled pixels counted.
    """

    convention: str
    iou: tuple[float | None, ...]
    miou: float | None
    miou_foreground: float | None
    pixel_accuracy: float | None
    mean_accuracy: float | None
    pixels: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; ``SegmentationScores(**d)`` gives it back."""
        return {**asdict(self), "iou": list(self.iou)}


def get_convention(name: str) -> Convention:
    """Convention by name; InputError names the known ones."""
    if name not in CONVENTIONS:
        raise InputError(f"unknown convention '{name}'; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def scores(confusion: np.ndarray, convention: str = "voc") -> SegmentationScores:
    """Score one confusion matrix.

    Args:
        confusion: ``[C, C]`` integer counts, rows ground truth, columns prediction; or
            ``[C, C + 1]`` with the out-of-range predictions in the last column.
        convention: a key of `CONVENTIONS`.

    Returns:
        The scores.

    Raises:
        InputError: unknown convention or another shape.

    Example:
        >>> scores(np.array([[3, 1], [0, 4]])).iou
        (75.0, 80.0)
    """
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[1] - len(confusion) not in (0, 1):
        raise InputError(f"confusion must be [C, C] or [C, C + 1], got {confusion.shape}")
    return _score(_areas(confusion, get_convention(convention)), convention)


class Tally:
    """Running confusion matrix of a split under one convention.

    Args:
        num_classes: C, background included.
        convention: a key of `CONVENTIONS`.
        unsure: what a predicted 255 is: `wrong` (counts against the true class), `ignored` (the
            pixel leaves the score, as in ToCo's and AFA's pseudo_scores); None leaves it to the
            convention.
    """

    def __init__(
        self, num_classes: int, convention: str = "voc", *, unsure: Unsure | None = None
    ) -> None:
        if unsure not in (None, "wrong", "ignored"):
            raise InputError(f"unsure must be 'wrong', 'ignored' or None, got {unsure!r}")
        self.num_classes = num_classes
        self.convention = convention
        self.rule = get_convention(convention)
        self.unsure = unsure or self.rule.unsure
        self.confusion = np.zeros((num_classes, num_classes + 1), np.int64)
        self._total = _areas(self.confusion, self.rule)

    def add(self, prediction: np.ndarray, truth: np.ndarray, name: str = "mask") -> np.ndarray:
        """Count one image.

        Args:
            prediction: ``[H, W]`` integer class ids.
            truth: ``[H, W]`` integer ids 0..K, 255 where there is no ground truth.
            name: what to call the image in an error.

        Returns:
            ``[C, C + 1] int64``, its own confusion matrix; the last column holds what was
            predicted outside 0..K.

        Raises:
            InputError: sizes differ, the ground truth holds another id, or an id was predicted
                that the convention calls an error.
        """
        counts = self.count(prediction, truth, name)
        self.take(counts)
        return counts

    def take(self, counts: np.ndarray) -> None:
        """Add what `count` returned, here or in another process, to the running matrix."""
        self.confusion += counts
        if self.rule.sums == "single_by_image":
            self._total = self._total + _areas(counts, self.rule)

    def scores(self) -> SegmentationScores:
        """Scores of everything counted so far."""
        by_image = self.rule.sums == "single_by_image"
        areas = self._total if by_image else _areas(self.confusion, self.rule)
        return _score(areas, self.convention)

    def count(self, prediction: np.ndarray, truth: np.ndarray, name: str = "mask") -> np.ndarray:
        """The matrix of one image, as `add`, without adding it; threads may call it together."""
        prediction, truth = np.asarray(prediction), np.asarray(truth)
        size = self.num_classes
        if prediction.shape != truth.shape:
            raise InputError(
                f"{name}: prediction and ground truth must have one size, got "
                f"{prediction.shape} and {truth.shape}; predict at the original resolution"
            )
        prediction, truth = prediction.astype(np.int64), truth.astype(np.int64)
        labelled = truth != IGNORE
        strange = labelled & ((truth < 0) | (truth >= size))
        if strange.any():
            raise InputError(
                f"{name}: ground truth must hold 0..{size - 1} or {IGNORE}, got {truth[strange][0]}"
            )
        if self.rule.most_ids and len(np.unique(prediction)) > size + 1:
            raise InputError(
                f"{name}: convention '{self.convention}' takes at most {size + 1} different ids in "
                f"an image, got {len(np.unique(prediction))}; write class ids only"
            )
        undecided = prediction == IGNORE
        missed = undecided & (self.unsure == "wrong")
        if self.unsure == "ignored":
            labelled &= ~undecided
        if self.unsure == "ignored" or self.rule.outside == "background":
            prediction = np.where(undecided & ~missed, BACKGROUND, prediction)

        outside = ((prediction < 0) | (prediction >= size)) & ~missed
        if self.rule.outside != "error_anywhere":
            outside &= labelled
        if outside.any():
            if self.rule.outside == "missed":
                missed |= outside
            else:
                prediction, truth = self._move(prediction, truth, labelled, outside, name)
        # A class more than there are: its column takes what was predicted outside 0..K.
        prediction = np.where(missed, size, prediction)
        counts = confusion_matrix(
            np.where(labelled, prediction, BACKGROUND).astype(np.uint8),
            np.where(labelled, truth, IGNORE).astype(np.uint8),
            size + 1,
            ignore_index=IGNORE,
        )
        return np.asarray(counts)[:size]

    def _move(
        self,
        prediction: np.ndarray,
        truth: np.ndarray,
        labelled: np.ndarray,
        outside: np.ndarray,
        name: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Let out-of-range predictions land in another cell where the convention does so."""
        size = self.num_classes
        cell = np.where(labelled, size * truth + prediction, 0)
        if self.rule.outside == "cell" and 0 <= cell.min() and cell.max() < size * size:
            return cell % size, cell // size
        raise InputError(
            f"{name}: predicted id {prediction[outside][0]} is no class (0..{size - 1}), which "
            f"convention '{self.convention}' does not accept; write class ids only, or say with "
            "unsure='wrong' or 'ignored' what 255 means"
        )


def _areas(confusion: np.ndarray, rule: Convention) -> np.ndarray:
    """Intersection, union, ground-truth area of each class: ``[3, C]``, int64 or float32."""
    if rule.sums == "single":
        confusion = confusion.astype(np.float32)
    size = len(confusion)
    intersection = np.diagonal(confusion)
    truth, predicted = confusion.sum(axis=1), confusion[:, :size].sum(axis=0)
    areas = np.stack([intersection, predicted + truth - intersection, truth])
    return areas.astype(np.int64 if rule.sums == "double" else np.float32)


def _score(areas: np.ndarray, convention: str) -> SegmentationScores:
    rule = get_convention(convention)
    intersection, union, truth = areas.astype(np.float64) if rule.sums == "double" else areas
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = intersection / (union + intersection.dtype.type(rule.epsilon))
        class_accuracy = intersection / truth
        pixel_accuracy = intersection.sum() / truth.sum()
    in_mean = np.where(truth > 0, iou, np.nan) if rule.mean_over == "truth" else iou

    def percent(ratio: np.floating) -> float | None:
        if not np.isfinite(ratio):
            return None
        if rule.sums == "single_by_image":
            return round(float(np.round(100 * ratio, 2)), 2)
        return 100 * float(ratio)

    def mean(ratios: np.ndarray) -> float | None:
        undefined = ~np.isfinite(ratios)
        if undefined.all() or (rule.mean_over == "all" and undefined.any()):
            return None
        return percent(np.nanmean(ratios))

    return SegmentationScores(
        convention=convention,
        iou=tuple(percent(ratio) for ratio in iou),
        miou=mean(in_mean),
        miou_foreground=mean(in_mean[1:]),
        pixel_accuracy=percent(pixel_accuracy),
        mean_accuracy=mean(class_accuracy),
        pixels=int(areas[2].astype(np.int64).sum()),
    )
