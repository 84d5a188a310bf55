"""Invariants of the single losses and of the reconstructed mode."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from wsis.errors import InputError
from wsis.losses import RtcWeights, rtc_losses, segmentation_loss, supervised_losses
from wsis.losses.classification import min_pooling, multilabel_soft_margin
from wsis.losses.contrast import (
    batch_positions,
    pixel_labels,
    prototype_nce,
    prototypes,
    top_positions,
)
from wsis.losses.equivariance import (
    equivariance,
    hardest_mean,
    on_common_grid,
    present_classes,
    take_channels,
)
from wsis.types import Maps


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_maps(batch, classes, grid, seed, *, crr=True, decode=True):
    cams = (rand(batch, classes, *grid, seed=seed) * 4 - 2).requires_grad_()
    return Maps(
        cams=cams,
        class_logits=cams.mean(dim=(2, 3)),
        features=rand(batch, 8, *grid, seed=seed + 1).requires_grad_(),
        refined=rand(batch, classes + 1, *grid, seed=seed + 2).requires_grad_() if crr else None,
        logits=rand(batch, classes + 1, *grid, seed=seed + 3).requires_grad_() if decode else None,
    )


LABEL = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 0, 1, 1, 0]])


def test_present_classes_padded_to_the_fullest_image():
    index, present = present_classes(LABEL)
    assert index[0, :2].tolist() == [0, 3]
    assert index[2].tolist() == [0, 2, 3]
    assert present.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    index, present = present_classes(torch.zeros(2, 4))
    assert index.shape == (2, 1)
    assert not present.any()


def test_dropping_absent_classes_changes_nothing():
    maps = rand(3, 5, 6, 7, seed=1) - 0.3
    index, present = present_classes(LABEL)
    short = on_common_grid(take_channels(maps, index), present, (9, 9))
    full = on_common_grid(maps, LABEL, (9, 9))
    other_short, other_full = short.flip(-1) ** 2, full.flip(-1) ** 2
    assert torch.allclose(
        equivariance(short, other_short, 5), (full - other_full).abs().mean(), atol=1e-7
    )
    for keep in (0.02, 0.2, 0.9):
        count = int(keep * 5 * 81)
        expected = (full - other_full).abs().flatten(1).topk(count).values.mean()
        assert torch.allclose(hardest_mean((short - other_short).abs(), 5, keep), expected)


def test_equivariance_of_equal_views_is_zero():
    maps = on_common_grid(rand(2, 3, 5, 5), torch.ones(2, 3), (5, 5))
    assert equivariance(maps, maps, 3) == 0


def test_soft_margin_is_binary_cross_entropy():
    logits = rand(3, 5, seed=2) * 6 - 3
    expected = F.binary_cross_entropy_with_logits(logits, LABEL)
    assert torch.allclose(multilabel_soft_margin(logits, LABEL), expected)


def test_min_pooling_takes_the_smallest_quarter():
    refined = torch.arange(8.0).view(1, 1, 2, 4).repeat(1, 2, 1, 1)
    refined[:, 1] += 100
    assert min_pooling(refined, torch.tensor([[1.0, 0.0]])) == 0.5
    assert min_pooling(refined, torch.tensor([[0.0, 1.0]])) == 100.5
    assert min_pooling(refined[..., :1, :1], torch.ones(1, 2)) == 100  # at least one position


def test_nce_of_identical_prototypes_is_log_of_their_number():
    features = F.normalize(rand(10, 8), dim=1)
    same = F.normalize(torch.ones(21, 8), dim=1)
    labels = torch.arange(10)
    loss = prototype_nce(features, same, torch.ones(21, dtype=torch.bool), labels)
    assert loss.item() == pytest.approx(math.log(21), rel=1e-6)
    valid = torch.arange(21) < 5  # invalid classes leave the denominator, their pixels the mean
    loss = prototype_nce(features, same, valid, labels)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)
    assert prototype_nce(features, same, ~torch.ones(21, dtype=torch.bool), labels) == 0


def test_ties_go_to_the_lowest_position():
    scores = torch.full((2, 3, 5, 5), 0.2)
    scores[1, 1, 3, 2] = 0.9
    top = top_positions(scores, torch.ones(2, 2), 4)
    assert top.index[0].tolist() == [0, 1, 2, 3]
    assert top.index[1].tolist() == [25 + 17, 0, 1, 2]


def test_confident_background_ranks_by_what_no_class_claims():
    scores = torch.full((1, 3, 2, 2), 0.2)
    scores[0, 1] = torch.tensor([[0.9, 0.1], [0.5, 0.3]])
    scores[0, 2] = 1.0  # absent: must not count
    top = top_positions(scores, torch.tensor([[1, 0]]), 2, background="confident")
    assert top.index[0].tolist() == [1, 3]
    assert top.value[0].tolist() == pytest.approx([0.9, 0.7])


def test_masked_positions_come_from_images_of_the_class():
    scores = rand(3, 6, 4, 4)
    top = top_positions(scores, LABEL, 3, mask_by_label=True)
    assert top.valid.tolist() == [True, True, False, True, True, False]
    for c in top.valid.nonzero().flatten()[1:].tolist():
        assert LABEL[top.index[c] // 16, c - 1].all()
    vectors, valid = prototypes(top, batch_positions(rand(3, 8, 4, 4)))
    assert torch.equal(valid, top.valid)
    assert torch.allclose(vectors[valid].norm(dim=1), torch.ones(4))
    assert vectors.isfinite().all()


def test_pixel_labels_prefer_background_on_ties():
    scores = torch.tensor([0.2, 0.2, 0.9]).view(1, 3, 1, 1)
    assert pixel_labels(scores, torch.tensor([[1, 0]])).item() == 0
    assert pixel_labels(scores, torch.tensor([[1, 1]])).item() == 2


def test_segmentation_is_zero_when_a_class_is_missing():
    logits = rand(1, 3, 4, 4).requires_grad_()
    masks = torch.zeros(1, 8, 8, dtype=torch.int64)
    masks[0, :2], masks[0, 2:4] = 1, 255
    label = torch.tensor([[1, 1]])
    loss = segmentation_loss(logits, masks, label)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    assert segmentation_loss(logits, masks, torch.tensor([[1, 0]])) > 0
    assert segmentation_loss(logits, masks, label, gate=False) > 0


def test_segmentation_matches_the_formula_image_by_image():
    g = torch.Generator().manual_seed(3)
    logits, label = rand(3, 3, 5, 7, seed=5), torch.tensor([[1, 1], [1, 0], [0, 1]])
    masks = torch.randint(0, 3, (3, 5, 7), generator=g)
    masks[torch.rand(3, 5, 7, generator=g) < 0.2] = 255
    masks[1][masks[1] == 2] = 0
    masks[2] = 255  # nothing labelled: gated out
    total = 0.0
    for n in range(2):
        kept = masks[n] != 255
        m, shares = kept.sum(), [(masks[n] == c).sum() for c in range(3)]
        for y, x in kept.nonzero().tolist():
            c = masks[n, y, x]
            weight = (m - shares[c]) / (1 + m)
            total += weight * -F.log_softmax(logits[n, :, y, x], dim=0)[c] / 35
    assert torch.allclose(segmentation_loss(logits, masks, label), total / 3)
    plain = F.cross_entropy(logits, masks, ignore_index=255, reduction="none").mean()
    ungated = segmentation_loss(logits, masks, label, gate=False, balance=False)
    assert torch.allclose(ungated, plain)


def test_supervised_losses():
    maps = make_maps(3, 5, (4, 4), 7)
    masks = torch.full((3, 8, 8), 255)
    masks[0, 0, 0] = 3
    losses = supervised_losses(maps, LABEL, masks)
    up = F.interpolate(maps.logits, (8, 8), mode="bilinear", align_corners=True)
    assert torch.allclose(losses["seg"], F.cross_entropy(up, masks, ignore_index=255))
    assert torch.allclose(losses["total"], losses["cls"] + losses["seg"])
    assert supervised_losses(maps, LABEL, torch.full_like(masks, 255))["seg"] == 0


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"er": 1.0}, {"cams"}),
        ({"com": 1.0}, {"cams"}),
        ({"cls": 1.0}, {"cams"}),
        ({"min_pool": 1.0}, {"refined"}),
        ({"ecr": 1.0}, {"refined"}),
        ({"ctr": 1.0}, {"features"}),
        ({"seg": 1.0}, {"logits"}),
    ],
)
def test_gradient_routing(weights, expected):
    off = dict.fromkeys(("cls", "min_pool", "er", "ecr", "ctr", "com", "seg"), 0.0)
    views = make_maps(3, 5, (7, 5), 11), make_maps(3, 5, (4, 3), 21, decode=False)
    masks = torch.randint(0, 6, (3, 14, 10), generator=torch.Generator().manual_seed(1))
    losses = rtc_losses(
        *views,
        LABEL,
        image_size=(28, 20),
        view2_size=(12, 9),
        pseudo_masks=_resized(masks),
        weights=replace(RtcWeights(seg_gate=False), **(off | weights)),
    )
    losses["total"].backward()
    reached = set()
    for view in views:
        for name in ("cams", "features", "refined", "logits"):
            tensor = getattr(view, name)
            if tensor is not None and tensor.grad is not None and tensor.grad.any():
                reached.add(name)
    assert reached == expected


def _resized(masks):
    return F.interpolate(masks[:, None].float(), (28, 20), mode="nearest")[:, 0].long()


@pytest.mark.parametrize("weights", [RtcWeights.official(), RtcWeights.reconstructed()])
@pytest.mark.parametrize(("grid1", "grid2"), [((7, 5), (3, 3)), ((1, 1), (1, 1)), ((4, 4), (6, 6))])
@pytest.mark.parametrize("empty", [False, True])
def test_finite_at_odd_sizes_and_for_empty_maps(weights, grid1, grid2, empty):
    views = make_maps(3, 5, grid1, 31), make_maps(3, 5, grid2, 41, decode=False)
    if empty:
        with torch.no_grad():
            for view in views:
                view.refined.zero_()
                view.cams.fill_(-1)
                view.features.zero_()
    masks = torch.full((3, 9, 11), 255)
    losses = rtc_losses(
        *views, LABEL, image_size=(9, 11), view2_size=5, weights=weights, pseudo_masks=masks
    )
    losses["total"].backward()
    assert all(value.isfinite() for value in losses.values())
    for view in views:
        for tensor in (view.cams, view.refined, view.features):
            assert tensor.grad is None or tensor.grad.isfinite().all()


def test_without_refinement_only_the_plain_terms_remain():
    views = [make_maps(3, 5, (4, 4), s, crr=False, decode=False) for s in (51, 61)]
    losses = rtc_losses(*views, LABEL, image_size=(8, 8), view2_size=4)
    assert set(losses) == {"cls", "er", "total"}
    assert torch.allclose(losses["total"], losses["cls"] + losses["er"])


def test_masks_without_decoder_logits_are_refused():
    views = [make_maps(3, 5, (4, 4), s, decode=False) for s in (51, 61)]
    masks = torch.zeros(3, 8, 8, dtype=torch.int64)
    with pytest.raises(InputError, match="no decoder logits"):
        rtc_losses(*views, LABEL, image_size=(8, 8), view2_size=4, pseudo_masks=masks)


def test_one_class():
    views = make_maps(2, 1, (4, 4), 71), make_maps(2, 1, (3, 3), 81, decode=False)
    losses = rtc_losses(
        *views,
        torch.tensor([[1.0], [0.0]]),
        image_size=(8, 8),
        view2_size=6,
        weights=RtcWeights.reconstructed(),
    )
    assert all(value.isfinite() for value in losses.values())


def test_float32_under_autocast_and_for_half_maps():
    views = make_maps(3, 5, (7, 5), 91), make_maps(3, 5, (4, 3), 95, decode=False)
    arguments = {"image_size": (28, 20), "view2_size": (12, 9)}
    expected = rtc_losses(*views, LABEL, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rtc_losses(*views, LABEL, **arguments)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    halves = [
        Maps(
            v.cams.bfloat16(),
            v.class_logits.bfloat16(),
            v.features.bfloat16(),
            v.refined.bfloat16(),
        )
        for v in views
    ]
    half = rtc_losses(*halves, LABEL, **arguments)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert half["total"].item() == pytest.approx(expected["total"].item(), rel=0.05)


def test_presets():
    assert RtcWeights() == RtcWeights.official()
    assert RtcWeights.reconstructed().background_prototype == "confident"
    assert RtcWeights.reconstructed().mask_topk_by_label
