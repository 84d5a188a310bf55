"""RTC's whole loss step against the released code: values, gradients, masks, prototypes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsis.losses import RtcWeights, rtc_losses
from wsis.losses.classification import min_pooling, multilabel_soft_margin
from wsis.losses.compensator import compensate, compensation
from wsis.losses.contrast import (
    batch_positions,
    pixel_labels,
    prototype_nce,
    prototypes,
    top_positions,
)
from wsis.losses.equivariance import (
    cross_refinement,
    on_common_grid,
    present_classes,
    resize,
    take_channels,
)
from wsis.ops.normalize import ctr_scores
from wsis.pseudo import make_pseudo_masks, refined_or_cam_scores
from wsis.types import Maps

FILES = ["rtc_step_s112_n3", "rtc_step_ep0_n3", "rtc_step_s448_n1"]
LEAVES = {"cams": "cam_low", "refined": "cam_rv_down", "features": "f_proj", "logits": "seg_mask"}
VIEW2 = (128, 128)
# Term of the released code -> sum of ours.
TERMS = {
    "loss_cls": ("cls", "min_pool"),
    "loss_er": ("er",),
    "loss_ecr": ("ecr",),
    "loss_struct": ("com",),
    "loss_intra_nce": ("ctr_intra",),
    "loss_cross_nce1": ("ctr_label",),
    "loss_cross_nce2": ("ctr_prototype",),
    "loss_nce": ("ctr_intra", "ctr_label", "ctr_prototype"),
    "loss_seg": ("seg",),
    "loss": ("total",),
}


class Step:
    """One golden file as tensors: leaves with gradient, maps of both views, masks."""

    def __init__(self, z, spec):
        self.z, self.spec = z, spec
        self.size = tuple(spec["params"]["image_size"])
        self.seg = spec["params"]["epoch_index"] >= 7
        self.label = torch.from_numpy(z["label"])
        names = [f"{name}{view}" for name in list(LEAVES.values())[:3] for view in (1, 2)]
        names += ["seg_mask"] if "seg_mask" in z else []
        self.leaves = {name: torch.from_numpy(z[name]).requires_grad_() for name in names}
        self.views = [self.maps(1, self.size), self.maps(2, VIEW2)]

    def maps(self, view, size):
        cams = self.leaves[f"cam_low{view}"][:, 1:]
        return Maps(
            cams=cams,
            class_logits=resize(cams, size).mean(dim=(2, 3)),
            features=self.leaves[f"f_proj{view}"],
            refined=self.leaves[f"cam_rv_down{view}"],
            logits=self.leaves.get("seg_mask") if view == 1 else None,
        )

    def losses(self):
        masks = torch.from_numpy(self.z["seg_label"]).long() if self.seg else None
        return rtc_losses(
            *self.views,
            self.label,
            image_size=self.size,
            view2_size=128,
            weights=RtcWeights.official(),
            pseudo_masks=masks,
        )

    def expected(self):
        return dict(zip(self.spec["params"]["terms"], self.z["loss_values"], strict=True))

    def check(self, actual):
        tolerance, expected = self.spec["tolerance"], self.expected()
        for name, value in actual.items():
            bound = tolerance["atol"] + tolerance["rtol"] * abs(expected[name])
            assert abs(float(value) - expected[name]) <= bound, name


@pytest.fixture(params=FILES)
def step(request, golden, golden_spec):
    return Step(golden(request.param), golden_spec(request.param))


def test_terms_and_gradients(step, assert_golden):
    losses = step.losses()
    assert ("seg" in losses) == step.seg
    for name, parts in TERMS.items():
        if name == "loss_seg" and not step.seg:
            assert step.expected()[name] == 0
            continue
        value = sum(losses[part] for part in parts)
        step.check({name: value.detach()})
        keys = {leaf: f"grad_{name}__{leaf}" for leaf in step.leaves}
        keys = {leaf: key for leaf, key in keys.items() if key in step.z}
        gradients = torch.autograd.grad(
            value, list(step.leaves.values()), retain_graph=True, allow_unused=True
        )
        for (leaf, tensor), gradient in zip(step.leaves.items(), gradients, strict=True):
            gradient = torch.zeros_like(tensor) if gradient is None else gradient
            if leaf in keys:
                assert_golden(step.spec, keys[leaf], gradient.numpy(), step.z[keys[leaf]])
            elif keys:
                assert not gradient.any(), f"{name} reaches {leaf}"


def test_per_view_terms(step):
    index, present = present_classes(step.label)
    index_all = F.pad(index + 1, (1, 0))
    present_all = F.pad(present, (1, 0), value=1)
    actual, cams, refined = {}, [], []
    with torch.no_grad():
        for v, (view, size) in enumerate(zip(step.views, (step.size, VIEW2), strict=True)):
            actual[f"loss_cls{v + 1}"] = multilabel_soft_margin(view.class_logits, step.label)
            up = resize(take_channels(view.refined, index_all), size)
            actual[f"loss_rvmin{v + 1}"] = min_pooling(up[:, 1:], present)
            refined.append(on_common_grid(up, present_all, VIEW2))
            up = resize(take_channels(view.cams, index), size)
            cams.append(on_common_grid(up, present, VIEW2))
        actual["loss_ecr1"] = cross_refinement(cams[1], refined[0], 20)
        actual["loss_ecr2"] = cross_refinement(cams[0], refined[1], 20)

        grid = step.views[1].features.shape[-2:]
        features = [batch_positions(resize(v.features, grid)) for v in step.views]
        units = [F.normalize(x, dim=1) for x in features]
        scores = [ctr_scores(resize(v.refined, grid)) for v in step.views]
        labels = [pixel_labels(s, step.label) for s in scores]
        tops = [top_positions(s, step.label, 32) for s in scores]
        anchors = [prototypes(tops[0], features[1]), prototypes(tops[1], features[0])]
        classes = step.label.any(dim=0).nonzero().flatten() + 1
        for v, other in ((0, 1), (1, 0)):
            name = f"{v + 1}"
            actual[f"loss_intra_nce_{name}"] = prototype_nce(units[v], *anchors[v], labels[v])
            actual[f"loss_cross_nce1_{name}"] = prototype_nce(units[v], *anchors[v], labels[other])
            actual[f"loss_cross_nce2_{name}"] = prototype_nce(units[v], *anchors[other], labels[v])
            completed = compensate(scores[v], tops[v], units[other], units[other], classes)
            actual[f"loss_struct{name}"] = compensation(cams[v], completed, index, present, 20)
    step.check(actual)


def test_scores_labels_positions_prototypes(step, assert_golden):
    grid = step.views[1].features.shape[-2:]
    with torch.no_grad():
        features = [batch_positions(resize(v.features, grid)) for v in step.views]
        for v, other in ((0, 1), (1, 0)):

            def check(name, actual, v=v):
                assert_golden(step.spec, f"{name}{v + 1}", actual.numpy(), step.z[f"{name}{v + 1}"])

            scores = ctr_scores(resize(step.views[v].refined, grid))
            check("scores", scores)
            check("pseudo_label", pixel_labels(scores, step.label))
            top = top_positions(scores, step.label, 32)
            np.testing.assert_array_equal(top.index.numpy(), step.z[f"top_indices{v + 1}"])
            vectors, valid = prototypes(top, features[other])
            assert valid.all()
            check("prototypes", vectors)
            channels = torch.tensor(step.spec["params"]["new_cam_channels"])
            present = torch.cat([torch.ones(1), step.label.amax(dim=0)]).nonzero().flatten()
            unit = F.normalize(features[other], dim=1)
            check("new_cam_rv_down", compensate(scores, top, unit, unit, present)[:, channels])


@pytest.mark.parametrize("step", [FILES[0], FILES[2]], indirect=True)  # those with masks
def test_pseudo_masks_of_the_step(step, assert_golden):
    image = torch.from_numpy(step.z["image_u8"]).permute(0, 3, 1, 2).float() / 255
    box = torch.from_numpy(step.z["img_box"])
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    for b, (y0, y1, x0, x1) in enumerate(box.tolist()):  # padding is 0 after normalisation
        inside = torch.zeros(step.size, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        image[b] = torch.where(inside, image[b], mean)
    scores = refined_or_cam_scores(step.views[0], step.label, step.size)
    masks = make_pseudo_masks(scores, image, step.label, box)
    assert_golden(step.spec, "seg_label", masks.numpy(), step.z["seg_label"])
    shown = torch.tensor([len(m[m != 255].unique()) for m in masks])
    gate = shown == step.label.sum(dim=1) + 1
    np.testing.assert_array_equal(gate.numpy(), step.z["gate"])


def test_weights_scale_and_drop_terms(step):
    ours = step.losses()
    weights = replace(RtcWeights(), cls=2.0, ctr=0.0, com=0.0, seg=0.0)
    fewer = rtc_losses(
        *step.views, step.label, image_size=step.size, view2_size=VIEW2, weights=weights
    )
    assert set(fewer) == {"cls", "er", "min_pool", "ecr", "total"}
    expected = 2 * ours["cls"] + ours["er"] + ours["min_pool"] + ours["ecr"]
    assert torch.allclose(fewer["total"], expected)
