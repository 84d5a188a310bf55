"""cam_to_label, max_norm and refine_cams_with_bkg_v2 as other projects call them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from wsis.compat import PAMR, PAR, VARM, cam_to_label, max_norm, refine_cams_with_bkg_v2
from wsis.errors import InputError
from wsis.ops import normalize_cams
from wsis.pseudo import make_pseudo_masks

DILATIONS = [1, 2, 4, 8, 12, 24]


def config(high, low, ignore_index=255, background=0.45):
    return SimpleNamespace(
        cam=SimpleNamespace(high_thre=high, low_thre=low, bkg_score=background),
        dataset=SimpleNamespace(ignore_index=ignore_index),
    )


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- refine_cams_with_bkg_v2 -------------------------------------------------------------------

RULES = {
    "label_afa": (PAR(DILATIONS, 10), 0.55, 0.35, 255),
    "label_toco": (PAR(DILATIONS, 10), 0.7, 0.25, 1),
    "label_rtc": (VARM(DILATIONS, 10), 0.55, 0.2, 1),
}


@pytest.fixture
def recorded(golden):
    z = golden("pseudo_mask_n2_96x120")
    image = torch.from_numpy(z["image_u8"]).permute(0, 3, 1, 2).float()
    return image, *(torch.from_numpy(z[k]) for k in ("cam", "cls_label", "img_box")), z


@pytest.mark.parametrize("wrap", ["plain", "parallel", "foreign"])
@pytest.mark.parametrize("rule", RULES)
def test_golden_masks(rule, wrap, recorded, golden_spec, assert_golden):
    image, cam, label, box, z = recorded
    module, high, low, scale = RULES[rule]
    image = image / 255 * scale
    module = {
        "plain": module,
        "parallel": nn.DataParallel(module),
        "foreign": lambda images, cams, refine=module: refine(images, cams),
    }[wrap]
    out = refine_cams_with_bkg_v2(
        module,
        image,
        cams=cam * label[..., None, None],
        cls_labels=label,
        high_thre=high,
        low_thre=low,
        ignore_index=255,
        img_box=box,
    )
    assert out.dtype == torch.float32
    assert_golden(golden_spec("pseudo_mask_n2_96x120"), rule, out.to(torch.uint8).numpy(), z[rule])


@pytest.fixture
def small():
    image, cam = rand(2, 3, 21, 17), rand(2, 4, 21, 17, seed=1)
    label = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]])
    return image, cam, label, [(2, 19, 0, 11), (0, 21, 0, 17)]


def test_both_forms_and_all_kinds_of_boxes(small):
    image, cam, label, box = small
    module = PAR(num_iter=2, dilations=[1, 2])
    expected = refine_cams_with_bkg_v2(
        module,
        image,
        cam,
        label,
        high_thre=0.6,
        low_thre=0.3,
        ignore_index=255,
        img_box=torch.tensor(box),
        down_scale=3,
    )
    cfg = config(0.6, 0.3)
    calls = [
        ((module, image, cam, label, 0.6, 0.3, 255, box, 3), {}),
        ((module, image, cam, label, cfg, np.array(box), 3), {}),
        ((module, image, cam, label, cfg), {"img_box": torch.tensor(box).int(), "down_scale": 3}),
        ((module, image), dict(cams=cam, cls_labels=label, cfg=cfg, img_box=box, down_scale=3)),
    ]
    for arguments, named in calls:
        assert torch.equal(refine_cams_with_bkg_v2(*arguments, **named), expected)
    native = make_pseudo_masks(
        cam,
        image,
        label,
        torch.tensor(box),
        high=0.6,
        low=0.3,
        refine="par",
        iterations=2,
        dilations=(1, 2),
        down_scale=3,
    )
    assert torch.equal(expected, native.float())


@pytest.mark.parametrize("module", [PAMR(2, [1, 2]), PAR([1, 2], 2), VARM([1, 2], 2)])
def test_a_foreign_refinement_is_called_per_image(small, module):
    image, cam, label, box = small
    calls = []

    def foreign(images, cams):
        calls.append((tuple(images.shape), tuple(cams.shape)))
        return module(images, cams)

    arguments = dict(
        images=image, cams=cam, cls_labels=label, high_thre=0.6, low_thre=0.3, img_box=box
    )
    out = refine_cams_with_bkg_v2(foreign, **arguments, ignore_index=7)
    assert calls == [((1, 3, 10, 8), (1, 3, 10, 8))] * 2 + [((1, 3, 10, 8), (1, 1, 10, 8))] * 2
    ours = refine_cams_with_bkg_v2(module, **arguments, ignore_index=7)
    assert (out != ours).float().mean() < 0.005
    assert set(ours.unique().tolist()) <= {0, 1, 4, 7}


def test_default_ignore_index_and_box(small):
    image, cam, label, _ = small
    out = refine_cams_with_bkg_v2(PAR([1], 1), image, cam, label, 0.9, 0.1)
    assert set(out.unique().tolist()) <= {0, 1, 4}  # undecided is False, so 0
    assert not out[1].any()
    assert (
        refine_cams_with_bkg_v2(PAR([1], 1), image[:0], cam[:0], label[:0], 0.9, 0.1).shape[0] == 0
    )


def test_masks_refuse(small):
    image, cam, label, box = small
    good = dict(
        ref_mod=PAR([1], 1), images=image, cams=cam, cls_labels=label, high_thre=0.5, low_thre=0.2
    )
    for change, message in [
        ({"ref_mod": None}, "ref_mod must be a module or function, got NoneType"),
        ({"cams": None}, "must be given"),
        ({"low_thre": None}, "got high 0.5 and low None"),
        ({"low_thre": 0.6}, "must not exceed"),
        ({"img_box": box[:1]}, r"img_box must be \[2, 4\], got \[1, 4\]"),
        ({"cls_labels": label[:, :3]}, r"label must be \[2, 4\], got \[2, 3\]"),
    ]:
        with pytest.raises(InputError, match=message):
            refine_cams_with_bkg_v2(**(good | change))


# ---- cam_to_label ------------------------------------------------------------------------------


def merged(z):
    """The merged CAMs that the labels of the file were cut from."""
    maps = [m for i in range(3) for m in torch.from_numpy(z[f"maps_{i}"]).chunk(2)]
    return normalize_cams(maps, (45, 61), variant="afa", flips=[False, True] * 3)


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("label_bkg", dict(bkg_thre=0.45)),
        ("label_mid", dict(bkg_thre=0.45, low_thre=0.35, high_thre=0.55, ignore_mid=True)),
        ("label_toco", dict(bkg_thre=0.5, low_thre=0.25, high_thre=0.7, ignore_mid=True)),
        ("label_mid", dict(cfg=config(0.55, 0.35), ignore_mid=True)),
    ],
)
def test_golden_labels(key, rule, golden, golden_spec, assert_golden):
    z = golden("camnorm_afa_toco_45x61")
    spec = golden_spec("camnorm_afa_toco_45x61")
    cam, label = merged(z), torch.from_numpy(z["cls_label"])
    box = torch.from_numpy(z["img_box"])
    if key == "label_bkg":
        got = cam_to_label(cam, label, **rule)
        assert isinstance(got, torch.Tensor)  # without boxes the label alone
    else:
        valid, got = cam_to_label(cam, label, box, **({"ignore_index": 255} | rule))
        assert_golden(spec, "valid_cam_max", valid.amax(1).numpy(), z["valid_cam_max"])
    assert got.dtype == torch.int64
    # The manifest's basis: scores within 1e-5 of a threshold, or of each other, decide nothing.
    best, second = (cam * label[..., None, None]).topk(2, dim=1).values.unbind(1)
    limits = torch.tensor([0.25, 0.35, 0.45, 0.5, 0.55, 0.7])
    clear = ((best[..., None] - limits).abs() > 1e-5).all(-1) & (best - second > 1e-5)
    clear = (clear | (best == 0)).numpy()
    assert np.array_equal(got.numpy()[clear], z[key][clear])
    assert clear.mean() > 0.99


def test_a_tie_is_below_the_threshold():
    cam = torch.tensor([0.1, 0.25, 0.3, 0.5, 0.6]).view(1, 1, 1, 5)
    pair = dict(high_thre=0.5, low_thre=0.25, ignore_mid=True, ignore_index=9)
    _, label = cam_to_label(cam, torch.ones(1, 1), [(0, 1, 0, 5)], **pair)
    assert label.flatten().tolist() == [0, 0, 9, 9, 1]
    _, label = cam_to_label(cam, torch.ones(1, 1), [(0, 1, 1, 4)], bkg_thre=0.3, ignore_index=9)
    assert label.flatten().tolist() == [9, 0, 0, 1, 9]
    # A single threshold above the pair's wins, as there.
    _, label = cam_to_label(cam, torch.ones(1, 1), [(0, 1, 0, 5)], bkg_thre=0.7, **pair)
    assert label.flatten().tolist() == [0, 0, 9, 9, 0]
    assert cam[0, 0, 0, 0] == 0.1


def test_labels_refuse():
    cam, label = rand(1, 2, 3, 3), torch.ones(1, 2)
    with pytest.raises(InputError, match="bkg_thre must be given"):
        cam_to_label(cam, label)
    with pytest.raises(InputError, match="ignore_index must be given"):
        cam_to_label(cam, label, [(0, 3, 0, 3)], bkg_thre=0.5)
    with pytest.raises(InputError, match="high_thre must be given"):
        cam_to_label(cam, label, [(0, 3, 0, 3)], bkg_thre=0.5, ignore_mid=True, ignore_index=255)
    with pytest.raises(InputError, match=r"got \[1, 2, 3, 3\] and \[1, 3\]"):
        cam_to_label(cam, torch.ones(1, 3), bkg_thre=0.5)


# ---- max_norm ----------------------------------------------------------------------------------


def test_golden_max_norm(golden, golden_spec, assert_golden):
    z, spec = golden("rtc_norms_n2_16x16"), golden_spec("rtc_norms_n2_16x16")
    cam = torch.from_numpy(z["cam"]).requires_grad_()
    out = max_norm(cam)
    assert_golden(spec, "max_norm", out.detach().numpy(), z["max_norm"])
    out.backward(torch.from_numpy(z["upstream"]))
    assert_golden(spec, "grad_max_norm", cam.grad.numpy(), z["grad_max_norm"])
    before = z["cam"].copy()
    for array in (before, before.astype(np.float64)):
        out = max_norm(array, version="numpy")
        assert isinstance(out, np.ndarray) and out.dtype == array.dtype
        assert_golden(spec, "max_norm_numpy", out, z["max_norm_numpy"])
    assert np.array_equal(before, z["cam"])


def test_max_norm_takes_maps_of_one_image_and_either_kind():
    x = rand(3, 5, 4) - 0.3
    for version in ("torch", "numpy", "np"):
        batched = max_norm(x[None], version)
        assert torch.equal(max_norm(x, version), batched[0])
        array = max_norm(x.numpy(), version=version, e=1e-5)
        assert isinstance(array, np.ndarray)
        assert np.array_equal(array, batched[0].numpy())
    assert max_norm(x.half()).dtype == torch.float16
    with pytest.raises(InputError, match="version must be torch, numpy or np, got 'jax'"):
        max_norm(x, "jax")
    with pytest.raises(InputError, match=r"got \[5, 4\]"):
        max_norm(x[0])
