"""What the tests of checkpoints save and compare."""

from __future__ import annotations

from pathlib import Path

import torch


def groups(step: int) -> dict[str, dict[str, torch.Tensor]]:
    fill = torch.full((7, 5), float(step))
    return {"model": {"a.weight": fill, "a.bias": fill[0]}, "ema": {"n": torch.tensor(step)}}


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if isinstance(tensor, dict):
            assert_equal(actual[name], tensor)
        else:
            assert actual[name].dtype == tensor.dtype
            assert torch.equal(actual[name], tensor), name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
