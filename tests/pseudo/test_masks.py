import numpy as np
import pytest
import torch

from wsis.errors import InputError
from wsis.ops.normalize import max_norm
from wsis.pseudo import make_pseudo_masks, refined_or_cam_scores
from wsis.pseudo.masks import _scores_of_all
from wsis.types import Maps

RULES = {
    "label_afa": {"refine": "par", "low": 0.35, "high": 0.55},
    "label_toco": {"refine": "par", "low": 0.25, "high": 0.7},
    "label_rtc": {},  # the defaults
}


def whole(batch, height, width):
    return torch.tensor([[0, height, 0, width]] * batch)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", RULES)
def test_golden(rule, golden, golden_spec, assert_golden):
    z, spec = golden("pseudo_mask_n2_96x120"), golden_spec("pseudo_mask_n2_96x120")
    image = torch.from_numpy(z["image_u8"]).permute(0, 3, 1, 2).float() / 255
    masks = make_pseudo_masks(
        torch.from_numpy(z["cam"]),
        image,
        torch.from_numpy(z["cls_label"]),
        torch.from_numpy(z["img_box"]),
        **RULES[rule],
    )
    assert masks.dtype == torch.int64
    assert_golden(spec, rule, masks.numpy(), z[rule])


def test_only_labelled_classes_and_only_inside_the_box():
    label = torch.tensor([[1.0, 0.0, 1.0]])
    masks = make_pseudo_masks(
        rand(1, 3, 21, 17), rand(1, 3, 21, 17, seed=1), label, torch.tensor([[2, 19, 0, 11]])
    )
    assert set(masks.unique().tolist()) <= {0, 1, 3, 255}
    outside = masks.clone()
    outside[:, 2:19, :11] = 255
    assert (outside == 255).all()
    assert (masks[:, 2:19, :11] != 255).any()


def test_thresholds_decide_without_refinement():
    levels = torch.tensor([0.1, 0.3, 0.8]).repeat_interleave(8)
    cams = levels.expand(1, 1, 8, 24)
    masks = make_pseudo_masks(
        cams,
        torch.zeros(1, 3, 8, 24),
        torch.ones(1, 1),
        whole(1, 8, 24),
        refine="none",
        down_scale=1,
    )
    assert masks[0, 0, [0, 12, 20]].tolist() == [0, 255, 1]


def test_each_image_is_on_its_own():
    cams, image = rand(3, 4, 16, 20), rand(3, 3, 16, 20, seed=2)
    label = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    together = make_pseudo_masks(cams, image, label, whole(3, 16, 20))
    for b in range(3):
        alone = make_pseudo_masks(
            cams[b : b + 1], image[b : b + 1], label[b : b + 1], whole(1, 16, 20)
        )
        assert torch.equal(together[b : b + 1], alone)
    assert (together[1] == 0).all()  # no class: background


@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
@pytest.mark.parametrize("refine", ["varm", "par", "pamr", "none"])
def test_odd_sizes_and_half(size, refine):
    masks = make_pseudo_masks(
        rand(1, 1, *size).half(),
        rand(1, 3, *size, seed=3).half(),
        torch.ones(1, 1),
        whole(1, *size),
        refine=refine,
    )
    assert masks.shape == (1, *size)
    assert np.isin(masks.numpy(), [0, 1, 255]).all()


def test_scores_come_from_the_refined_cam_else_from_the_cam():
    cams, refined = rand(2, 3, 4, 4) - 0.3, rand(2, 4, 4, 4, seed=4)
    label = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    plain = Maps(cams=cams, class_logits=cams.mean((2, 3)), features=rand(2, 8, 4, 4))
    crr = Maps(plain.cams, plain.class_logits, plain.features, refined)
    for maps, source in [(plain, cams), (crr, refined[:, 1:])]:
        scores = refined_or_cam_scores(maps, label, (9, 13))
        masked = max_norm(source) * label[..., None, None]
        expected = torch.nn.functional.interpolate(
            masked, (9, 13), mode="bilinear", align_corners=True
        )
        assert torch.allclose(scores, expected, atol=1e-6)
        # What CUDA runs: nothing asks which classes there are.
        everywhere = _scores_of_all(source, label, (9, 13))
        assert torch.allclose(everywhere, expected, atol=1e-6)
        assert not everywhere[label == 0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": torch.ones(1, 2)}, r"label must be \[1, 1\], got \[1, 2\]"),
        ({"image01": torch.rand(1, 3, 4, 4)}, r"image01 must be \[1, 3, 8, 8\]"),
        ({"valid_box": torch.zeros(4)}, r"valid_box must be \[1, 4\]"),
        ({"low": 0.6}, "must not exceed"),
        ({"refine": "crf"}, "pamr, par or varm"),
        ({"cams_norm": torch.rand(1, 8, 8)}, r"cams_norm must be \[B, K, H, W\], got \[1, 8, 8\]"),
        ({"valid_box": torch.zeros(1, 4)}, "valid_box must be integers, got torch.float32"),
        ({"label": torch.ones(1, 1, device="meta")}, "label must be on cpu, got meta"),
        ({"down_scale": 0}, "down_scale must be 1 or more and an integer, got 0"),
        ({"iterations": -1}, "iterations must be 0 or more"),
        ({"dilations": ()}, "dilations must be positive"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "cams_norm": rand(1, 1, 8, 8),
        "image01": rand(1, 3, 8, 8),
        "label": torch.ones(1, 1),
        "valid_box": whole(1, 8, 8),
    }
    with pytest.raises(InputError, match=message):
        make_pseudo_masks(**(arguments | change))


def test_relative_thresholds_are_multiples_of_the_mean_score():
    cams, image = torch.rand(2, 3, 20, 24), torch.rand(2, 3, 20, 24)
    label = torch.tensor([[1, 0, 1], [0, 1, 0]])
    box = torch.tensor([[0, 20, 0, 24], [3, 17, 5, 20]])
    made = make_pseudo_masks(cams, image, label, box, high=1.2, low=0.8, relative=True)
    for b, (y0, y1, x0, x1) in enumerate(box.tolist()):
        unit = cams[b, label[b] > 0, y0:y1, x0:x1].amax(0).mean().item()
        one = slice(b, b + 1)
        fixed = make_pseudo_masks(
            cams[one], image[one], label[one], box[one], high=1.2 * unit, low=0.8 * unit
        )
        assert torch.equal(made[one], fixed)


def test_relative_thresholds_do_not_depend_on_the_peak():
    """One hot pixel halves all other normalised scores; constants lose the object, these do not."""
    scores = torch.zeros(1, 1, 32, 32)
    scores[..., 8:24, 8:24] = 0.9
    peaked = scores / 4
    peaked[..., 15, 15] = 1
    image, label, box = torch.rand(1, 3, 32, 32), torch.ones(1, 1), torch.tensor([[0, 32, 0, 32]])

    def size_of(cams: torch.Tensor, **rule: float | bool) -> int:
        masks = make_pseudo_masks(cams, image, label, box, refine="none", **rule)
        return int((masks == 1).sum())

    constant, relative = {"high": 0.3, "low": 0.2}, {"high": 1.1, "low": 0.8, "relative": True}
    assert size_of(peaked, **constant) < 20 < 200 < size_of(scores, **constant)
    assert 200 < size_of(peaked, **relative) < 320
    assert 200 < size_of(scores, **relative) < 320


def test_no_images_and_no_pixels():
    for batch, size in [(0, (8, 8)), (2, (0, 8)), (2, (8, 0))]:
        masks = make_pseudo_masks(
            torch.rand(batch, 2, *size),
            torch.rand(batch, 3, *size),
            torch.ones(batch, 2),
            torch.zeros(batch, 4, dtype=torch.int64),
        )
        assert masks.shape == (batch, *size)
        assert masks.dtype == torch.int64


def test_gradients_and_layouts_of_the_inputs_do_not_matter():
    cams, image = rand(2, 3, 16, 20), rand(2, 3, 16, 20, seed=2)
    label, box = torch.tensor([[1, 0, 1], [0, 1, 1]]), whole(2, 16, 20)
    expected = make_pseudo_masks(cams, image, label, box)
    last = cams.to(memory_format=torch.channels_last).requires_grad_()
    masks = make_pseudo_masks(last, image.requires_grad_(), label.bool(), box.int())
    assert torch.equal(masks, expected)
    assert not masks.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        {"high": float("nan")},
        {"high": float("inf")},
        {"low": 0.6},
        {"down_scale": 2.0},
        {"iterations": 1.5},
        {"dilations": (1.9,)},
    ],
)
def test_wrong_arguments(wrong):
    cams, image, label = torch.rand(1, 2, 8, 8), torch.rand(1, 3, 8, 8), torch.ones(1, 2)
    with pytest.raises(InputError):
        make_pseudo_masks(cams, image, label, torch.tensor([[0, 8, 0, 8]]), **wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_cams_that_are_not_finite_are_refused_where_they_are_read(value):
    cams, image, box = torch.rand(1, 2, 8, 8), torch.rand(1, 3, 8, 8), torch.tensor([[0, 8, 0, 8]])
    without = make_pseudo_masks(cams, image, torch.tensor([[1, 0]]), box)
    cams[0, 1, 3, 3] = value
    with pytest.raises(InputError, match="finite"):
        make_pseudo_masks(cams, image, torch.ones(1, 2), box)
    assert torch.equal(make_pseudo_masks(cams, image, torch.tensor([[1, 0]]), box), without)


def test_class_ids_do_not_meet_the_ignore_value():
    cams, image, label = torch.rand(1, 255, 4, 4), torch.rand(1, 3, 4, 4), torch.ones(1, 255)
    with pytest.raises(InputError, match="254"):
        make_pseudo_masks(cams, image, label, torch.tensor([[0, 4, 0, 4]]))
