"""Helper functions of the repositories, and rloss's bilateral filter."""

from __future__ import annotations

import numpy as np
import pytest

from wsis.compat import DenseCRF, crf_inference, crf_inference_inf, crf_inference_label
from wsis.compat.bilateralfilter import bilateralfilter, bilateralfilter_batch
from wsis.compat.crf import _crf_with_alpha

RNG = np.random.default_rng(5)


def expected(data, name):
    return data[f"{name}_nodummy"] if f"{name}_nodummy" in data else data[name]


def test_crf_inference(golden, golden_spec, assert_golden):
    name = "crf_prob_a_k4_65x97"
    data, spec = golden(name), golden_spec(name)
    image, probs = data["image_u8"], data["probs"]
    for key, options in (("q_t1", {"t": 1}), ("q_t10", {}), ("q_t10_scale2", {"scale_factor": 2})):
        found = crf_inference(image, probs, labels=4, **options)
        assert_golden(spec, key, found, expected(data, key))
    sure = probs.copy()
    sure[1] = 0
    sure[0, : 65 // 3] = 1
    found = crf_inference(image, sure, labels=4)
    best_two = np.sort(found, axis=0)[-2:]
    decided = best_two[1] - best_two[0] > 4e-4
    want = expected(data, "argmax_t10_clipped")
    assert np.mean((found.argmax(0) != want)[decided]) < 1e-3


def test_crf_inference_label(golden):
    data = golden("crf_label_a_k21_40x52")
    found = crf_inference_label(data["image_u8"], data["labels"], n_labels=21)
    assert found.shape == (40, 52)
    assert np.mean(found == data["argmax"]) > 0.999


def test_callable(golden, golden_spec, assert_golden):
    name = "crf_testtime_k5_37x53"
    data, spec = golden(name), golden_spec(name)
    for key in ("afa", "toco"):
        crf = DenseCRF(**spec["params"][key])
        assert_golden(
            spec, f"q_{key}", crf(data["image_u8"], data["probs"]), expected(data, f"q_{key}")
        )


def test_constants_of_the_final_one():
    image = RNG.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    probs = RNG.random((3, 12, 16)).astype(np.float32)
    by_hand = DenseCRF(4, pos_w=3, pos_xy_std=4 / 2, bi_w=3, bi_xy_std=83 / 2, bi_rgb_std=5)
    found = crf_inference_inf(image, probs, t=4, scale_factor=2, labels=3)
    np.testing.assert_array_equal(found, by_hand(image, probs))


def test_with_alpha_in_both_forms():
    image = RNG.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    cams = {14: RNG.random((12, 16)), 3: RNG.random((12, 16)) / 2}
    found = _crf_with_alpha(cams, 4, orig_img=image)
    assert list(found) == [0, 15, 4]
    background = (1 - np.maximum(cams[14], cams[3])) ** 4
    by_hand = crf_inference(image, np.stack([background, cams[14], cams[3]]), labels=3)
    np.testing.assert_array_equal(np.stack(list(found.values())), by_hand)
    again = _crf_with_alpha(cams, image, alpha=4)
    np.testing.assert_array_equal(again[15], found[15])


def test_strided_and_read_only_images():
    image = RNG.integers(0, 256, (12, 32, 3)).astype(np.uint8)[:, ::2]
    probs = RNG.random((2, 12, 16)).astype(np.float32)
    fixed = np.ascontiguousarray(image)
    fixed.setflags(write=False)
    np.testing.assert_array_equal(
        crf_inference(image, probs, labels=2), crf_inference(fixed, probs, labels=2)
    )


def test_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    image = RNG.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    probs = RNG.random((2, 12, 16)).astype(np.float32)
    found = crf_inference(torch.from_numpy(image), torch.from_numpy(probs), labels=2)
    np.testing.assert_array_equal(found.numpy(), crf_inference(image, probs, labels=2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, p: crf_inference(i, p), "labels = 21"),
        (lambda i, p: crf_inference(i[:, 1:], p, labels=2), "img must be"),
        (lambda i, p: crf_inference(i.astype(float), p, labels=2), "dtype mismatch"),
        (lambda i, p: crf_inference_label(i, p[0].astype(int)[1:]), "img must be"),
        (lambda i, p: crf_inference_label(i, np.full((12, 16), 255)), "got 255"),
        (lambda i, p: _crf_with_alpha({1: p[0]}, 4), "img must be given"),
        (lambda i, p: _crf_with_alpha({}, i), "at least one class"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((12, 16, 3), np.uint8), np.ones((2, 12, 16), np.float32))


# -- bilateralfilter -----------------------------------------------------------------------------


def test_bilateralfilter(golden, golden_spec, assert_golden):
    name = "energy_a_n2_k4_48x48"
    data, spec = golden(name), golden_spec(name)
    images = np.ascontiguousarray(data["image_u8"].transpose(0, 3, 1, 2), np.float32)
    params = spec["params"]["filter"]
    widths = (params["sigma_rgb"], params["sigma_xy"])
    one = np.full(4 * 48 * 48, np.nan, np.float32)
    bilateralfilter(images[0].ravel(), data["seg"][0].ravel(), one, 48, 48, *widths)
    assert_golden(spec, "filter_item0", one.reshape(4, 48, 48), data["filter_item0"])
    outs = np.full(2 * one.size, np.nan, np.float32)
    assert (
        bilateralfilter_batch(images.ravel(), data["seg"].ravel(), outs, 2, 4, 48, 48, *widths)
        is None
    )
    np.testing.assert_array_equal(outs[: one.size], one)
    assert np.isfinite(outs).all()


def test_in_place_of_its_input():
    image, values = RNG.random(3 * 20, np.float32) * 255, RNG.random(20, np.float32)
    out = np.empty(20, np.float32)
    bilateralfilter(image, values, out, 4, 5, 15, 100)
    bilateralfilter(image, values, values, 4, 5, 15, 100)
    np.testing.assert_array_equal(values, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros(59, np.float32)}, "60 float32"),
        ({"image": np.zeros(60)}, "float64"),
        ({"out": np.zeros(40, np.float32)[::2]}, "strided"),
        ({"out": np.broadcast_to(np.float32(0), 20)}, "outs must be"),
        ({"sigmargb": 0}, "positive"),
        ({"sigmaxy": -3}, "positive"),
    ],
)
def test_filter_mistakes(change, message):
    call = {
        "image": np.zeros(60, np.float32),
        "_in": np.zeros(20, np.float32),
        "out": np.zeros(20, np.float32),
        "H": 4,
        "W": 5,
        "sigmargb": 15,
        "sigmaxy": 100,
    }
    with pytest.raises(ValueError, match=message):
        bilateralfilter(**call | change)


def test_nothing_to_filter():
    empty = np.empty(0, np.float32)
    bilateralfilter_batch(empty, empty, empty, 0, 21, 4, 5, 15, 100)
    bilateralfilter(empty, empty, empty, 0, 5, 15, 100)
