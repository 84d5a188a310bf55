from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.offline.fakes import COLOURS, ColourModel
from wsis.errors import InputError
from wsis.offline.predict import merge_passes, predict, predict_masks, run_passes

SCALES = (0.5, 1.0, 1.5, 2.0)


def picture(height: int, width: int) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2, : width // 2] = 1
    mask[height // 2 :, width // 2 :] = 2
    return Image.fromarray(COLOURS[mask])


def test_merge_equals_the_official_inference(golden, golden_spec, assert_golden):
    data, spec = golden("rtc_infer_37x50"), golden_spec("rtc_infer_37x50")
    sizes = [tuple(size) for size in data["pass_size"].tolist()]
    logits, class_logits = [], []
    for index, size in enumerate(sizes):
        cam = torch.from_numpy(data[f"cam_{index}"])
        full = F.interpolate(cam, size, mode="bilinear", align_corners=True)
        class_logits.append(full.mean(dim=(2, 3))[0, 1:])
        logits.append(torch.from_numpy(data[f"seg_{index}"])[0])
    scores, probs, _ = merge_passes(
        logits, class_logits, pass_sizes=sizes, flips=[False, True] * 4, size=(37, 50)
    )
    assert_golden(spec, "norm_cam", scores.numpy(), data["norm_cam"])
    assert torch.allclose(probs, torch.stack(class_logits).sigmoid().mean(0))
    mask = predict_masks(scores, spec["params"]["bg"]).numpy()
    candidates = np.sort(np.concatenate([np.full((1, 37, 50), 0.17), data["norm_cam"]]), axis=0)
    undecided = candidates[-1] - candidates[-2] < 1e-5
    assert undecided.mean() < 0.01
    np.testing.assert_array_equal(mask[~undecided], data["pred"][~undecided])


def test_pass_sizes_are_the_official_ones(golden):
    expected = golden("rtc_infer_37x50")["pass_size"].tolist()
    passes = run_passes(
        ColourModel(),
        picture(37, 50),
        scales=SCALES,
        flip=True,
        base_long=None,
        device=None,
        decode=True,
    )
    assert [list(p.size) for p in passes] == expected
    assert [p.flipped for p in passes] == [False, True] * 4


def test_gate_is_a_factor_per_class():
    logits, o = torch.randn(3, 4, 5), torch.tensor([0.3, -2.0])
    layout = {"pass_sizes": [(8, 9)], "flips": [True], "size": (16, 18)}
    gated, *_ = merge_passes([logits], [o], **layout)
    plain, *_ = merge_passes([logits], [o], **layout, gate=False)
    torch.testing.assert_close(gated, plain * o.sigmoid()[:, None, None])


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 33)])
def test_answer_has_the_images_size(size):
    answer = predict(ColourModel(), picture(*size), scales=(0.5, 1.0, 2.0))
    assert answer.scores.shape == (2, *size)
    assert answer.mask.shape == size
    assert answer.mask.dtype == torch.uint8
    assert answer.class_probs.shape == (2,)
    assert 0 <= answer.scores.min() <= answer.scores.max() <= 1


def test_colours_are_found():
    answer = predict(ColourModel(), picture(64, 96), background=0.5)
    assert answer.mask[10, 10] == 1
    assert answer.mask[-10, -10] == 2
    assert answer.mask[10, -10] == answer.mask[-10, 10] == 0


def test_mirrored_image_gives_the_mirrored_answer():
    image = picture(40, 64)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    plain = predict(ColourModel(), image, scales=(1.0,))
    other = predict(ColourModel(), mirrored, scales=(1.0,))
    torch.testing.assert_close(other.scores.flip(-1), plain.scores)


def test_image_and_mirror_image_share_a_forward():
    model = ColourModel()
    predict(model, picture(40, 64), scales=(0.5, 1.0))
    assert model.inputs == [(2, 3, 20, 32), (2, 3, 40, 64)]
    model.inputs.clear()
    predict(model, picture(40, 64), scales=(1.0,), flip=False)
    assert model.inputs == [(1, 3, 40, 64)]


def test_base_long_sets_the_size_before_the_scales():
    model = ColourModel()
    answer = predict(model, picture(90, 61), scales=(0.5, 1.0), base_long=45)
    assert [shape[2:] for shape in model.inputs] == [(22, 15), (45, 30)]
    assert answer.mask.shape == (90, 61)


def test_mode_of_the_network_is_kept():
    model = ColourModel().train()
    answer = predict(model, picture(8, 8), scales=(1.0,))
    assert model.training
    assert not answer.scores.requires_grad
    predict(model.eval(), picture(8, 8), scales=(1.0,))
    assert not model.training


def test_masks_are_an_argmax_with_background():
    rng = np.random.default_rng(0)
    scores = rng.random((3, 7, 5)).astype(np.float32)
    expected = np.argmax(np.concatenate([np.full((1, 7, 5), 0.6, np.float32), scores]), axis=0)
    np.testing.assert_array_equal(predict_masks(torch.from_numpy(scores), 0.6), expected)
    strided = torch.from_numpy(np.repeat(scores, 2, axis=2))[..., ::2]
    np.testing.assert_array_equal(predict_masks(strided, 0.6), expected)


def test_ties_go_to_background_then_to_the_lower_class():
    scores = torch.tensor([0.5, 0.5, 0.7, 0.0]).expand(2, 1, 4)
    assert predict_masks(scores, 0.5).tolist() == [[0, 0, 1, 0]]


def test_bad_input_is_refused():
    model = ColourModel()
    with pytest.raises(InputError, match="RGB"):
        predict(model, picture(8, 8).convert("L"))
    for scales in ((), (1.0, 0.0), (-1.0,)):
        with pytest.raises(InputError, match="scales"):
            predict(model, picture(8, 8), scales=scales)
    model.scale.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        predict(model, picture(8, 8), scales=(1.0,))


def test_with_the_real_network():
    from wsis.models.backbones import create_backbone
    from wsis.models.rtc import RTC

    torch.manual_seed(0)
    model = RTC(create_backbone("small"), num_classes=2, decoder_dims=(16, 16, 8, 16))
    answer = predict(model, picture(45, 61), scales=(0.5, 1.0))
    again = predict(model, picture(45, 61), scales=(0.5, 1.0))
    assert answer.mask.shape == (45, 61)
    assert torch.equal(answer.scores, again.scores)
    assert model.training


def test_own_background_takes_the_constants_place():
    logits, o = torch.randn(3, 4, 5), torch.tensor([9.0, 9.0])
    layout = {"pass_sizes": [(8, 10)], "flips": [False], "size": (8, 10)}
    scores, _, background = merge_passes([logits], [o], **layout, gate=False)
    torch.testing.assert_close(scores.sum(0) + background, torch.ones(8, 10))
    expected = torch.cat([background[None] ** 3, scores]).argmax(0)
    assert torch.equal(predict_masks(scores, background**3).long(), expected)
