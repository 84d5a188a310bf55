"""Numbers kept while training: running means of the losses and image-level average precision."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from wsis.errors import InputError


def mean_average_precision(scores: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Mean over classes of the average precision, as in scikit-learn's average_precision_score.

    ``AP = sum_n (R_n - R_{n-1}) P_n`` over the distinct scores in falling order, no interpolation;
    equal scores enter together. Computed in float64.

    Args:
        scores: ``[N, K]`` float, any range.
        labels: ``[N, K]``, 1 where the class is in the image, else 0.

    Returns:
        The mean in [0, 1] over classes with a positive image (nan if there is none), and the
        average precision per class ``[K] float64``, nan for classes without a positive image.

    Raises:
        InputError: shapes differ, scores not finite, labels other than 0 and 1.
    """
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise InputError(
            "scores and labels must both be [N, K], "
            f"got {list(scores.shape)} and {list(labels.shape)}"
        )
    scores, labels = scores.detach().double().cpu(), labels.detach().double().cpu()
    if not scores.isfinite().all():
        raise InputError("scores must be finite, got nan or inf")
    if not ((labels == 0) | (labels == 1)).all():
        raise InputError("labels must be 0 or 1, got other values")
    columns = zip(scores.unbind(1), labels.unbind(1), strict=True)
    per_class = torch.tensor([_average_precision(s, y) for s, y in columns], dtype=torch.float64)
    return float(per_class.nanmean()), per_class


def average_precision(scores: Tensor, class_ids: Tensor) -> float:
    """:func:`mean_average_precision` of images with one class each, a class at a time.

    Args:
        scores: ``[N, K]`` float.
        class_ids: ``[N] int64``, 0..K-1.

    Returns:
        The mean in [0, 1] over classes that some image has.
    """
    present = class_ids.unique().tolist()
    values = [_average_precision(scores[:, k].double(), (class_ids == k).double()) for k in present]
    return sum(values) / len(values)


def ranks(scores: Tensor, class_ids: Tensor) -> Tensor:
    """How many classes score higher than, or as high as and before, the true one: ``[N] int64``.

    Args:
        scores: ``[N, K]`` float.
        class_ids: ``[N] int64``, 0..K-1.
    """
    true = scores.gather(1, class_ids[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < class_ids[:, None]
    return ((scores > true) | ((scores == true) & before)).sum(dim=1)


def accuracy(scores: Tensor, class_ids: Tensor, count: int) -> float:
    """Share of images whose class is among the ``count`` with the highest scores."""
    return float((ranks(scores, class_ids) < count).double().mean())


def _average_precision(scores: Tensor, labels: Tensor) -> float:
    """Of one class: scores ``[N]``, labels ``[N]``, both float64."""
    positives = float(labels.sum())
    if positives == 0:
        return math.nan
    order = scores.argsort(descending=True)
    scores, hits = scores[order], labels[order].cumsum(0)
    last_of_ties = torch.ones_like(scores, dtype=torch.bool)
    last_of_ties[:-1] = scores[:-1] != scores[1:]
    rank = last_of_ties.nonzero()[:, 0]
    precision, recall = hits[rank] / (rank + 1), hits[rank] / positives
    return float((precision * recall.diff(prepend=recall.new_zeros(1))).sum())


class RunningMean:
    """Mean of named scalars over the updates since the last reset; each name has its own count.

    Example:
        >>> mean = RunningMean()
        >>> mean.update({"total": 2.0}); mean.update({"total": 4.0, "seg": 1.0})
        >>> mean.mean()
        {'total': 3.0, 'seg': 1.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, float | Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, values: Mapping[str, float | Tensor]) -> None:
        """Add one value per name; 0-d tensors stay on their device, so nothing is synchronised."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().double()
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def mean(self) -> dict[str, float]:
        """Mean of each name, in the order in which the names came first."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._counts.clear()

    def state(self) -> dict[str, list[float]]:
        """Sum and count of each name; survives JSON bit for bit."""
        return {name: [float(total), self._counts[name]] for name, total in self._sums.items()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Continue from what :meth:`state` returned."""
        self._sums = {name: float(total) for name, (total, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}
