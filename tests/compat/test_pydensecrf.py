"""The drop-in against the recorded results, and what it does beyond them."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from wsis.compat.pydensecrf import densecrf as dcrf
from wsis.compat.pydensecrf.utils import unary_from_labels, unary_from_softmax

RNG = np.random.default_rng(7)


def model(image, unary, terms, normalization=dcrf.NORMALIZE_SYMMETRIC):
    height, width = image.shape[:2]
    crf = dcrf.DenseCRF2D(width, height, len(unary))
    crf.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
    for term in terms:
        compat = term["compat"]
        if "srgb" in term:
            crf.addPairwiseBilateral(
                term["sxy"], term["srgb"], image, compat, normalization=normalization
            )
        else:
            crf.addPairwiseGaussian(term["sxy"], compat, normalization=normalization)
    return crf


def probs(crf, steps, shape):
    return np.array(crf.inference(steps)).reshape(-1, *shape)


def expected(data, name):
    """The result without the points that pydensecrf adds where pixels are no multiple of 4."""
    return data[f"{name}_nodummy"] if f"{name}_nodummy" in data else data[name]


# -- recorded results ----------------------------------------------------------------------------


def test_probabilities(golden, golden_spec, assert_golden):
    for name, steps in (("crf_prob_a_k4_65x97", (1, 10)), ("crf_prob_b_k21_48x64", (10,))):
        data, spec = golden(name), golden_spec(name)
        terms = [spec["params"]["gaussian"], spec["params"]["bilateral"]]
        crf = model(data["image_u8"], unary_from_softmax(data["probs"]), terms)
        for t in steps:
            found = probs(crf, t, data["image_u8"].shape[:2])
            assert_golden(spec, f"q_t{t}", found, expected(data, f"q_t{t}"))
            assert abs(found - expected(data, f"q_t{t}")).mean() <= spec["tolerance"]["mean_abs"]


@pytest.mark.parametrize("case", ["a_k21_40x52", "b_k2_36x48", "c_k81_21x28"])
def test_labels(case, golden, golden_spec, assert_golden):
    data, spec = golden(f"crf_label_{case}"), golden_spec(f"crf_label_{case}")
    params = spec["params"]
    labels, count = data["labels"], int(case.split("_")[1][1:])
    unary = unary_from_labels(labels, count, params["gt_prob"], params["zero_unsure"])
    crf = model(data["image_u8"], unary, [params["gaussian"], params["bilateral"]])
    found = probs(crf, params["t"], labels.shape)
    assert_golden(spec, "q_t10", found[params["q_rows"]], expected(data, "q_t10"))
    best_two = np.sort(found, axis=0)[-2:]
    decided = best_two[1] - best_two[0] > 4e-4
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(found.argmax(0)[decided], data["argmax"][decided])


def test_compatibilities(golden, golden_spec, assert_golden):
    name = "crf_compat_k3_40x48"
    data, spec = golden(name), golden_spec(name)
    gaussian, bilateral = spec["params"]["gaussian"], spec["params"]["bilateral"]
    image, steps = data["image_u8"], spec["params"]["iterations"]
    flat = np.full_like(image, 90)
    vector = data["V"]
    cases = {
        "q_matrix": (image, [gaussian, bilateral | {"compat": data["A"]}]),
        "q_diag": (image, [gaussian | {"compat": vector}, bilateral | {"compat": 2 * vector}]),
        "q_gauss_only": (image, [gaussian]),
        "q_none": (image, []),
        "q_flat": (flat, [gaussian, bilateral]),
    }
    for key, (picture, terms) in cases.items():
        crf = model(picture, data["unary"], terms)
        assert_golden(spec, key, probs(crf, steps, image.shape[:2]), expected(data, key))


def test_normalizations_and_kernels(golden, golden_spec, assert_golden):
    name = "crf_norm_k3_24x30"
    data, spec = golden(name), golden_spec(name)
    for norm in dcrf.NormalizationType:
        weights = (0.01, 0.01) if norm == dcrf.NO_NORMALIZATION else (2, 5)
        terms = [
            {"sxy": 2, "compat": weights[0]},
            {"sxy": 30, "srgb": 10, "compat": weights[1]},
        ]
        crf = model(data["image_u8"], data["unary"], terms, norm)
        for t in spec["params"]["iterations"]:
            key = f"q{t}_{norm.name}"
            assert_golden(spec, key, probs(crf, t, (24, 30)), expected(data, key))


def test_steps_and_divergence(golden, golden_spec, assert_golden):
    name = "crf_steps_k4_37x53"
    data, spec = golden(name), golden_spec(name)
    params = spec["params"]
    crf = model(data["image_u8"], data["unary"], [params["gaussian"], params["bilateral"]])
    q, tmp1, tmp2 = crf.startInference()
    done = 0
    for steps, kl in zip(params["steps"], data["kl_scalar_build"], strict=True):
        for _ in range(steps - done):
            crf.stepInference(q, tmp1, tmp2)
        done = steps
        assert_golden(
            spec, f"q_{steps}", np.array(q).reshape(4, 37, 53), expected(data, f"q_{steps}")
        )
        np.testing.assert_allclose(crf.klDivergence(q), kl, rtol=spec["tolerance"]["kl_rtol"])
        np.testing.assert_allclose(np.array(crf.inference(steps)), np.array(q), rtol=0, atol=2e-6)


def test_any_features(golden, golden_spec, assert_golden):
    name = "crf_energy_n1000"
    data, spec = golden(name), golden_spec(name)
    compat = spec["params"]["compat"]
    for d in (1, 2, 5, 6):
        crf = dcrf.DenseCRF(1000, 3)
        crf.setUnaryEnergy(data["unary"])
        crf.addPairwiseEnergy(data[f"features_{d}"], compat)
        for t in (1, 5):
            assert_golden(spec, f"q{t}_d{d}", np.array(crf.inference(t)), data[f"q{t}_d{d}"])
    crf = dcrf.DenseCRF(997, 3)
    crf.setUnary(dcrf.ConstUnary(np.ascontiguousarray(data["unary"][:, :997])))
    crf.addPairwiseEnergy(np.ascontiguousarray(data["features_5"][:, :997]), compat)
    for t in (1, 5):
        found = np.array(crf.inference(t))
        assert_golden(spec, f"q{t}_d5_pad", found, expected(data, f"q{t}_d5_pad"))
    crf = dcrf.DenseCRF(1000, 3)
    crf.setUnary(dcrf.LogisticUnary(data["logistic_L"], data["logistic_f"]))
    assert_golden(spec, "q0_logistic", np.array(crf.inference(0)), data["q0_logistic"])
    crf.addPairwiseEnergy(data["features_2"], 2)
    assert_golden(spec, "q3_logistic", np.array(crf.inference(3)), data["q3_logistic"])


# -- results are buffers -------------------------------------------------------------------------


def small(labels=3, height=4, width=6):
    image = RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)
    unary = RNG.random((labels, height * width), np.float32)
    terms = [{"sxy": 2, "compat": 2}, {"sxy": 5, "srgb": 9, "compat": 3}]
    return model(image, unary, terms), image, unary


def test_results_have_the_buffer_protocol_and_nothing_else():
    q = small()[0].inference(2)
    view = memoryview(q)
    assert (view.format, view.shape, view.readonly) == ("f", (3, 24), False)
    array = np.array(q)
    assert type(array) is np.ndarray and array.dtype == np.float32
    np.testing.assert_allclose(array.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(np.argmax(q, axis=0), array.argmax(0))
    assert np.asarray(q).base is not None
    for name in ("shape", "dtype", "__len__", "__getitem__", "__array__", "__iter__"):
        assert not hasattr(q, name)


def test_the_array_outlives_its_owner():
    crf = small()[0]
    view = np.asarray(crf.inference(1))
    copy = view.copy()
    del crf
    gc.collect()
    np.zeros((3, 24), np.float32)
    np.testing.assert_array_equal(view, copy)


def test_two_runs_and_two_orders():
    crf, image, unary = small()
    again = dcrf.DenseCRF2D(6, 4, 3)
    again.addPairwiseGaussian(sxy=2, compat=2)
    again.addPairwiseBilateral(sxy=5, srgb=9, rgbim=image, compat=3)
    again.setUnaryEnergy(unary)  # after the terms
    np.testing.assert_array_equal(np.array(crf.inference(5)), np.array(again.inference(5)))
    np.testing.assert_array_equal(np.array(crf.inference(5)), np.array(crf.inference(5)))


# -- arguments -----------------------------------------------------------------------------------


def test_read_only_arrays():
    _, image, unary = small()
    reference = np.array(model(image, unary, [{"sxy": 5, "srgb": 9, "compat": 3}]).inference(3))
    for array in (image, unary):
        array.setflags(write=False)
    crf = dcrf.DenseCRF2D(6, 4, 3)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseBilateral(sxy=5, srgb=9, rgbim=image, compat=3)
    np.testing.assert_array_equal(np.array(crf.inference(3)), reference)
    features = np.ones((2, 24), np.float32)
    features.setflags(write=False)
    crf.addPairwiseEnergy(features, 1)


BAD = {
    "unary shape": lambda c: c.setUnaryEnergy(np.zeros((24, 3), np.float32)),
    "unary dtype": lambda c: c.setUnaryEnergy(np.zeros((3, 24))),
    "unary rank": lambda c: c.setUnaryEnergy(np.zeros((3, 4, 6), np.float32)),
    "unary order": lambda c: c.setUnaryEnergy(np.zeros((24, 3), np.float32).T),
    "feature count": lambda c: c.addPairwiseEnergy(np.zeros((2, 5), np.float32), 3),
    "feature dtype": lambda c: c.addPairwiseEnergy(np.zeros((2, 24), int), 3),
    "image size": lambda c: c.addPairwiseBilateral(3, 3, np.zeros((6, 4, 3), np.uint8), 3),
    "image dtype": lambda c: c.addPairwiseBilateral(3, 3, np.zeros((4, 6, 3), np.float32), 3),
    "image rank": lambda c: c.addPairwiseBilateral(3, 3, np.zeros((4, 6), np.uint8), 3),
    "image order": lambda c: c.addPairwiseBilateral(
        3, 3, np.zeros((4, 3, 6), np.uint8).swapaxes(1, 2), 3
    ),
    "compat rank": lambda c: c.addPairwiseGaussian(3, np.zeros((3, 3, 3), np.float32)),
    "compat dtype": lambda c: c.addPairwiseGaussian(3, np.zeros(3)),
}
# pydensecrf takes these, and reads beyond an array, crashes, or goes on with NaN.
WORSE = {
    "zero width": lambda c: c.addPairwiseGaussian(0, 3),
    "negative width": lambda c: c.addPairwiseGaussian((3, -1), 3),
    "NaN width": lambda c: c.addPairwiseBilateral(
        3, float("nan"), np.zeros((4, 6, 3), np.uint8), 3
    ),
    "short compat": lambda c: c.addPairwiseGaussian(3, np.zeros(2, np.float32)),
    "small compat": lambda c: c.addPairwiseGaussian(3, np.zeros((2, 2), np.float32)),
    "NaN compat": lambda c: c.addPairwiseGaussian(3, float("nan")),
    "kernel": lambda c: c.addPairwiseGaussian(3, 3, kernel=7),
    "normalization": lambda c: c.addPairwiseGaussian(3, 3, normalization=4),
    "NaN features": lambda c: c.addPairwiseEnergy(np.full((2, 24), np.nan, np.float32), 3),
    "far features": lambda c: c.addPairwiseEnergy(
        np.linspace(0, 1e30, 48, dtype=np.float32).reshape(2, 24), 3
    ),
    "NaN unary": lambda c: (
        c.setUnaryEnergy(np.full((3, 24), np.nan, np.float32)),
        c.inference(1),
    ),
}


@pytest.mark.parametrize("name", [*BAD, *WORSE])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=r".") as error:
        (BAD | WORSE)[name](dcrf.DenseCRF2D(6, 4, 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("unary shape", "Bad shape for unary energy (Need (3, 24), got (24, 3))"),
        ("feature count", "Bad shape for pairwise energy (Need (?, 24), got (2, 5))"),
        ("image size", "Bad shape for pairwise bilateral (Need (4, 6, 3), got (6, 4, 3))"),
    ],
)
def test_shapes_in_the_errors(name, text):
    with pytest.raises(ValueError, match=r".") as error:
        BAD[name](dcrf.DenseCRF2D(6, 4, 3))
    assert str(error.value) == text


def test_wrong_kinds():
    crf = dcrf.DenseCRF2D(6, 4, 3)
    for call in (
        lambda: crf.setUnaryEnergy(None),
        lambda: crf.setUnaryEnergy([[0.0] * 24] * 3),
        lambda: crf.setUnary(np.zeros((3, 24), np.float32)),
        lambda: crf.klDivergence(np.zeros((3, 24), np.float32)),
        lambda: crf.addPairwiseGaussian("a", 3),
        lambda: crf.addPairwiseGaussian(3, [1, 2, 3]),
        lambda: dcrf.DenseCRF("3", 2),
        lambda: dcrf.DenseCRF(3),
        lambda: crf.inference(),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="nlabels"):
        dcrf.DenseCRF(3, 0)
    with pytest.raises(ValueError, match="w and h"):
        dcrf.DenseCRF2D(-1, 3, 2)


def test_enumerations():
    assert [int(kind) for kind in dcrf.KernelType] == [0, 1, 2]
    assert [int(norm) for norm in dcrf.NormalizationType] == [0, 1, 2, 3]
    assert dcrf.FULL_KERNEL is dcrf.KernelType.FULL_KERNEL
    assert dcrf.NORMALIZE_SYMMETRIC is dcrf.NormalizationType.NORMALIZE_SYMMETRIC


# -- edges ---------------------------------------------------------------------------------------


def test_no_unary_is_no_preference():
    crf = dcrf.DenseCRF(5, 4)
    np.testing.assert_allclose(np.array(crf.inference(3)), 0.25, atol=1e-6)


def test_one_label_one_pixel_no_pixel():
    crf = small(labels=1)[0]
    np.testing.assert_allclose(np.array(crf.inference(3)), 1, atol=1e-6)
    one = model(
        np.zeros((1, 1, 3), np.uint8),
        np.array([[1], [0]], np.float32),
        [{"sxy": 3, "compat": 3}, {"sxy": 3, "srgb": 3, "compat": 3}],
    )
    assert np.argmax(one.inference(10), axis=0) == [1]
    nothing = dcrf.DenseCRF2D(0, 4, 3)
    nothing.setUnaryEnergy(np.zeros((3, 0), np.float32))
    nothing.addPairwiseGaussian(sxy=3, compat=3)
    assert np.array(nothing.inference(2)).shape == (3, 0)


def test_numbers_of_iterations():
    crf = small()[0]
    zero = np.array(crf.inference(0))
    np.testing.assert_array_equal(np.array(crf.inference(-1)), zero)
    np.testing.assert_array_equal(
        np.array(crf.inference(np.int64(2))), np.array(crf.inference(2.0))
    )


def test_a_subclass_that_forgets_us():
    class Own(dcrf.DenseCRF2D):
        def __init__(self, width, height, labels, name):
            self.name = name

    crf = Own(6, 4, 3, "x")
    crf.addPairwiseGaussian(sxy=3, compat=3)
    assert np.array(crf.inference(1)).shape == (3, 24)
