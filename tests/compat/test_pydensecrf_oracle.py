"""The drop-in beside the real pydensecrf, where that is installed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compat.test_pydensecrf import BAD
from wsis.compat.pydensecrf import densecrf as ours
from wsis.compat.pydensecrf import utils as our_utils

dcrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed to compare")
utils = pytest.importorskip("pydensecrf.utils")
if dcrf is ours:
    pytest.skip("pydensecrf is the drop-in itself", allow_module_level=True)

RNG = np.random.default_rng(3)
SHAPE = (60, 84)  # a multiple of 4 pixels: no dummy points


@pytest.fixture(scope="module")
def picture():
    """Smooth colours with edges and noise, and probabilities of 5 labels."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    image = np.stack([2 * x, 3 * y, 120 + 90 * (x > 40)], axis=-1) + RNG.normal(0, 8, (*SHAPE, 3))
    centres = RNG.random((5, 2)) * SHAPE
    distance = np.hypot(y - centres[:, 0, None, None], x - centres[:, 1, None, None])
    scores = np.exp(-distance / 25) + 0.3 * RNG.random((5, *SHAPE))
    return np.clip(image, 0, 255).astype(np.uint8), (scores / scores.sum(0)).astype(np.float32)


PRESETS = {
    "psa": ((3, 3), (80, 13, 10)),
    "irn-label": ((3, 3), (50, 5, 10)),
    "deeplab": ((1, 3), (67, 3, 4)),
    "toco": ((1, 1), (121, 5, 4)),
}


def build(module, helpers, image, probs, preset):
    (sxy, compat), (bi_sxy, srgb, bi_compat) = PRESETS[preset]
    crf = module.DenseCRF2D(image.shape[1], image.shape[0], len(probs))
    crf.setUnaryEnergy(helpers.unary_from_softmax(probs))
    crf.addPairwiseGaussian(sxy=sxy, compat=compat)
    crf.addPairwiseBilateral(sxy=bi_sxy, srgb=srgb, rgbim=image, compat=bi_compat)
    return crf


@pytest.mark.parametrize("preset", PRESETS)
def test_probabilities_and_labels(preset, picture):
    there = build(dcrf, utils, *picture, preset)
    here = build(ours, our_utils, *picture, preset)
    for steps in (0, 1, 10):
        want, found = np.array(there.inference(steps)), np.array(here.inference(steps))
        np.testing.assert_allclose(found, want, atol=2e-4)
        assert np.mean(found.argmax(0) == want.argmax(0)) >= 0.9999


def test_steps_and_divergence(picture):
    there, here = build(dcrf, utils, *picture, "psa"), build(ours, our_utils, *picture, "psa")
    want, found = there.startInference(), here.startInference()
    assert np.array(found[1]).shape == np.array(want[1]).shape == (0, 0)
    for _ in range(3):
        there.stepInference(*want)
        here.stepInference(*found)
        np.testing.assert_allclose(np.array(found[0]), np.array(want[0]), atol=2e-4)
        np.testing.assert_allclose(
            here.klDivergence(found[0]), there.klDivergence(want[0]), rtol=1e-3
        )


def test_labels_that_are_impossible(picture):
    image, probs = picture
    probs = probs.copy()
    probs[1, :30] = 0  # energies of infinity
    results = []
    for module, helpers in ((dcrf, utils), (ours, our_utils)):
        crf = module.DenseCRF2D(SHAPE[1], SHAPE[0], 5)
        with np.errstate(divide="ignore"):
            crf.setUnaryEnergy(helpers.unary_from_softmax(probs, clip=None))
        crf.addPairwiseBilateral(80, 13, image, 10)
        results.append(np.array(crf.inference(5)))
    np.testing.assert_allclose(results[1], results[0], atol=2e-4)
    assert not results[1].reshape(probs.shape)[1, :30].any()


def test_widths_of_each_axis_and_two_bilateral_terms(picture):
    image, probs = picture
    for calls in (
        [
            ("addPairwiseGaussian", ((2, 5), 3)),
            ("addPairwiseBilateral", ((40, 20), (9, 5, 13), image, 6)),
        ],
        [("addPairwiseBilateral", (40, 9, image, 6)), ("addPairwiseBilateral", (9, 20, image, 2))],
        [("addPairwiseGaussian", ((2, 5, 7), 3, 0, 2))],
        [("addPairwiseGaussian", (3, RNG.random((5, 5)).astype(np.float32), 2, 1))],
    ):
        results = []
        for module in (dcrf, ours):
            crf = module.DenseCRF2D(SHAPE[1], SHAPE[0], 5)
            crf.setUnaryEnergy(our_utils.unary_from_softmax(probs))
            for name, arguments in calls:
                getattr(crf, name)(*arguments)
            results.append(np.array(crf.inference(5)))
        np.testing.assert_allclose(results[1], results[0], atol=2e-4)


def test_results_look_alike(picture):
    there, here = (
        build(module, helpers, *picture, "psa").inference(1)
        for module, helpers in ((dcrf, utils), (ours, our_utils))
    )
    assert type(here).__name__ == type(there).__name__ == "MatrixXf"
    assert memoryview(here).format == memoryview(there).format
    assert memoryview(here).shape == memoryview(there).shape
    public = [name for name in dir(there) if not name.startswith("_")]
    assert public == [name for name in dir(here) if not name.startswith("_")] == []


def test_names_are_all_there():
    for theirs, mine in ((dcrf, ours), (utils, our_utils)):
        names = {
            n
            for n, value in vars(theirs).items()
            if not n.startswith("_") and n not in ("Number", "np", "warning", "eigen")
        }
        assert names <= set(vars(mine))
    for name in ("DenseCRF", "DenseCRF2D"):
        methods = {n for n in dir(getattr(dcrf, name)) if not n.startswith("_")}
        assert methods <= set(dir(getattr(ours, name)))
    for kind in ("KernelType", "NormalizationType"):
        assert {m.name: m.value for m in getattr(dcrf, kind)} == {
            m.name: m.value for m in getattr(ours, kind)
        }


@pytest.mark.parametrize("name", BAD)
def test_error_texts(name):
    raised = []
    for module in (dcrf, ours):
        with pytest.raises(ValueError, match=r".") as error:
            BAD[name](module.DenseCRF2D(6, 4, 3))
        raised.append(str(error.value))
    # The real text ends in what lies in memory behind the shape: [6, 4, 3, 0, 0, 0, 0, 0].
    want = raised[0].replace("[6, 4, 3, 0, 0, 0, 0, 0]", "(6, 4, 3)")
    assert raised[1] == want


def test_helpers():
    labels = RNG.integers(0, 4, (9, 11))
    sm = RNG.random((4, 9, 11)).astype(np.float32)
    image = RNG.integers(0, 256, (9, 11, 3)).astype(np.uint8)
    volume = RNG.random((2, 4, 5, 6)).astype(np.float32)
    for call in (
        lambda u: u.unary_from_labels(labels, 4, 0.7, zero_unsure=False),
        lambda u: u.unary_from_labels(labels, 3, 0.6),
        lambda u: u.compute_unary(labels, 3),
        lambda u: u.compute_unary(labels, 3, GT_PROB=0.8),
        lambda u: u.unary_from_softmax(sm),
        lambda u: u.unary_from_softmax(sm.transpose(0, 2, 1), clip=0.01),
        lambda u: u.unary_from_softmax(sm.astype(np.float64), scale=0.8),
        lambda u: u.softmax_to_unary(sm),
        lambda u: u.softmax_to_unary(sm, GT_PROB=0.6),
        lambda u: u.create_pairwise_gaussian((3, 5), (9, 11)),
        lambda u: u.create_pairwise_gaussian((3, 5, 2), (4, 5, 6)),
        lambda u: u.create_pairwise_bilateral((20, 30), (5, 10, 13), image, chdim=2),
        lambda u: u.create_pairwise_bilateral((20, 30), 7, image, chdim=2),
        lambda u: u.create_pairwise_bilateral((20, 30), (5, 7, 8), image.transpose(2, 0, 1), 0),
        lambda u: u.create_pairwise_bilateral((2, 3, 4), (0.1, 0.2), volume, 0),
        lambda u: u.create_pairwise_bilateral((2, 3, 4), (0.1,), volume[0]),
    ):
        want, found = call(utils), call(our_utils)
        assert found.dtype == want.dtype and found.flags.c_contiguous
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)
