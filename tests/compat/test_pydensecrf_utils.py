"""Energies and features as pydensecrf.utils makes them."""

from __future__ import annotations

import numpy as np
import pytest

from wsis.compat.pydensecrf import utils


def test_recorded(golden, golden_spec, assert_golden):
    name = "crf_utils_24x30"
    data, spec = golden(name), golden_spec(name)
    softmax = data["softmax"]
    found = {
        "unary_labels": utils.unary_from_labels(data["labels"], 4, 0.7, zero_unsure=False),
        "unary_labels_unsure": utils.unary_from_labels(data["labels"], 3, 0.6),
        "unary_softmax": utils.unary_from_softmax(softmax),
        "unary_softmax_scale": utils.unary_from_softmax(softmax, scale=0.8),
        "unary_softmax_clip": utils.unary_from_softmax(softmax, clip=0.01),
        "pw_gaussian": utils.create_pairwise_gaussian((3, 5), (9, 11)),
        "pw_bilateral": utils.create_pairwise_bilateral(
            (20, 30), (5, 10, 13), data["image_u8"], chdim=2
        ),
    }
    for key, value in found.items():
        assert_golden(spec, key, value, data[key])


def test_arguments_are_not_changed():
    sm = np.array([[0.1, 1.0], [2.0, 0.5]], np.float32)
    kept = sm.copy()
    for scale in (None, 0.5):
        energies = utils.unary_from_softmax(sm, scale=scale)
        assert energies.flags.c_contiguous and not np.shares_memory(energies, sm)
    utils.unary_from_softmax(sm, clip=None)[...] = 9
    np.testing.assert_array_equal(sm, kept)


def test_clip_is_on_both_sides():
    energies = utils.unary_from_softmax(np.array([[0.0], [3.0]]))
    np.testing.assert_allclose(energies, [[-np.log(1e-5)], [0]], atol=1e-6)


def test_bytes_as_labels_with_unknown():
    # A uint8 0 minus 1 is 255: the original fails here under numpy 2.
    unary = utils.unary_from_labels(np.array([0, 1, 2], np.uint8), 2, 0.7)
    expected = -np.log([[0.5, 0.7, 0.3], [0.5, 0.3, 0.7]])
    np.testing.assert_allclose(unary, expected, rtol=1e-6)


def test_one_label():
    np.testing.assert_allclose(
        utils.unary_from_labels(np.zeros(3, int), 1, 0.7, zero_unsure=False),
        -np.log(0.7),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: utils.unary_from_labels(np.array([0, 3]), 3, 0.7, False), "0..2, got 3"),
        (lambda: utils.unary_from_labels(np.array([0, 255]), 20, 0.7), "0..20, got 255"),
        (lambda: utils.unary_from_labels(np.array([-1]), 3, 0.7), "got -1"),
        (lambda: utils.unary_from_labels(np.array([0.0]), 3, 0.7), "integers"),
        (lambda: utils.unary_from_labels(np.array([0]), 3, 1.0), "gt_prob"),
        (lambda: utils.unary_from_labels(np.array([0]), 0, 0.5), "n_labels"),
        (lambda: utils.unary_from_softmax(np.ones((2, 3)), scale=0), "scale"),
        (lambda: utils.unary_from_softmax(np.float32(1)), "sm must be"),
        (lambda: utils.create_pairwise_gaussian((3,), (4, 5)), "sdims must be 2 widths"),
        (lambda: utils.create_pairwise_gaussian((3, 0), (4, 5)), "positive"),
        (
            lambda: utils.create_pairwise_bilateral((3, 3), (1, 2), np.zeros((4, 5, 3)), 2),
            "schan must be 3 widths",
        ),
        (
            lambda: utils.create_pairwise_bilateral((3, 3), (1,), np.zeros((4, 5, 3)), 9),
            "chdim must be an axis",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
