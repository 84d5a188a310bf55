"""Training on one label per image: maps of the batch's classes alone, equal to those of all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from wsis.config import PseudoConfig
from wsis.data.views import second_view
from wsis.engine.step import Siamese, object_masks, pseudo_masks, weak_losses
from wsis.losses import RtcWeights, rtc_losses
from wsis.losses.classification import single_label
from wsis.models.backbones import create_backbone
from wsis.models.rtc import RTC
from wsis.types import Batch

WEIGHTS = replace(RtcWeights.reconstructed(), classification="single")
PSEUDO = PseudoConfig(high=0.3, low=0.2, iterations=2, dilations=(1, 2))
SIDE, VIEW2 = 64, 48


def make_model(classes, *, decoder="object", seed=0):
    torch.manual_seed(seed)
    backbone = create_backbone("small")
    dims = {"crr_dims": (8, 8, 8, 8), "decoder_dims": (8, 8, 8, 8), "feature_dim": 12}
    free = {"dropout": 0.0, "freeze_stem": False, "freeze_bn": True}
    return RTC(backbone, classes, decoder=decoder, **dims, **free)


def make_batch(class_ids, classes, side=SIDE):
    torch.manual_seed(1)
    count = len(class_ids)
    label = F.one_hot(torch.tensor(class_ids), classes).float()
    box = torch.tensor([[0, side, 2, side]] * count)
    return Batch(torch.randn(count, 3, side, side), label, box, torch.arange(count))


def step_losses(model, batch, weights=WEIGHTS, *, segment=True):
    return weak_losses(
        Siamese(model), model, batch, view2_size=VIEW2, weights=weights, pseudo=PSEUDO,
        segment=segment,
    )  # fmt: skip


def test_cross_entropy():
    logits, label = torch.randn(4, 5), F.one_hot(torch.tensor([0, 4, 2, 2]), 5)
    expected = -(logits.exp() / logits.exp().sum(1, keepdim=True)).log()[label > 0].mean()
    torch.testing.assert_close(single_label(logits, label), expected)


def test_maps_of_some_classes_are_those_of_all():
    model, image = make_model(9), torch.randn(5, 3, SIDE, SIDE)
    classes = torch.tensor([1, 4, 7])
    some, every = model(image, classes=classes), model(image)
    torch.testing.assert_close(some.cams, every.cams[:, classes], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some.class_logits, every.class_logits, atol=1e-5, rtol=1e-5)
    kept = torch.tensor([0, 2, 5, 8])
    torch.testing.assert_close(some.refined, every.refined[:, kept], atol=1e-5, rtol=1e-5)
    assert some.logits.shape == (5, 2, SIDE // 4, SIDE // 4)
    assert not some.refined.allclose(every.refined[:, [0, 1, 2, 3]])


def test_logits_are_not_rounded_to_half_precision():
    model, image = make_model(9), torch.randn(2, 3, SIDE, SIDE)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image, classes=torch.tensor([1])).class_logits
    assert logits.dtype == torch.float32 and not logits.equal(logits.bfloat16().float())


@pytest.mark.parametrize("class_ids", [[3, 3, 3, 3], [0, 5, 2, 5], [6, 1, 0, 3]])
def test_losses_and_gradients_are_those_of_all_classes(class_ids):
    """Prototypes of absent classes take no part, so leaving their maps out changes nothing."""
    batch, results = make_batch(class_ids, 7), []
    for compact in (True, False):
        model = make_model(7)
        views = [batch.image, second_view(batch.image, VIEW2)]
        classes = torch.tensor(sorted(set(class_ids))) if compact else None
        maps = [model(view, classes=classes) for view in views]
        losses = rtc_losses(
            *maps, batch.label, image_size=(SIDE, SIDE), view2_size=VIEW2, weights=WEIGHTS,
            classes=classes,
        )  # fmt: skip
        losses["total"].backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    (some, some_grad), (every, every_grad) = results
    assert some.keys() == every.keys() > {"cls", "er", "ecr", "ctr_intra", "com", "min_pool"}
    for name in every:
        torch.testing.assert_close(some[name], every[name], atol=1e-6, rtol=1e-4, msg=name)
    assert some_grad.keys() == every_grad.keys()
    for name, gradient in every_grad.items():
        bound = 1e-3 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(some_grad[name], gradient, atol=bound, rtol=0, msg=name)


def test_terms_count_all_classes():
    """L_er is a mean over K classes: twice the classes, half the loss."""
    model, own = make_model(8), torch.tensor([2])
    maps = [model(torch.randn(2, 3, side, side), classes=own) for side in (SIDE, VIEW2)]
    values = []
    for count in (8, 16):
        label = F.one_hot(torch.tensor([2, 2]), count).float()
        logits = torch.randn(2, count)
        wide = [replace(m, class_logits=logits) for m in maps]
        values.append(
            rtc_losses(
                *wide, label, image_size=(SIDE, SIDE), view2_size=VIEW2, weights=WEIGHTS,
                classes=torch.tensor([2]),
            )["er"]
        )  # fmt: skip
    torch.testing.assert_close(values[0], 2 * values[1])


def test_masks_are_of_the_labelled_class():
    """As pseudo masks of all classes, with every class called 1."""
    model, batch = make_model(6), make_batch([4, 0, 4, 5], 6)
    classes = torch.tensor([0, 4, 5])
    expected = pseudo_masks(model, batch, model(batch.image), PSEUDO)
    actual = object_masks(model, batch, model(batch.image, classes=classes), classes, PSEUDO)
    assert set(actual.unique().tolist()) <= {0, 1, 255} and (actual == 1).any()
    expected = torch.where((expected > 0) & (expected < 255), 1, expected)
    assert (actual != expected).double().mean() < 1e-3


ROUTES = {  # term -> parts of the network that it teaches
    "cls": {"backbone", "head"},
    "er": {"backbone", "head"},
    "com": {"backbone", "head"},
    "min_pool": {"crr"},
    "ecr": {"crr"},
    "ctr_intra": {"backbone", "projection"},
    "ctr_label": {"backbone", "projection"},
    "ctr_prototype": {"backbone", "projection"},
    "seg": {"backbone", "decoder"},
}


def test_gradient_routing():
    model, batch = make_model(7), make_batch([0, 5, 2, 5], 7)
    losses = step_losses(model, batch, replace(WEIGHTS, seg_gate=False))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for term, parts in ROUTES.items():
        gradients = torch.autograd.grad(
            losses[term], parameters.values(), retain_graph=True, allow_unused=True
        )
        touched = set()
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and gradient.any():
                part = name.split(".")[0]
                touched.add("projection" if name.startswith("head.projection") else part)
        parts = parts | ({"projection"} if "head" in parts else set())
        assert touched == parts, term


def test_absent_classes_learn_from_classification_only():
    model, batch = make_model(7), make_batch([0, 5], 7)
    losses = step_losses(model, batch, segment=False)
    weight = model.head.classifier.weight
    rest = losses["total"] - losses["cls"]
    gradient = torch.autograd.grad(rest, weight, retain_graph=True)[0].flatten(1)
    assert gradient.any(dim=1).nonzero().flatten().tolist() == [1, 6]
    gradient = torch.autograd.grad(losses["cls"], weight)[0].flatten(1)
    assert gradient[1:].any(dim=1).all() and not gradient[0].any()


def test_memory_is_flat_in_the_number_of_classes():
    """Peak of one step, in bytes: 1000 classes cost little more than 10."""
    peaks = {}
    for count in (10, 1000):
        model, batch = make_model(count), make_batch([1, 7, 3, 9, 1, 0, 2, 8], count)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
            step_losses(model, batch)["total"].backward()
        held = peak = 0
        for event in log.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks[count] = peak
    every = 8 * 1000 * 8 * 8 * 4  # one map of each class of each image
    assert peaks[1000] - peaks[10] < every / 2, peaks
