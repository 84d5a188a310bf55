"""The operators. Names are looked up on first use, so that importing this costs nothing."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOME = {
    "PixelCorrelation": "pixel_correlation",
    "add_background": "normalize",
    "affinity_labels": "affinity_labels",
    "attention_propagate": "random_walk",
    "bilateral_filter": "permutohedral",
    "bilateral_lattice": "permutohedral",
    "box_iou": "score_boxes",
    "box_overlaps": "score_boxes",
    "cams_to_labels": "normalize",
    "confusion_matrix": "confusion",
    "ctr_scores": "norms",
    "dense_crf": "dense_crf",
    "dense_energy_loss": "energy",
    "disc_offsets": "stencil_affinity",
    "feature_lattice": "permutohedral",
    "gated_crf_loss": "gated_crf",
    "gaussian_lattice": "permutohedral",
    "local_affinity": "local_affinity",
    "max_norm": "norms",
    "normalize_cams": "normalize",
    "one_hot_max": "norms",
    "pair_affinity": "stencil_affinity",
    "pamr": "local_affinity",
    "par": "local_affinity",
    "path_affinity": "stencil_affinity",
    "permutohedral_filter": "permutohedral",
    "pixel_correlation": "pixel_correlation",
    "propagate": "local_affinity",
    "propagate_to_edge": "random_walk",
    "random_walk": "random_walk",
    "refine": "local_affinity",
    "score_boxes": "score_boxes",
    "seed_scores": "norms",
    "threshold_curve": "confusion",
    "varm": "local_affinity",
    "window_filter": "gated_crf",
    "window_mask": "random_walk",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]


class _Package(ModuleType):
    """Keeps functions visible that share a name with their module.

    The import system binds every imported submodule to its package; `pixel_correlation` the module
    would hide `pixel_correlation` the function, depending on who imported what before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
