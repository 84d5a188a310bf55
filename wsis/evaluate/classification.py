"""Image-level classification quality, gathered image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsis.engine.meters import mean_average_precision


class ClassificationTally:
    """Class probabilities of a split, and their average precision.

    Args:
        classes: the K foreground class names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._probs: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, class_probs: Tensor, label: np.ndarray | Tensor) -> None:
        """Count one image: ``[K]`` probabilities and its ``[K]`` multi-hot label."""
        self._probs.append(class_probs.detach().cpu().float())
        self._labels.append(torch.as_tensor(np.array(label)).float())

    def scores(self) -> dict[str, Any]:
        """Percentages, JSON-ready: ``{"map": ..., "ap": {class: ...}}``; None without positives."""
        mean, per_class = mean_average_precision(
            torch.stack(self._probs), torch.stack(self._labels)
        )
        values = zip(self.classes, per_class.tolist(), strict=True)
        return {"map": _percent(mean), "ap": {name: _percent(value) for name, value in values}}


def _percent(ratio: float) -> float | None:
    return None if math.isnan(ratio) else 100 * float(ratio)
