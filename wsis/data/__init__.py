"""Files on disk, or built-in scenes, to training batches.

Importing this package loads neither torch nor Pillow; its names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Dataset": "dataset",
    "open_dataset": "dataset",
    "TrainLoader": "loader",
    "train_transform": "augment",
    "normalize": "augment",
    "second_view": "views",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wsis.data' has no attribute '{name}'")
    return getattr(import_module(f"wsis.data.{_HOMES[name]}"), name)
