from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference.pixel_correlation import pixel_correlation as reference
from wsis.compat import PCM
from wsis.errors import InputError


def draw(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 7), (2, 6, 5, 7))
    return (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


@pytest.mark.parametrize("name", ["seam_pcm_a_n2_k21_12x15", "seam_pcm_b_n1_k4_28x28"])
def test_golden(name, golden, golden_spec, assert_golden):
    data, spec = golden(name), golden_spec(name)
    weight = torch.from_numpy(data["w_f9"])[:, :, None, None]
    cam, f, upstream = (torch.from_numpy(data[f"pcm_{x}"]) for x in ("cam", "f", "upstream"))
    cam.requires_grad_()
    f.requires_grad_()

    class Net:
        def PCM(self, cam, f):
            return PCM(cam, torch.nn.functional.conv2d(f, weight))

    out = Net().PCM(cam, f)
    out.backward(upstream)
    assert_golden(spec, "pcm_out", out.detach(), data["pcm_out"])
    assert_golden(spec, "pcm_grad_cam", cam.grad, data["pcm_grad_cam"])
    assert_golden(spec, "pcm_grad_f", f.grad, data["pcm_grad_f"])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 2e-6), (torch.float64, 1e-12)],
)
def test_dtype_stays(dtype, tolerance):
    cam, f = draw(dtype)
    out = PCM(cam, f)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.double(), reference(cam.double(), f.double()), atol=tolerance)


def test_numpy_gives_numpy():
    cam, f = draw()
    out = PCM(cam.numpy()[..., ::-1], f.numpy()[..., ::-1])
    assert isinstance(out, np.ndarray)
    np.testing.assert_allclose(out, PCM(cam.flip(3), f.flip(3)).numpy())


def test_keyword_names_and_errors():
    cam, f = draw()
    assert torch.equal(PCM(cam=cam, f=f), PCM(cam, f))
    with pytest.raises(InputError, match="share batch"):
        PCM(cam, f[:1])
