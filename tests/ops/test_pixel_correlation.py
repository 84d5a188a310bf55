from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import pixel_correlation_dense as dense
from tests.reference.pixel_correlation import pixel_correlation as reference
from wsis.ops.pixel_correlation import PixelCorrelation, pixel_correlation

EDGE_CASES = {
    "const": ("cam", "f_const"),
    "zero": ("cam", "f_zero"),
    "partzero": ("cam", "f_partzero"),
    "neg": ("cam", "f_neg"),
    "big": ("cam", "f_big"),
    "tiny": ("cam", "f_tiny"),
    "cam_zero": ("cam_zero", "f_neg"),
    "cam_low": ("cam_low", "f_neg"),
}


def draw(batch, classes, channels, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    cams = torch.rand(batch, classes, height, width, generator=generator, dtype=torch.float64)
    features = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    return cams.to(dtype), features.to(dtype)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (2, 4, 3, 7, 5), (1, 1, 8, 9, 1), (0, 3, 4, 5, 5), (3, 21, 16, 9, 11)],
)
def test_matches_the_formula(shape):
    cams, features = draw(*shape)
    expected = reference(cams, features)
    np.testing.assert_allclose(pixel_correlation(cams, features), expected, atol=2e-6)


def test_double_stays_double_and_half_is_computed_in_single():
    cams, features = draw(2, 3, 4, 5, 6, torch.float64)
    exact = pixel_correlation(cams, features)
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact, reference(cams, features), rtol=1e-12, atol=1e-14)
    cams, features = cams.half(), features.half()
    with torch.autocast("cpu", torch.bfloat16):
        half = pixel_correlation(cams, features)
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, reference(cams, features), atol=2e-6)


def test_non_contiguous_inputs():
    cams, features = draw(2, 4, 6, 7, 5)
    expected = pixel_correlation(cams, features)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (cams, features)]
    torch.testing.assert_close(pixel_correlation(*last), expected)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (cams, features)]
    torch.testing.assert_close(pixel_correlation(*turned), expected)


def test_columns_sum_to_at_most_one_and_constant_features_average():
    cams, features = draw(1, 2, 4, 6, 7)
    ones = pixel_correlation(torch.ones_like(cams), features)
    assert ones.max() <= 1
    assert ones.min() > 0.999
    mean = pixel_correlation(cams, torch.ones_like(features))
    torch.testing.assert_close(mean, cams.mean((2, 3), keepdim=True).expand_as(cams))


def check_against_dense(batch, classes, depths, size, dtype, temperature=None, seed=0):
    """Result and all gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        drawn = torch.randn(*shape, *size, generator=generator, dtype=torch.float64).to(dtype)
        return drawn.requires_grad_()

    cams, features = normal(batch, classes), [normal(batch, depth) for depth in depths]
    out = pixel_correlation(cams, features, temperature=temperature)
    expected = dense.pixel_correlation(cams, features, temperature=temperature)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    ours = [out, *torch.autograd.grad(out, [cams, *features], upstream)]
    theirs = [expected, *torch.autograd.grad(expected, [cams, *features], upstream)]
    tolerance = 1e-10 if dtype == torch.float64 else 3e-5
    for got, wanted in zip(ours, theirs, strict=True):
        scale = max(1.0, float(wanted.detach().abs().max()))
        assert (got - wanted).detach().abs().max() <= tolerance * scale


ANYTHING = {
    "batch": st.integers(1, 3),
    "classes": st.integers(1, 40),
    "depths": st.lists(st.integers(1, 150), min_size=1, max_size=3),
    "size": st.tuples(st.integers(1, 24), st.integers(1, 24)),
    "temperature": st.sampled_from([None, None, None, 1.0, 0.1]),
    "seed": st.integers(0, 999),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**ANYTHING)
def test_anything_in_double(batch, classes, depths, size, temperature, seed):
    check_against_dense(batch, classes, depths, size, torch.float64, temperature, seed)


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(**ANYTHING)
def test_anything_in_double_at_length(batch, classes, depths, size, temperature, seed):
    size = (size[0] * 2, size[1])
    check_against_dense(batch, classes, depths, size, torch.float64, temperature, seed)


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize("classes", [1, 7, 8, 21, 81])
def test_single_precision(classes, temperature):
    check_against_dense(2, classes, [16, 67], (13, 17), torch.float32, temperature)


def test_real_size():
    """RTC's: 21 maps, 56 x 56, features 64 and 128, in float32 against float64."""
    generator = torch.Generator().manual_seed(0)
    cams = torch.rand(1, 21, 56, 56, generator=generator)
    features = [torch.randn(1, d, 56, 56, generator=generator) for d in (64, 128)]
    single = [x.requires_grad_() for x in (cams, *features)]
    double = [x.detach().double().requires_grad_() for x in single]
    out, expected = (pixel_correlation(x[0], x[1:]) for x in (single, double))
    assert (out - expected).detach().abs().max() <= 2e-6
    upstream = torch.randn(out.shape, generator=generator)
    for got, wanted in zip(
        torch.autograd.grad(out, single, upstream),
        torch.autograd.grad(expected, double, upstream.double()),
        strict=True,
    ):
        error, scale = (got - wanted).abs(), wanted.abs().max()
        # Of 5 million pairs a few round to another side of 0, which moves two pixels each.
        assert (error > 1e-5 * scale).double().mean() <= 0.005
        assert error.mean() <= 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_get_half_gradients(dtype):
    cams, features = (x.requires_grad_() for x in draw(2, 3, 4, 5, 6, dtype))
    out = pixel_correlation(cams, [features, features])
    assert out.dtype == torch.float32
    out.square().sum().backward()
    assert cams.grad.dtype == features.grad.dtype == dtype
    single = [x.detach().float().requires_grad_() for x in (cams, features)]
    pixel_correlation(single[0], [single[1]]).square().sum().backward()
    for half, full in zip((cams, features), single, strict=True):
        bound = torch.finfo(dtype).eps * float(full.grad.abs().max())
        assert (half.grad - full.grad).abs().max() <= 2 * bound


# ---- the edges ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_one_pixel(temperature):
    cams, features = (x.requires_grad_() for x in draw(2, 3, 4, 1, 1, torch.float64))
    out = pixel_correlation(cams, features, temperature=temperature)
    torch.testing.assert_close(out, cams, rtol=1e-4, atol=0)
    out.sum().backward()
    assert cams.grad.min() > 0.999
    # With itself alone, only |f|^2 / (|f| + eps)^2 depends on the features.
    assert features.grad.abs().max() <= 1e-4


def test_zero_features():
    cams, features = draw(2, 3, 4, 5, 6, torch.float64)
    features = torch.zeros_like(features).requires_grad_()
    out = pixel_correlation(cams, features)
    assert not out.detach().any()
    (gradient,) = torch.autograd.grad(out.sum(), features)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    mean = pixel_correlation(cams, features, temperature=1.0).detach()
    torch.testing.assert_close(mean, cams.mean((2, 3), keepdim=True).expand_as(cams))


def test_a_pixel_without_features_gets_nothing_and_gives_nothing():
    cams, features = draw(1, 3, 4, 5, 6, torch.float64)
    features[..., 2, 3] = 0
    out = pixel_correlation(cams, features)
    assert not out[..., 2, 3].any()
    cams[..., 2, 3] = 99
    assert torch.equal(pixel_correlation(cams, features), out)


def test_constant_maps_stay():
    _, features = draw(1, 1, 4, 9, 12, torch.float64)
    out = pixel_correlation(torch.full((1, 2, 9, 12), 0.5, dtype=torch.float64), features)
    torch.testing.assert_close(out, torch.full_like(out, 0.5), rtol=1e-4, atol=0)


def test_huge_and_tiny_features():
    cams, features = draw(1, 2, 8, 4, 5)
    torch.testing.assert_close(
        pixel_correlation(cams, features * 1e30),
        pixel_correlation(cams, features),
        atol=1e-4,
        rtol=0,
    )
    assert pixel_correlation(cams, features * 1e-30).abs().max() <= 1e-20


def test_a_bad_value_spoils_its_image_only():
    cams, features = draw(2, 2, 3, 20, 20)
    features[1, 0, 5, 5] = float("nan")
    out = pixel_correlation(cams, features)
    assert out[1].isnan().all() and out[0].isfinite().all()
    cams[1, 0] = float("inf")
    assert not pixel_correlation(cams, features.nan_to_num())[1, 0].isfinite().any()


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 5, 5), (2, 0, 3, 5, 5), (1, 2, 3, 0, 5), (1, 2, 0, 3, 3)]
)
def test_empty(shape):
    cams, features = (x.requires_grad_() for x in draw(*shape))
    out = pixel_correlation(cams, features)
    assert out.shape == cams.shape and not out.detach().any()
    out.sum().backward()
    assert cams.grad.shape == cams.shape and features.grad.shape == features.shape
    assert not features.grad.any()


def test_cams_of_another_grid():
    cams, features = draw(1, 2, 4, 5, 6)[0], draw(1, 2, 4, 9, 7)[1]
    larger = torch.nn.functional.interpolate(cams, (9, 7), mode="bilinear", align_corners=True)
    assert torch.equal(pixel_correlation(cams, features), pixel_correlation(larger, features))


def test_module():
    cams, features = draw(2, 3, 4, 5, 6)
    assert torch.equal(PixelCorrelation()(cams, features), pixel_correlation(cams, features))
    softmax = PixelCorrelation(temperature=0.1)(cams, [features, features])
    assert torch.equal(softmax, pixel_correlation(cams, features, temperature=0.1))


# ---- golden ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EDGE_CASES)
def test_golden_edge_cases(case, golden, golden_spec, assert_golden):
    data, spec = golden("pcm_edge_7x9"), golden_spec("pcm_edge_7x9")
    cams, features = (torch.from_numpy(data[name]) for name in EDGE_CASES[case])
    assert_golden(spec, f"out_{case}", pixel_correlation(cams, features), data[f"out_{case}"])


@pytest.mark.parametrize("name", ["seam_pcm_a_n2_k21_12x15", "seam_pcm_b_n1_k4_28x28"])
def test_golden_seam(name, golden, golden_spec, assert_golden):
    data, spec = golden(name), golden_spec(name)
    weight = torch.from_numpy(data["w_f9"])[:, :, None, None].requires_grad_()
    cams, features, upstream = (
        torch.from_numpy(data[f"pcm_{part}"]) for part in ("cam", "f", "upstream")
    )
    cams, features = cams.requires_grad_(), features.requires_grad_()
    out = pixel_correlation(cams, torch.nn.functional.conv2d(features, weight))
    out.backward(upstream)
    assert_golden(spec, "pcm_out", out.detach(), data["pcm_out"])
    assert_golden(spec, "pcm_grad_cam", cams.grad, data["pcm_grad_cam"])
    assert_golden(spec, "pcm_grad_f", features.grad, data["pcm_grad_f"])
    assert_golden(spec, "pcm_grad_w_f9", weight.grad[:, :, 0, 0], data["pcm_grad_w_f9"])
