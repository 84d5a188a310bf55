"""Losses of PSA and IRN: golden values and gradients, dense float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import affinity as reference
from wsis.errors import InputError
from wsis.losses import affinity as losses
from wsis.losses.affinity import affinity_loss, displacement_loss, irn_losses, psa_losses
from wsis.ops import affinity_labels
from wsis.ops.stencil_affinity import disc_offsets

LEAVES = ("conv4", "conv5", "conv6", "w_f8_3", "w_f8_4", "w_f8_5", "w_f9")


def psa_features(z):
    """AffinityNet's head on the stored maps: its leaves with gradient, and the features."""
    leaves = {name: torch.from_numpy(z[name]).requires_grad_() for name in LEAVES}

    def layer(x, weight):
        return F.elu(F.conv2d(x, leaves[weight][:, :, None, None]))

    deep = [layer(leaves[f"conv{k}"], f"w_f8_{k - 1}") for k in (4, 5, 6)]
    return leaves, layer(torch.cat(deep, dim=1), "w_f9")


def draw(size=(7, 9), radius=3, seed=0, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    offsets = disc_offsets(radius)
    affinity = torch.rand(batch, len(offsets), *size, generator=g, dtype=dtype)
    mask = torch.randint(0, 4, (batch, *size), generator=g)
    mask[mask == 3] = 255
    field = torch.randn(batch, 2, *size, generator=g, dtype=dtype)
    return affinity, affinity_labels(mask, radius, sources="all"), field, offsets


def with_gradient(loss, x, *arguments):
    """Values, and one gradient per value."""
    x = x.clone().requires_grad_()
    values = loss(x, *arguments)
    grads = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in values]
    return [v.detach() for v in values], grads


def compare(ours, theirs, tolerance):
    for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        np.testing.assert_allclose(a.double(), b.double(), rtol=0, atol=tolerance * scale)


# -- golden --------------------------------------------------------------------------------------


def test_golden_psa(golden, golden_spec, assert_golden):
    z, spec = golden("psa_loss_13x13"), golden_spec("psa_loss_13x13")
    leaves, features = psa_features(z)
    loss = psa_losses(features, torch.from_numpy(z["label"])[None])
    found = torch.stack([loss.background, loss.foreground, loss.negative, loss.total])
    assert_golden(spec, "losses", found.detach(), z["losses"])
    loss.total.backward()
    for name, leaf in leaves.items():
        assert_golden(spec, f"grad_{name}", leaf.grad, z[f"grad_{name}"])


def test_golden_irn(golden, golden_spec, assert_golden):
    z, spec = golden("irn_loss_19x21"), golden_spec("irn_loss_19x21")
    edge, field = (torch.from_numpy(z[n]).requires_grad_() for n in ("edge_logit", "displacement"))
    loss = irn_losses(edge.sigmoid(), field, torch.from_numpy(z["seg"]), radius=5)
    pairs = loss.affinity
    found = torch.stack(
        [
            (pairs.background + pairs.foreground) / 2,
            pairs.negative,
            loss.displacement_foreground,
            loss.displacement_background,
            loss.total,
        ]
    )
    assert_golden(spec, "losses", found.detach(), z["losses"])
    loss.total.backward()
    assert_golden(spec, "grad_edge_logit", edge.grad, z["grad_edge_logit"])
    assert_golden(spec, "grad_displacement", field.grad, z["grad_displacement"])


# -- dense references ----------------------------------------------------------------------------


def check(size, radius, seed, dtype):
    affinity, labels, field, offsets = draw(size, radius, seed, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    compare(
        with_gradient(affinity_loss, affinity, labels),
        with_gradient(reference.affinity_loss, affinity.double(), labels),
        tolerance,
    )
    compare(
        with_gradient(displacement_loss, field, labels, offsets),
        with_gradient(reference.displacement_loss, field.double(), labels, offsets.tolist()),
        tolerance,
    )


CASES = {
    "size": st.tuples(st.integers(1, 7), st.integers(1, 7)),
    "radius": st.integers(2, 4),
    "seed": st.integers(0, 99),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**CASES)
def test_pair_by_pair(size, radius, seed, dtype):
    check(size, radius, seed, dtype)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(**CASES)
def test_pair_by_pair_long(size, radius, seed, dtype):
    check(size, radius, seed, dtype)


def test_blocks_do_not_matter(monkeypatch):
    affinity, labels, *_ = draw((5, 6), 4)
    whole = with_gradient(affinity_loss, affinity, labels)
    monkeypatch.setattr(losses, "_BLOCK", 70)
    compare(with_gradient(affinity_loss, affinity, labels), whole, 1e-14)


def test_gradcheck():
    affinity, labels, field, offsets = draw((4, 5), 3)
    affinity = affinity.clamp(0.05, 0.95).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: tuple(affinity_loss(a, labels)), affinity)
    # Odd offsets keep |d_i - d_j - offset| away from its kink.
    field = (field * 0.1 + 0.37 * torch.arange(20).view(4, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: displacement_loss(d, labels, offsets), field)


def test_ends_of_the_range():
    """Affinities of exactly 0 and 1 give large, finite values and gradients."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 255, 255]).view(1, 1, 2, 4).byte()
    affinity = torch.tensor([0.0, 0, 0, 1, 1, 1, 0, 1]).view(1, 1, 2, 4)
    values, grads = with_gradient(affinity_loss, affinity, labels)
    for value, grad in zip(values, grads, strict=True):
        assert torch.isfinite(value) and torch.isfinite(grad).all()
    assert values[0] == pytest.approx(-np.log(1e-5) / 2, abs=1e-3)
    assert not any(grad.flatten()[6:].any() for grad in grads)


def test_nothing_known_is_zero():
    labels = torch.full((1, 34, 6, 6), 255, dtype=torch.uint8)
    for loss, x, rest in (
        (affinity_loss, torch.rand(1, 34, 6, 6), ()),
        (displacement_loss, torch.randn(1, 2, 6, 6), (disc_offsets(5),)),
    ):
        values, grads = with_gradient(loss, x, labels, *rest)
        assert not any(map(torch.any, (*values, *grads)))


@pytest.mark.parametrize("size", [(1, 1), (3, 30), (4, 8)])
def test_grids_smaller_than_the_radius(size):
    """No pixel has all its partners: no pairs, loss 0, gradient 0."""
    features = torch.rand(1, 4, *size).requires_grad_()
    mask = torch.randint(0, 2, (1, *size))
    psa_losses(features, mask).total.backward()
    assert not features.grad.any()
    edge = torch.rand(1, 1, *size).requires_grad_()
    field = torch.rand(1, 2, *size).requires_grad_()
    loss = irn_losses(edge, field, mask)
    loss.total.backward()
    assert loss.total == 0 and not edge.grad.any() and not field.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float(dtype):
    affinity, labels, field, offsets = draw(dtype=dtype)
    compare(
        with_gradient(affinity_loss, affinity, labels),
        [
            [v for v in with_gradient(affinity_loss, affinity.float(), labels)[0]],
            [g.to(dtype) for g in with_gradient(affinity_loss, affinity.float(), labels)[1]],
        ],
        1e-6,
    )
    assert displacement_loss(field, labels, offsets)[0].dtype == torch.float32


def test_training_moves_a_boundary():
    """Gradient steps on the loss raise the boundary between two halves, and nowhere else."""
    mask = torch.zeros(1, 12, 16, dtype=torch.uint8)
    mask[..., 8:] = 3
    edge = torch.full((1, 1, 12, 16), -1.0).requires_grad_()
    field = torch.zeros(1, 2, 12, 16).requires_grad_()
    optimiser = torch.optim.Adam([edge, field], lr=0.2)
    first = None
    for _ in range(40):
        optimiser.zero_grad()
        loss = irn_losses(edge.sigmoid(), field, mask, radius=4).total
        first = first or float(loss.detach())
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < first / 2
    found = edge.detach().sigmoid()[0, 0, 2:-4]
    assert found[:, 7:9].amax(dim=1).min() > 0.8
    assert found[:, 4:6].max() < 0.2 and found[:, 10:12].max() < 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, p, d, o: affinity_loss(a[:1], p), "affinity must be"),
        (lambda a, p, d, o: affinity_loss(a.long(), p), "floating"),
        (lambda a, p, d, o: affinity_loss(a, p.long()), "uint8"),
        (lambda a, p, d, o: affinity_loss(a, p, eps=0), "eps"),
        (lambda a, p, d, o: displacement_loss(d[:, :1], p, o), "displacement must be"),
        (lambda a, p, d, o: displacement_loss(d, p, o[:3]), r"\[B, 3, h, w\]"),
        (lambda a, p, d, o: displacement_loss(d, p.int(), o), "uint8"),
        (lambda a, p, d, o: psa_losses(a, torch.zeros(2, 5, 5, dtype=torch.uint8)), "same grid"),
        (lambda a, p, d, o: irn_losses(d[:, :1], d, torch.zeros(2, 7, 9)), "integers"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(*draw())
