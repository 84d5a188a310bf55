"""Named runs. Each is a function that returns a whole `TrainConfig`; its docstring says what
differs from the paper and why. ``wsis train --recipe NAME`` starts one.
"""

from __future__ import annotations

from collections.abc import Callable

from wsis.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    PredictConfig,
    PseudoConfig,
    TrainConfig,
)
from wsis.errors import InputError
from wsis.losses.rtc import RtcWeights

RECIPES: dict[str, Callable[[], TrainConfig]] = {}


def recipe(build: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Enter a function into the table of recipes under its own name."""
    RECIPES[build.__name__] = build
    return build


def get_recipe(name: str) -> TrainConfig:
    """Build a recipe by name; InputError names the known ones."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe '{name}'; known recipes: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
