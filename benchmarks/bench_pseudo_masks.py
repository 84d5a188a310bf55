"""Pseudo masks of a training batch against the loop over images that they replace.

Two baselines: that loop with everything in plain torch (shifted views, itself a good baseline, see
bench_local_affinity.py), and the same loop with the native refinement, which shows what the batched
steps around the refinement are worth. The masks must agree before anything is timed.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from tests.reference import pseudo_masks as reference
from wsis.pseudo import make_pseudo_masks

NATIVE = import_module("wsis.ops.local_affinity")
B, K, H, W = 4, 20, 448, 448
CLASSES = (1, 2, 3, 2)  # of each image
RULES = {
    "VARM": {},
    "PAR, relative thresholds": {"refine": "par", "relative": True, "high": 1.1, "low": 0.8},
    "no refinement": {"refine": "none"},
}
WAYS = {
    "torch_loop": reference.make_pseudo_masks,
    "torch_loop_native_refinement": partial(reference.make_pseudo_masks, affinity=NATIVE),
    "wsis": make_pseudo_masks,
}


@pytest.fixture(scope="module")
def batch():
    """Smooth scores and images with some noise, different class lists."""
    g = torch.Generator().manual_seed(0)
    cams = F.interpolate(torch.rand(B, K, 28, 28, generator=g), (H, W), mode="bilinear")
    image = F.interpolate(torch.rand(B, 3, 56, 56, generator=g), (H, W), mode="bilinear")
    image = image * 0.9 + torch.rand(B, 3, H, W, generator=g) * 0.1
    label = torch.zeros(B, K)
    for b, count in enumerate(CLASSES):
        label[b, torch.randperm(K, generator=g)[:count]] = 1
    box = torch.tensor([[0, H, 0, W]] * (B - 1) + [[20, H - 7, 0, W - 60]])
    return cams, image, label, box


def group(rule: str) -> str:
    return f"pseudo masks, {B} x {K} x {H} x {W}, 1 to 3 classes, {rule}"


@pytest.mark.parametrize(
    ("rule", "way"),
    [
        pytest.param(rule, way, marks=pytest.mark.benchmark(group=group(rule)))
        for rule in RULES
        for way in WAYS
        if not (rule == "no refinement" and way == "torch_loop_native_refinement")
    ],
)
def test_pseudo_masks(benchmark, batch, rule, way):
    expected = make_pseudo_masks(*batch, **RULES[rule])
    masks = WAYS[way](*batch, **RULES[rule])
    assert (masks != expected).double().mean() < 1e-4
    benchmark.extra_info["baseline"] = way == "torch_loop"
    benchmark.pedantic(
        WAYS[way],
        args=batch,
        kwargs=RULES[rule],
        rounds=10 if way == "wsis" else 3,
        warmup_rounds=1,
    )
