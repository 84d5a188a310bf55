import numpy as np
import pytest
import torch

from tests.reference.normalize import (
    ctr_reference,
    max_norm_reference,
    one_hot_max_reference,
    seed_reference,
)
from wsis.errors import InputError
from wsis.ops.normalize import (
    add_background,
    ctr_scores,
    max_norm,
    normalize_cams,
    one_hot_max,
    seed_scores,
)

SIZES = [(2, 3, 1, 1), (1, 2, 7, 5), (2, 2, 9, 3)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_golden_training_norms(golden, golden_spec, assert_golden):
    z, spec = golden("rtc_norms_n2_16x16"), golden_spec("rtc_norms_n2_16x16")
    cam = torch.from_numpy(z["cam"]).requires_grad_()
    out = max_norm(cam)
    out.backward(torch.from_numpy(z["upstream"]))
    assert_golden(spec, "max_norm", out.detach().numpy(), z["max_norm"])
    assert_golden(spec, "grad_max_norm", cam.grad.numpy(), z["grad_max_norm"])
    scores = ctr_scores(cam.detach(), background=spec["params"]["bg_threshold"])
    assert_golden(spec, "normal_cam", scores.numpy(), z["normal_cam"])
    foreground = (scores * torch.from_numpy(z["label"])[..., None, None])[:, 1:].max(1)
    labels = torch.where(foreground.values > scores[:, 0], foreground.indices + 1, 0)
    assert_golden(spec, "normal_label", labels.numpy(), z["normal_label"])
    assert_golden(spec, "max_onehot", one_hot_max(cam.detach()).numpy(), z["max_onehot"])


@pytest.mark.parametrize("name", ["seam", "ppc", "psa"])
def test_golden_summed_passes(name, golden, golden_spec, assert_golden):
    z, spec = golden(f"camnorm_{name}_37x50"), golden_spec(f"camnorm_{name}_37x50")
    maps = [torch.from_numpy(z[f"map_{i}"][0, -20:]) for i in range(8)]
    label = torch.from_numpy(z["label"])
    cams = normalize_cams(
        maps,
        (37, 50),
        variant="psa" if name == "psa" else "seam",
        flips=[False, True] * 4,
        label=label,
    )
    present = label.bool()
    assert_golden(spec, "norm_cam", cams[present].numpy(), z["norm_cam"])
    assert_golden(spec, "norm_absent", cams[~present].amax((1, 2)).numpy(), z["norm_absent"])
    assert_golden(spec, "norm_absent", cams[~present].amin((1, 2)).numpy(), z["norm_absent"])
    scores = add_background(cams, "constant", spec["params"]["bg"])
    assert_prediction(scores, z["pred"])
    for alpha in spec["params"]["alpha"]:
        background = add_background(cams, "power", alpha)[0]
        assert_golden(spec, f"bg_pow_{alpha}", background.numpy(), z[f"bg_pow_{alpha}"])


def assert_prediction(scores, expected):
    """Equal but where the two best scores are within 1e-5."""
    best = scores.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-5).numpy()
    np.testing.assert_array_equal(scores.argmax(0).numpy()[clear], expected[clear])
    assert clear.mean() > 0.99


@pytest.mark.parametrize(
    ("output", "size", "crop"),
    [("strided_cam", (10, 13), None), ("highres_cam", (48, 64), (37, 50))],
)
def test_golden_irn(output, size, crop, golden, golden_spec, assert_golden):
    z, spec = golden("camnorm_irn_37x50"), golden_spec("camnorm_irn_37x50")
    weight = torch.from_numpy(z["w_cls"])
    maps, label = [], torch.from_numpy(z["label"])
    for i in range(4):
        maps += torch.einsum("kf,bfhw->bkhw", weight, torch.from_numpy(z[f"feat_{i}"])).unbind()
    cams = normalize_cams(
        maps, size, variant="irn", flips=[False, True] * 4, label=label, crop=crop
    )
    assert_golden(spec, output, cams[label.bool()].numpy(), z[output])


@pytest.mark.parametrize("variant", ["afa", "toco"])
def test_golden_afa_toco(variant, golden, golden_spec, assert_golden):
    z, spec = golden("camnorm_afa_toco_45x61"), golden_spec("camnorm_afa_toco_45x61")
    maps = [half for i in range(3) for half in torch.from_numpy(z[f"maps_{i}"]).chunk(2)]
    cams = normalize_cams(maps, (45, 61), variant=variant, flips=[False, True] * 3)
    assert_golden(spec, "cam_sub", cams[:, ::2].numpy(), z["cam_sub"])
    label = torch.from_numpy(z["cls_label"])[..., None, None]
    assert_golden(spec, "valid_cam_max", (cams * label).amax(1).numpy(), z["valid_cam_max"])


@pytest.mark.parametrize("shape", SIZES)
def test_reference(shape):
    x = draw(*shape)
    x[0, 0] = -1.0
    x[-1, -1] = 0.7
    for actual, expected in [
        (max_norm(x), max_norm_reference(x.numpy())),
        (seed_scores(x), seed_reference(x.numpy())),
        (ctr_scores(x, 0.3), ctr_reference(x.numpy(), 0.3)),
        (one_hot_max(x), one_hot_max_reference(x.numpy())),
    ]:
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_max_norm_gradcheck():
    x = draw(2, 2, 4, 3, seed=3).requires_grad_()
    positive = (draw(1, 1, 3, 3, seed=4).abs() + 0.5).requires_grad_()  # the minimum matters
    assert torch.autograd.gradcheck(max_norm, x)
    assert torch.autograd.gradcheck(max_norm, positive)


def test_one_hot_max_keeps_ties_and_its_input():
    scores = torch.tensor([0.1, 0.5, 0.5, 0.2]).view(1, 4, 1, 1)
    before = scores.clone()
    assert one_hot_max(scores).flatten().tolist() == pytest.approx([0.1, 0.5, 0.5, 0.0])
    assert torch.equal(scores, before)


def test_ctr_scores_of_empty_maps():
    refined = torch.zeros(1, 2, 3, 3)
    assert torch.all(ctr_scores(refined)[:, 1] == -1)
    assert torch.all(ctr_scores(refined, clamp=True)[:, 1] == 0)


def test_ranges_and_dtypes():
    x = draw(2, 3, 7, 5, dtype=torch.float32).transpose(2, 3).half()
    for out in (max_norm(x), seed_scores(x)):
        assert out.dtype == torch.float32
        assert 0 <= out.min() <= out.max() <= 1
    assert seed_scores(x).shape == (2, 4, 5, 7)
    complement = add_background(max_norm(x), "complement")
    assert torch.equal(complement[:, 0], 1 - max_norm(x).amax(1))


def test_sipe_cancels_before_the_relu():
    plain, mirrored = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[3.0, -2.0]]])
    sipe = normalize_cams([plain, mirrored], (1, 2), variant="sipe", flips=[False, True])
    psa = normalize_cams([plain, mirrored], (1, 2), variant="psa", flips=[False, True])
    assert sipe.flatten().tolist() == pytest.approx([0.0, 1.0], abs=1e-4)
    assert psa.flatten().tolist() == pytest.approx([2 / 3, 1.0], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": [torch.rand(1, 2, 2)], "variant": "scd"}, "variant must be one of"),
        ({"maps": [], "variant": "psa"}, "one flip flag per map, got 0 maps"),
        ({"maps": [torch.rand(1, 2, 2)], "variant": "afa"}, "afa needs passes in pairs"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        normalize_cams(arguments["maps"], (4, 4), variant=arguments["variant"])
    with pytest.raises(InputError, match="constant, power or complement"):
        add_background(torch.rand(1, 2, 2), "softmax")
