import numpy as np
import pytest
import torch

from tests.reference.pixel_correlation import pixel_correlation as reference
from wsis.errors import InputError
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


def test_gradients():
    cams, features = (x.requires_grad_() for x in draw(2, 3, 4, 3, 2, torch.float64))
    assert torch.autograd.gradcheck(pixel_correlation, (cams, features))


def test_module_and_errors():
    cams, features = draw(2, 3, 4, 5, 6)
    assert torch.equal(PixelCorrelation()(cams, features), pixel_correlation(cams, features))
    with pytest.raises(
        InputError, match=r"cams must be a floating .*got torch.float32 \[3, 5, 6\]"
    ):
        pixel_correlation(cams[0], features)
    with pytest.raises(InputError, match="features must be a floating"):
        pixel_correlation(cams, features.long())
    with pytest.raises(InputError, match="share batch"):
        pixel_correlation(cams[:1], features)


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
