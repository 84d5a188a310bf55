from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from wsis.compat import DenseCRFLoss, DenseEnergyLoss, ModelLossSemsegGatedCRF, get_energy_loss
from wsis.compat.energy import MEAN, STD
from wsis.errors import InputError
from wsis.ops.energy import dense_energy_loss
from wsis.ops.gated_crf import gated_crf_loss
from wsis.ops.permutohedral import bilateral_filter

FILES = ["energy_a_n2_k4_48x48", "energy_b_n1_k3_37x53", "energy_c_n1_k21_40x48"]


def inputs(z):
    image = torch.from_numpy(z["image_u8"]).permute(0, 3, 1, 2).float()
    return (image, *(torch.from_numpy(z[name]) for name in ("seg", "roi", "label")))


def compare(assert_golden, spec, z, name, loss, gradient):
    """The value, and the gradient where it was recorded; without dummy points where they matter."""
    for key, actual in ((f"loss_{name}", loss), (f"grad_{name}", gradient)):
        key = f"{key}_nodummy" if f"{key}_nodummy" in z else key
        if key in z:
            assert_golden(spec, key, actual.detach().numpy(), z[key])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", ["rloss", "rrm", "toco", "rrm_full"])
def test_golden(file, name, golden, golden_spec, assert_golden):
    z, spec = golden(file), golden_spec(file)
    image, seg, roi, label = inputs(z)
    seg.requires_grad_()
    if name == "rloss":
        loss = DenseCRFLoss(**spec["params"]["rloss"])(image, seg, roi)
    else:
        params = dict(spec["params"]["rrm"])
        if name == "rrm_full":
            params["scale_factor"] = 1
        layer = DenseEnergyLoss(**params, recompute_scale_factor=name == "toco")
        loss = layer(image, seg, roi, label[:, None])
    loss.backward()
    compare(assert_golden, spec, z, name, loss, seg.grad)


@pytest.mark.parametrize("file", FILES)
def test_golden_wrapper(file, golden, golden_spec, assert_golden):
    z, spec = golden(file), golden_spec(file)
    image, _, _, label = inputs(z)
    scale, shift = (torch.tensor(x)[:, None, None] for x in (STD, MEAN))
    logit = torch.from_numpy(z["logit"]).requires_grad_()
    layer = DenseEnergyLoss(**spec["params"]["rrm"])
    box = torch.from_numpy(z["img_box"])
    loss = get_energy_loss((image - shift) / scale, logit, label, box, layer)
    loss.backward()
    assert_golden(spec, "loss_wrapper", loss.detach().numpy(), z["loss_wrapper"])
    assert_golden(spec, "grad_wrapper_logit", logit.grad.numpy(), z["grad_wrapper_logit"])


@pytest.mark.parametrize("file", FILES)
def test_golden_filter(file, golden, golden_spec, assert_golden):
    z, spec = golden(file), golden_spec(file)
    if "filter_item0" not in z:
        pytest.skip("not recorded")
    image, seg, *_ = inputs(z)
    widths = spec["params"]["filter"]
    sigmas = widths["sigma_xy"], widths["sigma_rgb"]
    out = bilateral_filter(seg[:1], image[:1], *sigmas, normalization="none")
    assert_golden(spec, "filter_item0", out[0].numpy(), z["filter_item0"])


# ---- how they are called -----------------------------------------------------------------------


def make_case(size=(16, 20)):
    g = torch.Generator().manual_seed(0)
    image = torch.randint(256, (2, 3, *size), generator=g).float()
    seg = torch.randn(2, 4, *size, generator=g).softmax(dim=1)
    roi = torch.zeros(2, *size)
    roi[0, 2:9], roi[1, :, 3:] = 1, 1
    label = torch.randint(4, (2, *size), generator=g, dtype=torch.uint8)
    label[:, ::3] = 255
    return image, seg, roi, label


def test_result_is_one_number_with_weight():
    image, seg, roi, label = make_case()
    plain = DenseCRFLoss(2.0, 15.0, 100.0, 0.5)(image, seg, roi)
    gated = DenseEnergyLoss(weight=3.0, sigma_rgb=15, sigma_xy=100, scale_factor=0.5)
    assert plain.shape == (1,)
    assert torch.equal(plain[0], 2 * dense_energy_loss(seg, image, roi=roi))
    loss = gated(image, seg, roi, label[:, None])
    expected = dense_energy_loss(seg, image, roi=roi, labels=label, gated=True)
    assert torch.equal(loss[0], 3 * expected) and torch.equal(loss, gated(image, seg, roi, label))


def test_module_surface():
    layer = DenseEnergyLoss(1e-7, 15, 100, 0.5)
    assert isinstance(layer, nn.Module) and not layer.state_dict()
    assert repr(layer) == (
        "DenseEnergyLoss(sigma_rgb=15, sigma_xy=100, weight=1e-07, scale_factor=0.5)"
    )
    assert (layer.weight, layer.sigma_rgb, layer.sigma_xy, layer.scale_factor) == (
        1e-7, 15, 100, 0.5,
    )  # fmt: skip
    assert repr(DenseCRFLoss(2e-9, 15.0, 80.0, 0.5)).startswith("DenseCRFLoss(sigma_rgb=15.0")


def test_arguments_are_not_changed():
    arguments = make_case()
    kept = [a.clone() for a in arguments]
    image, seg, roi, label = arguments
    for scale in (0.5, 1):
        DenseCRFLoss(1, 15, 100, scale)(image, seg, roi)
        DenseEnergyLoss(1, 15, 100, scale)(image, seg, roi, label[:, None])
    for argument, before in zip(arguments, kept, strict=True):
        assert argument.shape == before.shape and torch.equal(argument, before)


def test_images_with_a_gradient_are_taken():
    """The originals take the values of the images only, and give them no gradient."""
    image, seg, roi, label = make_case()
    image.requires_grad_()
    seg.requires_grad_()
    DenseEnergyLoss(1, 15, 100, 0.5)(image, seg, roi, label[:, None]).backward()
    assert image.grad is None and seg.grad is not None


def test_exact_option():
    image, seg, roi, label = make_case()
    gradients = []
    for exact in (False, True):
        p = seg.clone().requires_grad_()
        DenseEnergyLoss(1, 15, 100, 0.5, exact=exact)(image, p, roi, label[:, None]).backward()
        gradients.append(p.grad)
    assert not torch.equal(*gradients)


def test_odd_sizes_differ_by_the_repository():
    image, seg, roi, label = make_case((15, 21))
    of_toco, of_rrm = (
        DenseEnergyLoss(1, 15, 100, 0.5, recompute_scale_factor=r)(image, seg, roi, label[:, None])
        for r in (True, False)
    )
    assert not torch.equal(of_toco, of_rrm)


def test_edge_map_in_place_of_images():
    image, seg, roi, label = make_case()
    edges = image[:, :1] / 255
    layer = DenseEnergyLoss(1.0, 0.1, 100, 0.5, guide_resize="area")
    expected = dense_energy_loss(
        seg, edges, sigma=0.1, roi=roi, labels=label, gated=True, guide_resize="area"
    )
    assert torch.equal(layer(edges, seg, roi, label[:, None])[0], expected)


@pytest.mark.parametrize("kind", ["tensor", "list", "numpy"])
def test_wrapper_takes_boxes_of_any_kind(kind):
    image, seg, roi, label = make_case()
    box = torch.tensor([[2, 9, 0, 20], [0, 16, 3, 20]])
    seen = {"tensor": box, "list": box.tolist(), "numpy": list(box.numpy())}[kind]
    calls = []

    def layer(*arguments):
        calls.append(arguments)
        return torch.zeros(1)

    normal = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert get_energy_loss(normal, seg, label, seen, layer).shape == (1,)
    ((given, probs, crop, labels),) = calls
    np.testing.assert_allclose(given.numpy(), image.numpy(), atol=1e-3)
    assert torch.equal(probs, seg.softmax(dim=1)) and torch.equal(crop, roi)
    assert labels.shape == (2, 1, 16, 20) and labels.dtype == torch.uint8


def test_wrapper_names_bad_boxes():
    image, seg, _, label = make_case()
    with pytest.raises(InputError, match=r"img_box must be \[B=2, 4\], got \[1, 4\]"):
        get_energy_loss(image, seg, label, [[0, 1, 0, 1]], DenseEnergyLoss(1, 15, 100, 0.5))


# ---- Gated CRF ---------------------------------------------------------------------------------

KERNELS = [{"weight": 0.9, "xy": 6, "rgb": 0.1}, {"weight": 0.1, "xy": 6}]


def test_gated_crf_class():
    image, seg, roi, _ = make_case()
    large = nn.functional.interpolate(image / 255, scale_factor=3)
    sample = {"rgb": large, "name": ["a", "b"]}
    mask = nn.functional.interpolate(roi[:, None], scale_factor=3)
    kept = mask.clone()
    out = ModelLossSemsegGatedCRF()(seg, KERNELS, 3, sample, 48, 60, mask_dst=mask, mask_src=mask)
    expected = gated_crf_loss(
        seg, {"rgb": large}, KERNELS, 3, mask_src=roi[:, None], mask_dst=roi[:, None]
    )
    torch.testing.assert_close(out["loss"], expected)
    assert torch.equal(mask, kept)


def test_gated_crf_custom_downsampling():
    image, seg, *_ = make_case()
    large = nn.functional.interpolate(image / 255, scale_factor=2)
    shrink = {"rgb": lambda maps, size: nn.functional.adaptive_max_pool2d(maps, size) * 0.5}
    out = ModelLossSemsegGatedCRF()(
        seg, KERNELS, 2, {"rgb": large}, 32, 40, custom_modality_downsamplers=shrink
    )
    expected = gated_crf_loss(seg, {"rgb": image / 255 * 0.5}, KERNELS, 2)
    torch.testing.assert_close(out["loss"], expected)


@pytest.mark.parametrize("size", [(17, 20), (32, 20), (0, 0)])
def test_gated_crf_sizes(size):
    image, seg, *_ = make_case()
    if size == (0, 0):
        seg, size = seg[..., :0], (16, 20)
    with pytest.raises(InputError, match="height_input and width_input must be"):
        ModelLossSemsegGatedCRF()(seg, KERNELS, 2, {"rgb": image}, *size)


def test_gated_crf_refusals():
    image, seg, *_ = make_case()
    with pytest.raises(InputError, match="out_kernels_vis must be False"):
        ModelLossSemsegGatedCRF()(seg, KERNELS, 2, {"rgb": image}, 16, 20, out_kernels_vis=True)
    with pytest.raises(InputError, match="modality 'rgb' must be one of"):
        ModelLossSemsegGatedCRF()(seg, KERNELS, 2, {}, 16, 20)
