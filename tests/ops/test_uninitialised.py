"""No operator's result depends on what lay in its scratch memory or its result before.

torch fills fresh memory with NaN (the largest integer) under deterministic algorithms; every result
and gradient must be the same to the bit as without. Sizes are around multiples of the vector width,
where rows, borders and tails touch each other.
"""

from __future__ import annotations

import pytest
import torch

from wsis.ops import cams_to_labels, ctr_scores, max_norm, normalize_cams, seed_scores
from wsis.ops.local_affinity import local_affinity, refine
from wsis.pseudo import make_pseudo_masks

SIZES = [(96, 96), (5, 96), (1, 1), (7, 5), (33, 48), (20, 16), (40, 81), (3, 112)]


def poisoned(function):
    """The function's result with fresh memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        return function()
    finally:
        torch.use_deterministic_algorithms(False)


def check(function):
    for plain, filled in zip(function(), poisoned(function), strict=True):
        assert torch.equal(plain, filled)


def with_gradient(function, *inputs):
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)


@pytest.mark.parametrize("dilations", [(1, 2, 4, 8, 12, 24), (3, 5), (200,)])
@pytest.mark.parametrize("kind", ["pamr", "par", "varm"])
@pytest.mark.parametrize("size", SIZES)
def test_local_affinity(size, kind, dilations):
    image, masks = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    counts = torch.tensor([1, 3])
    check(lambda: [local_affinity(image, kind, dilations)])
    check(
        lambda: with_gradient(
            lambda m: refine(image, m, kind, iterations=3, dilations=dilations, counts=counts),
            masks,
        )
    )


@pytest.mark.parametrize("variant", ["psa", "seam", "irn", "afa", "toco", "sipe", "rtc"])
@pytest.mark.parametrize("size", SIZES)
def test_normalize_cams(size, variant):
    maps = [torch.randn(2, 4, s, s + 1) for s in (1, 5) for _ in (0, 1)]
    label = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]])
    options = {"variant": variant, "flips": [False, True] * 2, "background": "power"}
    check(lambda: [normalize_cams(maps, size, **options, label=label)])


@pytest.mark.parametrize("norm", [max_norm, seed_scores, ctr_scores])
@pytest.mark.parametrize("size", SIZES)
def test_norms(size, norm):
    maps = torch.randn(2, 3, *size)
    check(lambda: with_gradient(norm, maps))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_labels(size, relative):
    cams, image = torch.rand(3, 4, *size), torch.rand(3, 3, *size)
    label = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    box = torch.tensor([[0, size[0], 0, size[1]]] * 2 + [[0, 0, 0, 0]])
    check(lambda: [cams_to_labels(cams, label, low=0.3, high=0.6, valid_box=box)])
    check(lambda: [make_pseudo_masks(cams, image, label, box, relative=relative)])
