"""AffinityNet's functions (jiwoon-ahn/psa): golden vectors, the dense route, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.losses.test_affinity import psa_features
from tests.reference import affinity as reference
from wsis.compat import irn, psa
from wsis.errors import InputError

WALK, LOSS = "psa_walk_90x110", "psa_loss_13x13"
SETS = [(16, 8, 8), (4, 8, 3), (6, 8, 6)]


def test_golden_pairs(golden, golden_spec, assert_golden):
    z, spec = golden(WALK), golden_spec(WALK)
    features = psa_features(z)[1].detach()
    ind_from, ind_to = psa.get_indices_of_pairs(5, (12, 14))
    assert_golden(spec, "ind_from", ind_from, z["ind_from"])
    assert_golden(spec, "ind_to", ind_to.reshape(34, -1), z["ind_to"])
    assert_golden(spec, "aff_pairs", psa.to_affinity(features), z["aff_pairs"])
    dense = psa.to_affinity(features, to_dense=True)
    assert_golden(spec, "aff_dense", dense, z["aff_dense"])
    assert_golden(spec, "trans_mat", irn.to_transition_matrix(dense, 8, 8), z["trans_mat"])
    search = psa.ExtractAffinityLabelInRadius(13).search_dist
    assert [list(step) for step in search] == spec["params"]["search_dist"]


@pytest.mark.parametrize(("alpha", "beta", "logt"), SETS)
def test_golden_walk(alpha, beta, logt, golden, golden_spec, assert_golden):
    """The loop of infer_aff.py with the walk in place of the matrix."""
    z, spec = golden(WALK), golden_spec(WALK)
    features, (height, width) = psa_features(z)[1].detach(), z["image_u8"].shape[:2]
    cam = torch.from_numpy(z["cam"])
    planes = torch.cat([(1 - cam.amax(dim=0, keepdim=True)) ** alpha, cam])
    planes = F.pad(planes, (0, -width % 8, 0, -height % 8))
    pooled = F.avg_pool2d(planes, 8, 8)
    if alpha == 16:
        assert_golden(spec, "cam_pooled", pooled, z["cam_pooled"])
    pairs = psa.to_affinity(features)
    ind = psa.get_indices_of_pairs(5, tuple(features.shape[2:]))
    walked = psa.random_walk(pooled, pairs, ind, beta, logt)
    name = f"a{alpha}_b{beta}_t{logt}"
    assert_golden(spec, f"cam_rw_{name}", walked, z[f"cam_rw_{name}"])

    up = F.interpolate(walked[None], scale_factor=8, mode="bilinear", align_corners=False)[0]
    up = up[:, :height, :width]
    pred = np.array([0, *(k + 1 for k in spec["params"]["classes"])])[up.argmax(dim=0)]
    best = up.topk(2, dim=0).values
    clear = ((best[0] - best[1]) > 1e-4).numpy()
    np.testing.assert_array_equal(pred[clear], z[f"pred_{name}"][clear])
    assert clear.mean() > 0.95


def test_golden_loss(golden, golden_spec, assert_golden):
    z, spec = golden(LOSS), golden_spec(LOSS)
    labels = psa.ExtractAffinityLabelInRadius(cropsize=13, radius=5)(z["label"])
    for name, found in zip(("bg_pos", "fg_pos", "neg"), labels, strict=True):
        assert found.dtype == np.float32
        assert_golden(spec, name, found[None].astype(np.uint8), z[name])
    leaves, features = psa_features(z)
    aff = psa.to_affinity(features)
    aff.retain_grad()
    assert_golden(spec, "aff", aff.detach(), z["aff"])
    loss, background, foreground, negative = psa.get_affinity_loss(
        aff, *(torch.from_numpy(x)[None] for x in labels)
    )
    found = torch.stack([background, foreground, negative, loss]).detach()
    assert_golden(spec, "losses", found, z["losses"])
    loss.backward()
    assert_golden(spec, "grad_aff", aff.grad, z["grad_aff"])
    for name, leaf in leaves.items():
        assert_golden(spec, f"grad_{name}", leaf.grad, z[f"grad_{name}"])


@pytest.mark.parametrize("size", [(9, 11), (6, 20), (5, 9), (4, 9), (1, 1)])
def test_walk_against_the_dense_matrix(size):
    g = torch.Generator().manual_seed(1)
    features = torch.rand(1, 6, *size, generator=g)
    maps = torch.rand(3, *size, generator=g).double()
    pairs, ind = psa.to_affinity(features), psa.get_indices_of_pairs(5, size)
    dense = psa.to_affinity(features, to_dense=True).double()
    assert torch.equal(dense, dense.T) and torch.equal(dense.diagonal(), torch.ones(len(dense)))
    expected = reference.walk(maps.numpy(), dense.numpy(), 8, 5)
    np.testing.assert_allclose(
        psa.random_walk(maps, pairs.double(), ind, 8, 5), expected, atol=1e-10
    )


def test_numpy_gives_numpy():
    maps, features = np.random.default_rng(0).random((2, 9, 12)), torch.rand(1, 3, 9, 12)
    aff, ind = psa.to_affinity(features).numpy(), psa.get_indices_of_pairs(5, (9, 12))
    out = psa.random_walk(maps, aff, ind, 8, 8)
    assert isinstance(out, np.ndarray) and out.dtype == np.float64


def test_indices_are_made_once_per_size():
    assert psa.get_indices_of_pairs(5, (20, 30))[1] is psa.get_indices_of_pairs(5, [20, 30])[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psa.to_affinity(torch.rand(3, 9, 9)), r"\[B, F, h, w\]"),
        (lambda: psa.to_affinity(torch.rand(2, 3, 9, 9), to_dense=True), r"\[1, F, h, w\]"),
        (lambda: psa.ExtractAffinityLabelInRadius(9)(np.zeros((9, 9))), "integers"),
        (lambda: psa.get_affinity_loss(*(torch.zeros(1, 34, n) for n in (4, 4, 4, 5))), "shape"),
        (
            lambda: psa.random_walk(
                torch.rand(1, 9, 12),
                torch.rand(1, 34, 20),
                psa.get_indices_of_pairs(5, (12, 9)),
                8,
                8,
            ),
            "one offset|aff must be",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
