"""Other repositories' ways to make one answer of many passes, against stacks of all passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.offline.fakes import ColourModel
from tests.offline.test_predict import picture
from wsis.errors import InputError
from wsis.offline.fuse import FUSES, check_fuse, fuse_logits, mean_at_image
from wsis.offline.predict import predict

SIZES = [(20, 26), (10, 13), (31, 40)]  # of the passes; the image is the first
GRIDS = [(5, 7), (3, 4), (8, 10)]


def passes(flip: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits, sizes, flips = [], [], []
    for size, grid in zip(SIZES, GRIDS, strict=True):
        for mirrored in (False, True)[: 1 + flip]:
            logits.append(3 * torch.randn(4, *grid, generator=generator))
            sizes.append(size)
            flips.append(mirrored)
    return logits, sizes, flips


def stack(logits, flips, size):
    """All passes upright at one size, ``[scale, flip, C, H, W]``, in double precision."""
    maps = [F.interpolate(m[None].double(), size, mode="bilinear")[0] for m in logits]
    maps = [m.flip(-1) if f else m for m, f in zip(maps, flips, strict=True)]
    per_scale = sum(flips) // len(SIZES) + 1
    return torch.stack(maps).unflatten(0, (len(SIZES), per_scale))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("rule", ["flip-sum-max", "flip-max-sum", "flip-mean-max"])
def test_logits(rule, flip):
    logits, sizes, flips = passes(flip)
    found = fuse_logits(rule, logits, pass_sizes=sizes, flips=flips, size=SIZES[0])
    if rule == "flip-sum-max":
        fused = stack(logits, flips, SIZES[0]).sum(1).amax(0)
    elif rule == "flip-max-sum":
        fused = stack(logits, flips, SIZES[0]).amax(1).sum(0)
    else:
        small = stack(logits, flips, GRIDS[0]).mean(1).amax(0)
        fused = F.interpolate(small[None], SIZES[0], mode="bilinear")[0]
    torch.testing.assert_close(found.double(), fused.softmax(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.argmax(0), fused.argmax(0))
    torch.testing.assert_close(found.sum(0), torch.ones(SIZES[0]))


@pytest.mark.parametrize("flip", [True, False])
def test_mean_of_logits(flip):
    logits, sizes, flips = passes(flip, seed=2)
    found = fuse_logits("logits", logits, pass_sizes=sizes, flips=flips, size=SIZES[0])
    total = torch.zeros(4, *SIZES[0], dtype=torch.float64)
    for m, size, flipped in zip(logits, sizes, flips, strict=True):
        for side in (size, SIZES[0]):
            m = F.interpolate(m[None].double(), side, mode="bilinear", align_corners=True)[0]
        total += m.flip(-1) if flipped else m
    expected = (total / len(logits)).softmax(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flip", [True, False])
def test_mean_of_masks_made_on_the_grid(flip):
    logits, sizes, flips = passes(flip, seed=1)
    found = fuse_logits("softmax-mean", logits, pass_sizes=sizes, flips=flips, size=SIZES[0])
    masks = [
        F.interpolate(m[None].softmax(1).double(), s, mode="bilinear", align_corners=True)[0]
        for m, s in zip(logits, sizes, strict=True)
    ]
    expected = stack(masks, flips, SIZES[0]).mean((0, 1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_merge_equals_1stage_wsegs(golden, golden_spec, assert_golden):
    data, spec = golden("wseg_parts_k5_15x19"), golden_spec("wseg_parts_k5_15x19")
    cut = [  # the padding of their passes, which ours do not have
        torch.from_numpy(m[:, top : top + height, left : left + width])
        for m, (top, left, height, width) in zip(data["ms_masks"], data["ms_pads"], strict=True)
    ]
    mean = mean_at_image(cut, [False, True] * 2, data["ms_merged"].shape[1:])
    mean[0] **= spec["params"]["bg_pow"]
    mean[1:] *= torch.from_numpy(data["ms_label"])[:, None, None]
    assert_golden(spec, "ms_merged", mean.numpy(), data["ms_merged"])


@pytest.mark.parametrize("rule", [r for r in FUSES if r != "mean"])
def test_prediction_uses_the_rule(rule):
    image, model = picture(40, 64), ColourModel()
    scales = (1.0, 1.5, 0.5)
    found = predict(model, image, scales=scales, fuse=rule, gate=False, background_power=1)
    logits, sizes, flips = [], [], []
    for scale in scales:
        small = image.resize((int(64 * scale), int(40 * scale)), 3)
        x = (torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        for mirrored in (False, True):
            with torch.no_grad():
                maps = model(x.flip(-1) if mirrored else x)
            logits.append(maps.logits[0])
            sizes.append((small.height, small.width))
            flips.append(mirrored)
    probs = fuse_logits(rule, logits, pass_sizes=sizes, flips=flips, size=(40, 64))
    torch.testing.assert_close(found.scores, probs[1:], rtol=1e-4, atol=1e-5)
    sure = probs.topk(2, dim=0).values
    decided = sure[0] - sure[1] > 1e-4
    assert decided.float().mean() > 0.9
    assert torch.equal(found.mask[decided].long(), probs.argmax(0)[decided])
    assert set(found.mask.unique().tolist()) == {0, 1, 2}


def test_classes_that_no_pass_is_sure_of_are_removed():
    image, model = picture(40, 64), ColourModel()
    whole = predict(model, image, gate=False)
    probs = whole.class_probs
    assert probs.min() > 0.9  # both colours are there
    assert torch.equal(predict(model, image, gate=False, class_cut=0.1).scores, whole.scores)
    half = image.crop((0, 0, 32, 20))  # red alone: green's evidence is negative everywhere
    cut = predict(model, half, gate=False, class_cut=0.5)
    assert (cut.class_probs > 0.5).tolist() == [True, False]
    assert cut.scores[1].max() == 0
    assert torch.equal(cut.scores[0], predict(model, half, gate=False).scores[0])


def test_the_surest_pass_counts():
    class OneSurePass(ColourModel):
        def forward(self, image, **options):
            maps = super().forward(image, **options)
            maps.class_logits.fill_(5.0 if image.shape[-1] == 64 else -5.0)
            return maps

    found = predict(OneSurePass(), picture(40, 64), gate=False, class_cut=0.9)
    assert found.class_probs.max() < 0.5 < 0.9  # the mean over passes
    assert (found.scores.amax((1, 2)) > 0).all()


def test_bad_rules():
    with pytest.raises(InputError, match="unknown fuse rule 'max', expected one of mean"):
        predict(ColourModel(), picture(8, 8), fuse="max")
    with pytest.raises(InputError, match="gate"):
        predict(ColourModel(), picture(8, 8), fuse="flip-sum-max")
    with pytest.raises(InputError, match="merge_passes"):
        fuse_logits("mean", [], pass_sizes=[], flips=[], size=(1, 1))
    assert check_fuse("mean", gate=True) == "mean"
