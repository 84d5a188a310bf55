"""rulixiang/afa's and ToCo's affinity functions: golden vectors, arguments that stay, bad input."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from wsis.compat import (
    cams_to_affinity_label,
    get_aff_loss,
    get_mask_by_radius,
    get_masked_ptc_loss,
    get_seg_loss,
    label_to_aff_mask,
    propagte_aff_cam,
    propagte_aff_cam_with_bkg,
)
from wsis.errors import InputError
from wsis.losses.attention import afa_affinity_loss, token_contrast_loss

NAME = "afa_aff_9x11"


@pytest.fixture
def z(golden):
    return {name: torch.from_numpy(value) for name, value in golden(NAME).items()}


@pytest.fixture
def check(golden_spec, assert_golden, z):
    spec = golden_spec(NAME)
    return lambda name, found: assert_golden(spec, name, found, z[name].numpy())


def full_size(labels):
    return labels.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)


def test_golden_propagation(z, check):
    mask = get_mask_by_radius(9, 11, 3)
    check("mask_radius3", mask.astype(np.uint8))
    before = z["aff"].clone()
    check("rw_plain", propagte_aff_cam(z["cam"], aff=z["aff"]))
    check("rw_mask", propagte_aff_cam(z["cam"], z["aff"], mask))
    found = propagte_aff_cam_with_bkg(
        z["cam"], aff=z["aff"], mask=mask, cls_labels=z["cls_label"], bkg_score=0.35
    )
    check("rw_bkg", found[:, [0, 4, 15]])
    absent = torch.cat([torch.zeros(2, 1), 1 - z["cls_label"]], dim=1).bool()
    assert not found[absent].any() and absent.any()
    assert torch.equal(z["aff"], before)  # the original zeroes what the mask excludes


def test_golden_labels_and_loss(z, check):
    pairs = cams_to_affinity_label(full_size(z["grid_label"]), mask=get_mask_by_radius(9, 11, 3))
    assert pairs.dtype == torch.int64
    check("aff_label", pairs)
    prediction = z["aff_pred"].requires_grad_()
    loss, positives, negatives = get_aff_loss(prediction, pairs)
    check("aff_loss", torch.stack([loss.detach().double(), positives, negatives]))
    loss.backward()
    check("grad_aff_pred_item0", prediction.grad[:1])


def test_golden_other_losses(z, check):
    logits = z["seg_logit"].requires_grad_()
    loss = get_seg_loss(logits, z["seg_label"], ignore_index=255)
    loss.backward()
    check("seg_loss", loss.detach()[None])
    check("grad_seg_logit", logits.grad)

    mask = label_to_aff_mask(z["grid_label"].long())
    check("toco_aff_mask", mask)
    features = z["toco_feature"].requires_grad_()
    loss = get_masked_ptc_loss(features, mask)
    loss.backward()
    check("toco_ptc_loss", loss.detach()[None])
    check("grad_toco_feature", features.grad)


def test_the_losses_without_matrices_are_the_same():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 5, 6), generator=g)
    labels[:, 0] = 255
    attention = torch.rand(2, 30, 30, generator=g)
    pairs = cams_to_affinity_label(full_size(labels), get_mask_by_radius(5, 6, 2))
    for a, b in zip(
        get_aff_loss(attention, pairs), afa_affinity_loss(attention, labels, radius=2), strict=True
    ):
        assert float(a) == pytest.approx(float(b), abs=1e-6)
    features = torch.randn(2, 4, 5, 6, generator=g)
    assert float(get_masked_ptc_loss(features, label_to_aff_mask(labels))) == pytest.approx(
        float(token_contrast_loss(features, labels).loss), abs=1e-6
    )


def test_gradient_and_numpy():
    cams, aff = torch.rand(1, 3, 2, 4), torch.rand(1, 8, 8)
    label = torch.tensor([[1.0, 0, 1]])
    cams.requires_grad_()
    propagte_aff_cam_with_bkg(cams, aff, None, label, 0.35).square().sum().backward()
    assert cams.grad[:, [0, 2]].any() and not cams.grad[:, 1].any()
    arrays = [x.detach().numpy() for x in (cams, aff)]
    for function, rest in (
        (propagte_aff_cam, ()),
        (propagte_aff_cam_with_bkg, (None, label.numpy(), 0.35)),
    ):
        out = function(*arrays, *rest)
        assert isinstance(out, np.ndarray)
        tensors = [torch.from_numpy(x) for x in arrays]
        rest = [torch.from_numpy(r) if isinstance(r, np.ndarray) else r for r in rest]
        np.testing.assert_array_equal(out, function(*tensors, *rest))


def test_signatures():
    for function, names in (
        (propagte_aff_cam_with_bkg, ["cams", "aff", "mask", "cls_labels", "bkg_score"]),
        (propagte_aff_cam, ["cams", "aff", "mask"]),
        (cams_to_affinity_label, ["cam_label", "mask", "ignore_index"]),
        (get_mask_by_radius, ["h", "w", "radius"]),
        (get_aff_loss, ["inputs", "targets"]),
        (get_seg_loss, ["pred", "label", "ignore_index"]),
    ):
        assert list(inspect.signature(function).parameters) == names


def test_a_mask_is_the_callers():
    mask = get_mask_by_radius(3, 3, 1)
    mask[:] = 0
    assert get_mask_by_radius(3, 3, 1).any()


def test_losses_of_nothing():
    logits = torch.randn(1, 4, 3, 3).requires_grad_()
    for value in (0, 2, 255):
        label = torch.full((1, 3, 3), value)
        loss = get_seg_loss(logits, label)
        assert torch.isfinite(loss) and (loss > 0) == (value != 255)
    nothing = torch.full((1, 4, 4), 255)
    assert get_aff_loss(torch.rand(1, 4, 4), nothing)[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, a: propagte_aff_cam(c), "aff be given"),
        (lambda c, a: propagte_aff_cam(c, a[:, 1:]), "aff must be"),
        (lambda c, a: propagte_aff_cam_with_bkg(c, a), "bkg_score"),
        (lambda c, a: propagte_aff_cam_with_bkg(c, a, None, torch.ones(1, 2), 0.3), "cls_labels"),
        (lambda c, a: cams_to_affinity_label(torch.zeros(1, 15, 32)), "at least 16"),
        (lambda c, a: cams_to_affinity_label(torch.zeros(1, 32, 32), torch.ones(3, 3)), "mask"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.rand(1, 3, 2, 4), torch.rand(1, 8, 8))
