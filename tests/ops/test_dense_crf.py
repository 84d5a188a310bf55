"""The dense CRF: golden vectors, the slow reference, pydensecrf2, unaries, presets, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.dense_crf import mean_field_reference, softmax
from tests.reference.permutohedral import pixel_features
from wsis import _lattice
from wsis.errors import InputError
from wsis.ops.dense_crf import PRESETS, Bilateral, Features, Gaussian, dense_crf, label_energies

PSA = PRESETS["psa"]


def images(u8):
    return torch.from_numpy(u8).permute(2, 0, 1)[None]


def probs_of(z, key="probs"):
    return torch.from_numpy(z[key])[None]


def check(golden, name, key, q, **kind):
    """Against `key`, or its twin without the library's padding points where there is one."""
    z, spec = golden(name), kind["golden_spec"](name)
    key = f"{key}_nodummy" if f"{key}_nodummy" in z else key
    kind["assert_golden"](spec, key, q[0].numpy().reshape(z[key].shape), z[key])
    if "mean_abs" in spec["tolerance"] and z[key].dtype.kind == "f":
        error = np.abs(q[0].numpy().reshape(z[key].shape) - z[key]).mean()
        assert error <= spec["tolerance"]["mean_abs"]


# ---- golden vectors ----------------------------------------------------------------------------


def test_golden_probs(golden, golden_spec, assert_golden):
    rules = {"golden_spec": golden_spec, "assert_golden": assert_golden}
    name = "crf_prob_a_k4_65x97"
    z = golden(name)
    image, probs = images(z["image_u8"]), probs_of(z)
    for t in (1, 10):
        q = dense_crf(image, probs, preset="psa", iterations=t)
        check(golden, name, f"q_t{t}", q, **rules)
    half = (Gaussian(1.5, 3), Bilateral(40, 13, 10))
    check(golden, name, "q_t10_scale2", dense_crf(image, probs, terms=half), **rules)
    probs = probs.clone()
    probs[:, 1] = 0
    probs[:, 0, : probs.shape[2] // 3] = 1
    labels = dense_crf(image, probs, preset="psa", output="labels")
    check(golden, name, "argmax_t10_clipped", labels, **rules)
    name = "crf_prob_b_k21_48x64"
    z = golden(name)
    image, probs = images(z["image_u8"]), probs_of(z)
    check(golden, name, "q_t10", dense_crf(image, probs, preset="psa"), **rules)
    labels = dense_crf(image, probs, preset="psa", iterations=1, output="labels")
    check(golden, name, "q_t1_argmax", labels, **rules)


@pytest.mark.parametrize(
    ("name", "labels"),
    [("crf_label_a_k21_40x52", 21), ("crf_label_b_k2_36x48", 2), ("crf_label_c_k81_21x28", 81)],
)
def test_golden_labels(name, labels, golden, golden_spec, assert_golden):
    rules = {"golden_spec": golden_spec, "assert_golden": assert_golden}
    z = golden(name)
    image, map_ = images(z["image_u8"]), torch.from_numpy(z["labels"])[None]
    options = {"preset": "irn-label", "unary_kind": "labels", "num_labels": labels}
    q, best = dense_crf(image, map_, **options, output="both")
    check(golden, name, "argmax", best, **rules)
    rows = golden_spec(name)["params"]["q_rows"]
    check(golden, name, "q_t10", q[:, rows], **rules)
    if "q_t1" in z:
        check(golden, name, "q_t1", dense_crf(image, map_, **options, iterations=1), **rules)


@pytest.mark.parametrize("preset", ["afa", "toco"])
def test_golden_test_time(preset, golden, golden_spec, assert_golden):
    name = "crf_testtime_k5_37x53"
    z = golden(name)
    q = dense_crf(images(z["image_u8"]), probs_of(z), preset=preset)
    rules = {"golden_spec": golden_spec, "assert_golden": assert_golden}
    check(golden, name, f"q_{preset}", q, **rules)


def energy_of(z):
    height, width = z["image_u8"].shape[:2]
    return torch.from_numpy(z["unary"]).view(1, -1, height, width)


def test_golden_compatibilities(golden, golden_spec, assert_golden):
    name = "crf_compat_k3_40x48"
    z = golden(name)
    image, energy = images(z["image_u8"]), energy_of(z)
    a, v = z["A"], z["V"]
    gauss, bilateral = Gaussian(3, 3), Bilateral(40, 9, 6)
    flat = torch.full_like(image, 90)
    cases = {
        "q_matrix": (image, [gauss, Bilateral(40, 9, torch.from_numpy(a))]),
        "q_diag": (image, [Gaussian(3, v.tolist()), Bilateral(40, 9, (2 * v).tolist())]),
        "q_gauss_only": (image, [gauss]),
        "q_none": (image, []),
        "q_flat": (flat, [gauss, bilateral]),
    }
    for key, (pixels, terms) in cases.items():
        q = dense_crf(pixels, energy, terms=terms, iterations=5, unary_kind="energy")
        check(golden, name, key, q, golden_spec=golden_spec, assert_golden=assert_golden)


def test_golden_normalisations(golden, golden_spec, assert_golden):
    name = "crf_norm_k3_24x30"
    z = golden(name)
    image, energy = images(z["image_u8"]), energy_of(z)
    names = {"none": "NO_NORMALIZATION"} | {
        kind: f"NORMALIZE_{kind.upper()}" for kind in ("before", "after", "symmetric")
    }
    for kind, theirs in names.items():
        weights = (0.01, 0.01) if kind == "none" else (2, 5)
        terms = [Gaussian(2, weights[0], kind), Bilateral(30, 10, weights[1], kind)]
        for t in (1, 4):
            q = dense_crf(image, energy, terms=terms, iterations=t, unary_kind="energy")
            key = f"q{t}_{theirs}"
            check(golden, name, key, q, golden_spec=golden_spec, assert_golden=assert_golden)


def test_golden_steps(golden, golden_spec, assert_golden):
    """Step by step is the same as all at once, up to rounding: the steps in between shift less."""
    name = "crf_steps_k4_37x53"
    z = golden(name)
    image, energy = images(z["image_u8"]), energy_of(z)
    terms = _terms(image, PSA, 4)
    unary = energy.flatten(2).numpy()
    q = _lattice.mean_field(unary, terms, 0, np.empty)[0]
    for t in range(11):
        if f"q_{t}" in z:
            check(golden, name, f"q_{t}", torch.from_numpy(q), golden_spec=golden_spec,
                  assert_golden=assert_golden)  # fmt: skip
            once = dense_crf(image, energy, preset="psa", iterations=t, unary_kind="energy")
            np.testing.assert_allclose(once.flatten(2).numpy(), q, rtol=0, atol=2e-6)
        q = _lattice.mean_field(unary, terms, 1, np.empty, start=q)[0]


def _terms(image, pairwise, classes):
    from wsis.ops.dense_crf import _make_term

    return [_make_term(term, image, classes) for term in pairwise]


def test_golden_features(golden, golden_spec, assert_golden):
    name = "crf_energy_n1000"
    z = golden(name)
    compat = golden_spec(name)["params"]["compat"]
    cases = [(f"q{t}_d{d}", d, 1000, t) for t in (1, 5) for d in (1, 2, 5, 6)]
    cases += [(f"q{t}_d5_pad", 5, 997, t) for t in (1, 5)]
    for key, d, n, t in cases:
        features = torch.from_numpy(z[f"features_{d}"][:, :n]).view(1, d, 1, n)
        energy = torch.from_numpy(z["unary"][:, :n]).view(1, 3, 1, n)
        image = torch.zeros(1, 3, 1, n, dtype=torch.uint8)
        options = {"terms": [Features(features, compat)], "iterations": t, "unary_kind": "energy"}
        q = dense_crf(image, energy, **options)
        if key.endswith("_pad"):  # recorded with the library's padding points only
            error = np.abs(q[0, :, 0].numpy() - z[key])
            assert error.max() <= 0.05 and np.median(error) <= 2e-4
        else:
            check(golden, name, key, q, golden_spec=golden_spec, assert_golden=assert_golden)


# ---- against the slow reference ----------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    labels=st.integers(1, 27),
    widths=st.tuples(st.floats(0.5, 9), st.floats(1, 90), st.floats(3, 90)),
    normalization=st.sampled_from(_lattice.NORMALIZATIONS),
    form=st.sampled_from(["potts", "diagonal", "matrix"]),
    iterations=st.integers(0, 3),
    kind=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 999),
)
def test_anything(size, labels, widths, normalization, form, iterations, kind, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    unary = (rng.standard_normal((labels, *size)) * 3).astype(kind)
    weight = 0.1 if normalization == "none" else 3.0
    compat = {
        "potts": weight,
        "diagonal": (-weight * rng.random(labels)).tolist(),
        "matrix": (weight * rng.random((labels, labels))).tolist(),
    }[form]
    sxy, wide, srgb = widths
    terms = [Gaussian(sxy, 2.0), Bilateral(wide, srgb, compat, normalization)]
    q = dense_crf(
        images(image), torch.from_numpy(unary)[None], terms=terms, iterations=iterations,
        unary_kind="energy",
    )  # fmt: skip
    slow = [
        (pixel_features(*size, sxy), 2.0, "symmetric"),
        (pixel_features(*size, wide, image, srgb), compat, normalization),
    ]
    expected = mean_field_reference(unary.reshape(labels, -1), slow, iterations)
    assert q.dtype == getattr(torch, kind)
    assert np.abs(q[0].numpy().reshape(expected.shape) - expected).max() <= 5e-5


@pytest.mark.parametrize("labels", [1, 2, 8, 9, 15, 16, 17, 24, 25, 32, 33, 48, 49, 81, 97, 300])
def test_any_number_of_labels(labels):
    rng = np.random.default_rng(labels)
    image = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    unary = rng.standard_normal((labels, 99)).astype(np.float32)
    energy = torch.from_numpy(unary).view(1, labels, 9, 11)
    q, best = dense_crf(
        images(image), energy, preset="psa", iterations=2, unary_kind="energy", output="both"
    )
    slow = [
        (pixel_features(9, 11, 3), 3, "symmetric"),
        (pixel_features(9, 11, 80, image, 13), 10, "symmetric"),
    ]
    expected = mean_field_reference(unary, slow, 2)
    assert np.abs(q[0].numpy().reshape(labels, -1) - expected).max() <= 2e-5
    assert torch.equal(best, q.argmax(dim=1))
    assert (q.sum(dim=1) - 1).abs().max() <= 1e-5
    alone = dense_crf(
        images(image), energy, preset="psa", iterations=2, unary_kind="energy", output="labels"
    )
    assert torch.equal(alone, best)


# ---- against pydensecrf2 -----------------------------------------------------------------------


def photograph(size, seed=0):
    """Smooth regions with noise."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 7, 9, generator=g)
    image = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255
    return (image + 6 * torch.randn(image.shape, generator=g)).clamp(0, 255).to(torch.uint8)


def scores(labels, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    coarse = 4 * torch.randn(1, labels, size[0] // 9 + 2, size[1] // 9 + 2, generator=g)
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear").softmax(dim=1)


def theirs(image, probs, terms, iterations):
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    _, labels, height, width = probs.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    energy = -np.log(np.clip(probs[0].numpy().reshape(labels, -1), 1e-5, 1))
    crf.setUnaryEnergy(np.ascontiguousarray(energy.astype(np.float32)))
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    for term in terms:
        if isinstance(term, Gaussian):
            crf.addPairwiseGaussian(sxy=term.sxy, compat=term.compat)
        else:
            crf.addPairwiseBilateral(sxy=term.sxy, srgb=term.srgb, rgbim=pixels, compat=term.compat)
    return torch.from_numpy(np.array(crf.inference(iterations))).view(probs.shape)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_labels_are_those_of_pydensecrf(preset):
    size, labels = (300, 340), 5  # 102,000 pixels
    image, probs = photograph(size), scores(labels, size)
    q = dense_crf(image, probs, preset=preset)
    expected = theirs(image, probs, PRESETS[preset], 10)
    error = (q - expected).abs()
    assert error.mean() <= 2e-6  # mean_abs of the golden manifest
    assert (error > 1e-4).float().mean() <= 1e-5  # a few pixels on the edge amplify rounding
    assert (q.argmax(1) == expected.argmax(1)).float().mean() >= 0.9999


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 10).map(lambda n: 4 * n)),
    labels=st.integers(1, 24),
    preset=st.sampled_from(sorted(PRESETS)),
    iterations=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_pydensecrf_at_any_size(size, labels, preset, iterations, seed):
    image, probs = photograph(size, seed), scores(labels, size, seed)
    q = dense_crf(image, probs, preset=preset, iterations=iterations)
    expected = theirs(image, probs, PRESETS[preset], iterations)
    assert (q - expected).abs().max() <= 2e-4


# ---- unaries, lists, batches -------------------------------------------------------------------

IMAGE, PROBS = photograph((13, 21)), scores(3, (13, 21))


def test_kinds_of_unaries_agree():
    expected = dense_crf(IMAGE, PROBS, preset="afa")
    energy = -PROBS.clamp(1e-5, 1).log()
    for unary, kind in ((energy, "energy"), (-energy, "logits"), (PROBS.double(), "probs")):
        q = dense_crf(IMAGE, unary, preset="afa", unary_kind=kind)
        assert (q - expected).abs().max() <= 1e-6
    float_image = dense_crf(IMAGE.float(), PROBS, preset="afa")
    assert torch.equal(float_image, expected)


@pytest.mark.parametrize("zero_unsure", [False, True])
def test_label_energies(zero_unsure):
    labels = torch.tensor([[[0, 1, 2], [3, 255, 1]]])
    energy = label_energies(labels, 4 - zero_unsure, gt_prob=0.6, zero_unsure=zero_unsure)
    assert torch.allclose((-energy).exp().sum(dim=1), torch.ones(()))
    own = (-energy).exp()
    if zero_unsure:
        assert torch.allclose(own[0, :, 0, 0], torch.full((3,), 1 / 3))
        assert torch.allclose(own[0, :, 0, 1], torch.tensor([0.6, 0.2, 0.2]))
    else:
        assert torch.allclose(own[0, :, 0, 2], torch.tensor([0.4 / 3, 0.4 / 3, 0.6, 0.4 / 3]))
    assert torch.allclose(own[0, :, 1, 1], torch.full((4 - zero_unsure,), 1 / (4 - zero_unsure)))


def test_batches_and_lists():
    image = torch.cat([photograph((13, 21), seed) for seed in range(3)])
    probs = torch.cat([scores(4, (13, 21), seed) for seed in range(3)])
    q, labels = dense_crf(image, probs, preset="toco", output="both")
    assert labels.dtype == torch.int64
    ones = [dense_crf(image[b : b + 1], probs[b : b + 1], preset="toco") for b in range(3)]
    assert torch.equal(q, torch.cat(ones))
    other, few = photograph((8, 30)), scores(2, (8, 30))
    listed, best = dense_crf([image[0], other[0]], [probs[0], few[0]], preset="toco", output="both")
    assert torch.equal(listed[0], q[0])
    assert torch.equal(listed[1], dense_crf(other, few, preset="toco")[0])
    assert best[1].shape == (8, 30)
    assert torch.equal(best[0], labels[0])


def test_edges():
    one = dense_crf(IMAGE[..., :1, :1], PROBS[..., :1, :1], preset="psa")
    assert one.shape == (1, 3, 1, 1)
    assert torch.equal(dense_crf(IMAGE, PROBS[:, :1], preset="psa"), torch.ones(1, 1, 13, 21))
    flat = dense_crf(torch.full_like(IMAGE, 7), PROBS, preset="psa")
    assert (flat.sum(dim=1) - 1).abs().max() <= 1e-5
    for terms, t in (((), 4), (PSA, 0)):
        q = dense_crf(IMAGE, PROBS, terms=terms, iterations=t)
        expected = softmax(PROBS[0].double().clamp(1e-5, 1).log().numpy())
        assert np.abs(q[0].numpy() - expected).max() <= 1e-6
    for shape in ((0, 3, 5, 5), (1, 3, 0, 5)):
        probs = torch.rand(shape, requires_grad=True)
        image = torch.zeros(shape, dtype=torch.uint8)
        q, labels = dense_crf(image, probs, preset="psa", output="both")
        assert q.shape == shape
        assert labels.shape == (shape[0], *shape[2:])
        q.sum().backward()
    extreme = torch.tensor([1e30, -1e30, 0.0]).view(1, 3, 1, 1).expand(1, 3, 13, 21)
    q = dense_crf(IMAGE, extreme, preset="psa", unary_kind="energy")
    assert torch.equal(q.argmax(1), torch.ones(1, 13, 21, dtype=torch.long))


def with_nan():
    probs = PROBS.clone()
    probs[0, 1, 7, 8] = float("nan")
    return probs


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("labels", [1, 3, 9, 40])
def test_a_single_bad_pixel_is_found(iterations, labels):
    for y, x, bad in ((0, 0, np.nan), (3, 4, np.inf), (12, 20, np.nan), (12, 20, np.inf)):
        energy = torch.rand(1, labels, 13, 21)
        energy[0, :, y, x] = bad
        with pytest.raises(InputError, match="unary energies must be finite"):
            dense_crf(IMAGE, energy, terms=[], iterations=iterations, unary_kind="energy")


@pytest.mark.parametrize("labels", [1, 2, 4, 5, 21, 40])
def test_rows_of_any_length_beside_the_border(labels):
    for size in ((1, 2), (3, 1), (8, 8), (8, 16), (9, 33), (17, 9)):
        image, probs = photograph(size), scores(labels, size)
        q, best = dense_crf(image, probs, preset="psa", iterations=3, output="both")
        error = q - dense_crf(image, probs.double(), preset="psa", iterations=3)
        assert error.abs().max() <= 1e-5
        assert torch.equal(best, q.argmax(dim=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense_crf(IMAGE, PROBS), "one of preset and terms"),
        (lambda: dense_crf(IMAGE, PROBS, preset="psa", terms=PSA), "one of preset and terms"),
        (lambda: dense_crf(IMAGE, PROBS, preset="crf"), "preset must be one of.*got 'crf'"),
        (lambda: dense_crf(IMAGE, PROBS, preset="psa", output="mask"), "output must be"),
        (lambda: dense_crf(IMAGE, PROBS, preset="psa", unary_kind="p"), "unary_kind must be"),
        (lambda: dense_crf(IMAGE, PROBS, preset="psa", iterations=-1), "iterations must be 0"),
        (lambda: dense_crf(IMAGE, PROBS, preset="psa", iterations=1.5), "an integer, got 1.5"),
        (lambda: dense_crf(IMAGE, PROBS, preset="psa", clip=0), r"clip must be in \(0, 1\)"),
        (lambda: dense_crf(IMAGE[..., :20], PROBS, preset="psa"), "images must be"),
        (lambda: dense_crf(IMAGE, PROBS[0], preset="psa"), "unary must be floating"),
        (lambda: dense_crf(IMAGE, PROBS.long(), preset="psa"), "unary must be floating"),
        (lambda: dense_crf(IMAGE, with_nan(), preset="psa"), "unary energies must be finite"),
        (lambda: dense_crf(IMAGE, -PROBS / 0, preset="psa", unary_kind="energy"), "finite"),
        (lambda: dense_crf([IMAGE[0]], [PROBS[0]] * 2, preset="psa"), "images must be a list"),
        (lambda: dense_crf(IMAGE, PROBS, terms=[Gaussian(0, 1)]), "must be positive"),
        (lambda: dense_crf(IMAGE, PROBS, terms=[Bilateral(3, -1, 1)]), "must be positive"),
        (lambda: dense_crf(IMAGE, PROBS, terms=[Bilateral(3, 1e-9, 1)]), "too wide a range"),
        (lambda: dense_crf(IMAGE, PROBS, terms=[Gaussian(1, [1, 2])]), r"compat must be .*\[3\]"),
        (lambda: dense_crf(IMAGE, PROBS, terms=[Gaussian(1, 1, "x")]), "normalization must be"),
        (lambda: dense_crf(IMAGE, PROBS, terms=[Gaussian(1, 1)] * 17), "at most 16 terms"),
        (
            lambda: dense_crf(IMAGE, PROBS, terms=[Features(torch.rand(1, 2, 3, 4), 1)]),
            "features must be",
        ),
        (lambda: label_energies(torch.tensor([[[3]]]), 3), "labels must be below 3"),
        (lambda: label_energies(torch.tensor([[[0.5]]]), 3), "labels must be integer"),
        (lambda: label_energies(torch.tensor([[[0]]]), 3, gt_prob=1), "gt_prob must be in"),
        (lambda: dense_crf(IMAGE, PROBS.argmax(1), preset="psa", unary_kind="labels"), "num_labe"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
