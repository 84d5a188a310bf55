"""Image-level classification quality, gathered image by image."""

from __future__ import annotations

import math
from array import array
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
        # Packed: a tensor for each image would weigh more than its numbers.
        self._probs, self._labels = array("f"), array("B")

    def add(self, class_probs: np.ndarray | Tensor, label: np.ndarray | Tensor) -> None:
        """Count one image: ``[K]`` probabilities and its ``[K]`` multi-hot label."""
        probs = torch.as_tensor(class_probs).detach().cpu().float().numpy()
        self._probs.frombytes(probs.tobytes())
        self._labels.frombytes(np.asarray(label, np.uint8).tobytes())

    def scores(self) -> dict[str, Any]:
        """Percentages, JSON-ready: ``{"map": ..., "ap": {class: ...}}``; None without positives."""
        shape = (-1, len(self.classes))
        probs, labels = np.array(self._probs).reshape(shape), np.array(self._labels).reshape(shape)
        mean, per_class = mean_average_precision(torch.tensor(probs), torch.tensor(labels))
        values = zip(self.classes, per_class.tolist(), strict=True)
        return {"map": _percent(mean), "ap": {name: _percent(value) for name, value in values}}


def _percent(ratio: float) -> float | None:
    return None if math.isnan(ratio) else 100 * float(ratio)
