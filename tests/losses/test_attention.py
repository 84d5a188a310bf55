"""AFA's affinity loss and ToCo's token contrast: golden, dense references, no label matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import affinity as reference
from wsis.errors import InputError
from wsis.losses import attention as losses
from wsis.losses.attention import afa_affinity_loss, token_contrast_loss

NAME = "afa_aff_9x11"


def draw(size=(4, 5), seed=0, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    tokens = size[0] * size[1]
    attention = torch.rand(batch, tokens, tokens, generator=g, dtype=dtype)
    features = torch.randn(batch, 6, *size, generator=g, dtype=dtype)
    labels = torch.randint(0, 4, (batch, *size), generator=g)
    labels[labels == 3] = 255
    return attention, features, labels


def with_gradient(loss, x):
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def test_golden(golden, golden_spec, assert_golden):
    z, spec = golden(NAME), golden_spec(NAME)
    labels = torch.from_numpy(z["grid_label"])
    attention = torch.from_numpy(z["aff_pred"]).requires_grad_()
    loss = afa_affinity_loss(attention, labels, radius=3)
    found = torch.stack([loss.loss.detach().double(), loss.positives, loss.negatives])
    assert_golden(spec, "aff_loss", found, z["aff_loss"])
    loss.loss.backward()
    assert_golden(spec, "grad_aff_pred_item0", attention.grad[:1], z["grad_aff_pred_item0"])

    features = torch.from_numpy(z["toco_feature"]).requires_grad_()
    loss = token_contrast_loss(features, labels)
    loss.loss.backward()
    assert_golden(spec, "toco_ptc_loss", loss.loss.detach()[None], z["toco_ptc_loss"])
    assert_golden(spec, "grad_toco_feature", features.grad, z["grad_toco_feature"])


def check(size, radius, seed, dtype, block=None):
    attention, features, labels = draw(size, seed, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 3e-6
    cases = [
        (
            lambda x: afa_affinity_loss(x, labels, radius=radius).loss,
            lambda x: reference.afa_affinity_loss(x, reference.token_pairs(labels, radius)),
            attention,
        ),
        (
            lambda x: token_contrast_loss(x, labels).loss,
            lambda x: reference.token_contrast_loss(
                x, reference.token_pairs(labels, diagonal=False)
            ),
            features,
        ),
    ]
    for ours, theirs, x in cases:
        for a, b in zip(with_gradient(ours, x), with_gradient(theirs, x.double()), strict=True):
            np.testing.assert_allclose(a.double(), b, rtol=0, atol=tolerance)


CASES = {
    "size": st.tuples(st.integers(1, 6), st.integers(1, 6)),
    "radius": st.sampled_from([None, 0, 1, 2, 9]),
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


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", 60)
    check((4, 5), 2, 0, torch.float64)


def test_gradcheck():
    attention, features, labels = draw((2, 3))
    labels[0, 0, 0] = 0
    for loss, x in ((afa_affinity_loss, attention), (token_contrast_loss, features)):
        x.requires_grad_()
        assert torch.autograd.gradcheck(lambda y, loss=loss: loss(y, labels).loss, x)


def test_a_single_pair_of_two_classes():
    """Beside 160 000 of one class it must not drown in their rounding."""
    labels = torch.zeros(1, 20, 20, dtype=torch.int64)
    labels[0, 0, 0] = 1
    labels[0, 0, 2:] = labels[0, 1:] = 255
    far = torch.zeros(1, 40, 40, dtype=torch.int64)
    far[0, 0, 0] = 1
    for case, radius in ((labels, None), (far, 1)):
        tokens = case[0].numel()
        attention = torch.rand(1, tokens, tokens, generator=torch.Generator().manual_seed(0))
        loss = afa_affinity_loss(attention, case, radius=radius)
        pairs = attention[0, 0] + attention[0, :, 0]
        near = (1,) if radius is None else (1, 40, 41)
        negative = float(pairs[list(near)].double().sum() / (2 * len(near) + 1))
        assert int(loss.negatives) == 2 * len(near) + 1
        grad = torch.autograd.functional.vjp(
            lambda a, case=case, radius=radius: afa_affinity_loss(a, case, radius=radius).loss,
            attention,
        )[1]
        positive = 2 * float(loss.loss) - negative
        expected = 1 - float((attention * -grad.clamp(max=0)).double().sum()) * 2
        expected -= 1 / int(loss.positives)  # the count is one more than the pairs
        assert positive == pytest.approx(expected, abs=3e-6)


def test_counts_are_whole_and_without_gradient():
    attention, _, labels = draw()
    loss = afa_affinity_loss(attention.requires_grad_(), labels)
    pairs = reference.token_pairs(labels)
    assert int(loss.positives) == int((pairs == 1).sum()) + 1
    assert int(loss.negatives) == int((pairs == 0).sum()) + 1
    assert not loss.positives.requires_grad


def test_autocast_does_not_lower_the_precision():
    attention, features, labels = (x.float() if x.is_floating_point() else x for x in draw())
    for loss, x in ((afa_affinity_loss, attention), (token_contrast_loss, features)):
        plain = loss(x, labels).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss(x, labels).loss == plain
            assert loss(x.bfloat16(), labels).loss.dtype == torch.float32


def test_nothing_known_and_zero_tokens():
    attention, features, labels = draw()
    nothing = torch.full_like(labels, 255)
    value, grad = with_gradient(lambda x: afa_affinity_loss(x, nothing).loss, attention)
    assert value == 0 and not grad.any()
    value, grad = with_gradient(lambda x: token_contrast_loss(x, nothing).loss, features)
    assert value == 0.5 and not grad.any()
    features[:, :, 0] = 0
    value, grad = with_gradient(lambda x: token_contrast_loss(x, labels).loss, features)
    assert torch.isfinite(value) and torch.isfinite(grad).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, f, p: afa_affinity_loss(a[:, 1:], p), "attention must be"),
        (lambda a, f, p: afa_affinity_loss(a.long(), p), "floating"),
        (lambda a, f, p: afa_affinity_loss(a, p.float()), "integers"),
        (lambda a, f, p: afa_affinity_loss(a, p, radius=-1), "radius"),
        (lambda a, f, p: token_contrast_loss(f[..., 1:], p), "features must be"),
        (lambda a, f, p: token_contrast_loss(f, p[0]), r"\[B, h, w\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(*draw())
