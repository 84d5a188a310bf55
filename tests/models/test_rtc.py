"""RTC's heads: against the recorded refinement, and the promises of Maps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsis.errors import InputError
from wsis.models.backbones import create_backbone
from wsis.models.crr import CrossRefinement
from wsis.models.features import Features
from wsis.models.head import CamHead, mean_of_resized
from wsis.models.rtc import RTC

MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])
SMALL = {
    "feature_dim": 16,
    "crr_dims": (4, 6, 8, 10),
    "decoder_dims": (16, 12, 6, 10),
    "freeze_stem": False,
    "freeze_bn": False,
}


def small_rtc(**changes):
    torch.manual_seed(0)
    return RTC(create_backbone("small"), 3, **{**SMALL, **changes})


@pytest.mark.parametrize(
    "name",
    [
        "rtc_fcm_a_n2_k21_12x15",
        "rtc_fcm_b_n1_k21_28x28",
        "rtc_fcm_c_n1_k2_33x41",
        "rtc_fcm_d_n1_k81_9x7",
    ],
)
def test_golden_refinement(name, golden, golden_spec, assert_golden):
    data, spec = golden(name), golden_spec(name)
    image = torch.from_numpy((data["image_u8"].astype(np.float32) / 255 - MEAN) / STD)
    image = image.permute(0, 3, 1, 2)
    cam, *stages = (
        torch.from_numpy(data[key]).requires_grad_() for key in ("cam", "conv4", "conv5", "conv6")
    )
    features = Features(torch.zeros(1), *stages)
    weights = {
        "w_f8_3": "reduce4",
        "w_f8_4": "reduce5",
        "w_f8_5": "reduce6",
        "w_f9_1": "deep",
        "w_f9_2": "shallow",
    }
    dims = tuple(data[key].shape[0] for key in weights)[:4]
    crr = CrossRefinement((1, *(stage.shape[1] for stage in stages)), dims=dims)
    for key, layer in weights.items():
        getattr(crr, layer).weight.data = torch.from_numpy(data[key])[:, :, None, None]
    refined = crr(cam[:, 1:], image, features)
    assert_golden(spec, "cam_rv_down", refined.detach(), data["cam_rv_down"])
    refined.backward(torch.from_numpy(data["upstream"]))
    for key, layer in weights.items():
        gradient = getattr(crr, layer).weight.grad[:, :, 0, 0]
        assert_golden(spec, f"grad_{key}", gradient, data[f"grad_{key}"])
    assert all(x.grad is None for x in (cam, *stages))


@pytest.mark.parametrize(
    ("grid", "size"), [((1, 1), (7, 5)), ((7, 5), (50, 33)), ((5, 6), (5, 6)), ((8, 9), (3, 1))]
)
def test_class_logits_are_the_mean_of_the_resized_cams(grid, size):
    maps = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0))
    maps = maps.double().requires_grad_()
    expected = F.interpolate(maps, size=size, mode="bilinear", align_corners=True).mean((2, 3))
    actual = mean_of_resized(maps, size)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    weight = torch.arange(6.0).view(2, 3).double()
    wanted, got = (torch.autograd.grad((x * weight).sum(), maps)[0] for x in (expected, actual))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_resize_weights_made_in_inference_mode_still_train():
    maps = torch.randn(1, 2, 11, 13, requires_grad=True)
    with torch.inference_mode():
        mean_of_resized(maps, (101, 103))
    mean_of_resized(maps, (101, 103)).sum().backward()
    assert maps.grad.sum().item() == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("size", [(64, 48), (7, 5), (1, 1), (57, 75)])
def test_maps_of_odd_sizes(size):
    model = small_rtc().eval()
    with torch.no_grad():
        maps = model(torch.randn(2, 3, *size))
    h, w = (-(-side // 8) for side in size)
    h4, w4 = (-(-side // 4) for side in size)
    assert maps.cams.shape == (2, 3, h, w)
    assert maps.class_logits.shape == (2, 3)
    assert maps.features.shape == (2, 16, h, w)
    assert maps.features.min() >= 0
    assert maps.refined.shape == (2, 4, h, w)
    assert 0 <= maps.refined.min() <= maps.refined.max() <= 1
    assert maps.logits.shape == (2, 4, h4, w4)


def test_one_class_and_parts_left_out():
    model = RTC(create_backbone("small"), 1, crr=False, **SMALL)
    maps = model(torch.randn(2, 3, 32, 24), decode=False)
    assert model.crr is None
    assert maps.refined is None
    assert maps.logits is None
    assert maps.cams.shape == (2, 1, 4, 3)
    assert model.num_classes == 1


def test_second_view_equals_a_call_of_its_own():
    model = small_rtc().eval()
    image = torch.randn(2, 3, 40, 56)
    both, alone = model(image), model(image, decode=False)
    assert torch.equal(both.cams, alone.cams)
    assert torch.equal(both.refined, alone.refined)


def test_channels_last_gives_the_same_maps():
    model = small_rtc().eval()
    image = torch.randn(2, 3, 33, 41)
    expected = model(image)
    model = model.to(memory_format=torch.channels_last)
    actual = model(image.contiguous(memory_format=torch.channels_last))
    for field in ("cams", "class_logits", "features", "refined", "logits"):
        torch.testing.assert_close(
            getattr(actual, field), getattr(expected, field), rtol=1e-3, atol=1e-4
        )


def test_half_precision_comes_back_in_single():
    with torch.autocast("cpu", torch.bfloat16):
        maps = small_rtc()(torch.randn(2, 3, 32, 32))
    for field in ("cams", "class_logits", "features", "refined", "logits"):
        assert getattr(maps, field).dtype == torch.float32


def test_gradients_go_where_the_method_sends_them():
    model = small_rtc()
    image = torch.randn(2, 3, 48, 48)
    model(image).refined.square().sum().backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"crr"}
    model.zero_grad()
    model(image).class_logits.sum().backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"backbone", "head"}
    gradient = model.head.classifier.weight.grad
    assert not gradient[0].any()
    assert gradient[1:].any()
    model.zero_grad()
    model(image).logits.sum().backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"backbone", "decoder"}


@pytest.mark.parametrize("freeze_stem", [False, True])
@pytest.mark.parametrize("freeze_bn", [False, True])
def test_freezing(freeze_stem, freeze_bn):
    model = RTC(
        create_backbone("efficientnet_lite0_320"),
        2,
        **{**SMALL, "freeze_stem": freeze_stem, "freeze_bn": freeze_bn},
    )
    model.eval().train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model(torch.randn(2, 3, 64, 64))
    after = model.backbone.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    in_stem = {name.startswith(("stem.", "stages.0.")) for name in moved}
    assert in_stem == (set() if freeze_bn else {False} if freeze_stem else {False, True})
    names = [name for name, _ in model.pretrained_parameters()]
    assert all(name.startswith("backbone.") for name in names)
    assert any("stem" in name for name in names) == (not freeze_stem)
    assert any("norm" in name for name in names) == (not freeze_bn)
    new = [name for name, _ in model.new_parameters()]
    assert {name.split(".")[0] for name in new} == {"head", "crr", "decoder"}
    assert sum(name.endswith("bias") for name in new) == 2


def test_dropout_only_in_training():
    torch.manual_seed(0)
    head = CamHead(32, 2, feature_dim=8, dropout=0.5)
    conv6 = torch.rand(1, 32, 3, 3)
    assert not torch.equal(head(conv6)[0], head(conv6)[0])
    head.eval()
    assert torch.equal(head(conv6)[0], head(conv6)[0])


def test_a_direct_classifier_reads_the_features_themselves():
    model = small_rtc(cam_direct=True)
    image = torch.randn(2, 3, 48, 48)
    assert model.head.classifier.weight.shape == (4, model.backbone.channels[3], 1, 1)
    maps = model.eval()(image)
    conv6 = model.backbone(image).conv6
    expected = F.conv2d(conv6, model.head.classifier.weight[1:])
    torch.testing.assert_close(maps.cams, expected)
    assert maps.features.shape[1] == SMALL["feature_dim"]
    some = model(image, classes=torch.tensor([2, 0]))
    torch.testing.assert_close(some.cams, maps.cams[:, [2, 0]])
    torch.testing.assert_close(some.class_logits, maps.class_logits, rtol=1e-4, atol=1e-5)
    model.train()(image).class_logits.sum().backward()
    reached = {name for name, p in model.head.named_parameters() if p.grad is not None}
    assert reached == {"classifier.weight"}
    assert any(p.grad is not None for p in model.backbone.parameters())
    model.zero_grad()
    model(image).features.sum().backward()
    reached = {name for name, p in model.head.named_parameters() if p.grad is not None}
    assert reached == {"projection.weight"}


def test_a_direct_classifier_drops_what_the_projection_drops():
    torch.manual_seed(0)
    head = CamHead(32, 2, feature_dim=32, dropout=0.5, direct=True)
    torch.nn.init.dirac_(head.projection.weight)
    with torch.no_grad():
        features, cams = head(torch.rand(1, 32, 3, 3))
    torch.testing.assert_close(cams, F.conv2d(features, head.classifier.weight[1:]))
    assert (features.amax((0, 2, 3)) == 0).any()


def test_errors():
    with pytest.raises(InputError, match="expected 1 foreground class or more, got 0"):
        RTC(create_backbone("small"), 0)
    with pytest.raises(InputError, match=r"image must be \[B, 3, H, W\], got \[3, 8, 8\]"):
        small_rtc()(torch.zeros(3, 8, 8))
