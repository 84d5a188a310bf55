from __future__ import annotations

import itertools
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulator
from tests.reference import local_affinity_shifted as shifted
from tests.reference import local_affinity_unfold as unfold
from tests.reference.local_affinity import refine_reference
from wsis import _C
from wsis.ops import _local_affinity
from wsis.ops.local_affinity import (
    DILATIONS,
    local_affinity,
    pamr,
    par,
    propagate,
    refine,
    varm,
)

REFINERS = {"pamr": pamr, "par": par, "varm": varm}
SUMS = {"pamr": 1.0, "par": 1.01, "varm": 0.99}
FILES = [
    *(
        f"{kind}_{case}"
        for kind in REFINERS
        for case in (
            "batch_n2_k4_37x53",
            "big_n1_k2_96x96",
            "odd_n1_k4_65x97",
            "post_n1_k3_40x52",
            "up_n1_k21_37x53",
        )
    ),
    "pamr_many_n1_k81_20x23",
    "varm_many_n1_k81_20x23",
]
EDGES = ("flatimage", "dots", "constmask", "single", "zero", "onepix")


def images(u8):
    return torch.from_numpy(u8).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name", FILES)
def test_golden(name, golden, golden_spec, assert_golden):
    z, spec = golden(name), golden_spec(name)
    refine = REFINERS[name.split("_")[0]]
    stable = z["stable"][:, None].astype(bool) if "stable" in z else np.True_
    for iterations in spec["params"]["iterations"]:
        masks = torch.from_numpy(z["mask"]).requires_grad_()
        out = refine(
            images(z["image_u8"]),
            masks,
            iterations=iterations,
            dilations=spec["params"]["dilations"],
        )
        key = f"out_{iterations}"
        actual = np.where(stable, out.detach().numpy(), z[key])
        assert_golden(spec, key, actual, z[key])
        key = f"grad_mask_{iterations}"
        if key in z:
            out.backward(torch.from_numpy(z["upstream"]))
            if "stable" not in z:  # the gradient mixes stable and unstable pixels
                assert_golden(spec, key, masks.grad.numpy(), z[key])


@pytest.mark.parametrize(("kind", "case"), list(itertools.product(REFINERS, EDGES)))
def test_golden_edges(kind, case, golden, golden_spec, assert_golden):
    name = f"{kind}_edge_16x20"
    z, spec = golden(name), golden_spec(name)
    out = REFINERS[kind](
        images(z[f"{case}_image_u8"]),
        torch.from_numpy(z[f"{case}_mask"]),
        iterations=spec["params"]["iterations"],
        dilations=spec["params"]["dilations"],
    )
    assert_golden(spec, f"{case}_out", out.numpy(), z[f"{case}_out"])


@pytest.mark.parametrize("kind", REFINERS)
@pytest.mark.parametrize(
    ("size", "dilations"), [((7, 5), (1, 2, 24)), ((1, 1), (1,)), ((1, 6), (3,)), ((4, 3), (2, 5))]
)
def test_reference_at_odd_sizes(kind, size, dilations):
    g = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, *size, generator=g, dtype=torch.float64)
    masks = torch.rand(2, 2, *size, generator=g, dtype=torch.float64)
    out = REFINERS[kind](image, masks, iterations=2, dilations=dilations)
    expected = refine_reference(image.numpy(), masks.numpy(), kind, 2, dilations)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert out.dtype == torch.float64


@pytest.mark.parametrize("kind", REFINERS)
@pytest.mark.parametrize("flat", [False, True])
def test_weights_sum(kind, flat):
    image = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(1))
    image = torch.full_like(image, 0.3) if flat else image
    weights = local_affinity(image, kind)
    assert weights.shape == (1, 48, 9, 11)
    assert torch.allclose(weights.sum(dim=1), torch.tensor(SUMS[kind]), atol=1e-5)
    assert weights.min() >= (-5e-3 if kind == "varm" else 0)
    masks = REFINERS[kind](image, torch.full((1, 1, 9, 11), 0.5), iterations=3)
    assert torch.allclose(masks, torch.tensor(0.5 * SUMS[kind] ** 3), atol=1e-5)


@pytest.mark.parametrize("kind", REFINERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_compute_in_float32(kind, dtype):
    g = torch.Generator().manual_seed(2)
    image = torch.rand(1, 3, 7, 5, generator=g).to(dtype)
    masks = torch.rand(1, 1, 7, 5, generator=g).to(dtype)
    image[..., 3:, :] = 0.5  # a flat region
    out = REFINERS[kind](image, masks)
    assert out.dtype == torch.float32
    assert torch.equal(out, REFINERS[kind](image.float(), masks.float()))
    assert out.isfinite().all()


def test_non_contiguous_inputs():
    g = torch.Generator().manual_seed(3)
    image = torch.rand(1, 8, 6, 3, generator=g).permute(0, 3, 1, 2)
    masks = torch.rand(1, 8, 6, 2, generator=g).permute(0, 3, 1, 2)
    expected = varm(image.contiguous(), masks.contiguous(), dilations=(1, 2))
    assert torch.allclose(varm(image, masks, dilations=(1, 2)), expected, atol=1e-7)


# ---- against plain torch -----------------------------------------------------------------------


def random_case(size, masks, dtype, seed=0, batch=1, channels=3):
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, channels, *size, generator=g, dtype=dtype)
    return image, torch.rand(batch, masks, *size, generator=g, dtype=dtype)


def check_against_shifted(kind, size, masks, dilations, iterations, dtype, seed=0, batch=1):
    """Result and gradient."""
    image, m = random_case(size, masks, dtype, seed, batch)
    ours, theirs = m.clone().requires_grad_(), m.clone().requires_grad_()
    out = REFINERS[kind](image, ours, iterations=iterations, dilations=dilations)
    expected = shifted.refine(image, theirs, kind, iterations, dilations)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (out - expected).detach().abs().max() <= tolerance
    upstream = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    if iterations:
        out.backward(upstream)
        expected.backward(upstream)
        bound = tolerance * float(theirs.grad.abs().max())  # a border pixel receives from hundreds
        assert (ours.grad - theirs.grad).abs().max() <= 4 * bound


ANYTHING = {
    "kind": st.sampled_from(sorted(REFINERS)),
    "size": st.tuples(st.integers(1, 130), st.integers(1, 130)),
    "masks": st.integers(1, 81),
    "dilations": st.lists(st.integers(1, 140), min_size=1, max_size=7),
    "iterations": st.integers(0, 3),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "seed": st.integers(0, 999),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**ANYTHING)
def test_anything_small(kind, size, masks, dilations, iterations, dtype, seed):
    size, masks = (size[0] % 40 + 1, size[1] % 40 + 1), masks % 12 + 1
    check_against_shifted(kind, size, masks, dilations, iterations, dtype, seed)


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(**ANYTHING)
def test_anything(kind, size, masks, dilations, iterations, dtype, seed):
    masks = min(masks, 1 + 40000 // (size[0] * size[1]))
    check_against_shifted(kind, size, masks, dilations, iterations, dtype, seed)


@pytest.mark.parametrize("kind", REFINERS)
def test_real_size(kind):
    """At least 100,000 pixels: error and argmax."""
    image, masks = random_case((317, 331), 5, torch.float32)
    masks = F.avg_pool2d(masks, 31, 1, 15)
    out = REFINERS[kind](image, masks)
    expected = shifted.refine(image, masks, kind, 10, DILATIONS)
    assert (out - expected).abs().max() <= 1e-5
    assert (out.argmax(1) == expected.argmax(1)).float().mean() >= 0.9999


@pytest.mark.parametrize("masks", [1, 2, 7, 8, 9, 21, 81])
def test_any_number_of_masks(masks):
    image, m = random_case((19, 37), masks, torch.float32)
    expected = shifted.refine(image, m, "par", 2, (1, 2, 3))
    assert (par(image, m, iterations=2, dilations=(1, 2, 3)) - expected).abs().max() <= 1e-5


def test_masks_are_alone():
    """Which masks come along does not matter, not even for rounding."""
    image, masks = random_case((23, 41), 21, torch.float32)
    together = par(image, masks)
    for n in (0, 7, 8, 20):
        assert torch.equal(par(image, masks[:, n : n + 1])[:, 0], together[:, n])


def test_published_form_is_the_same():
    image, masks = random_case((21, 30), 3, torch.float64)
    for kind in ("pamr", "par"):
        expected = unfold.refine(image, masks, kind, 3, (1, 2, 24))
        out = REFINERS[kind](image, masks, iterations=3, dilations=(1, 2, 24))
        assert (out - expected).abs().max() <= 1e-12


# ---- the exponential ---------------------------------------------------------------------------

EXPONENTIAL = r"""
#include <cstdio>
#include "cpu/simd.h"
#include "kernels/local_affinity.h"
using namespace wsis;
template <class V> float first(V v) { return v[0]; }
float first(float v) { return v; }
template <class V> int check() {
  double worst = 0;
  for (uint32_t bits = 0x80000000u; bits < 0xff800000u; bits += STEP) {
    const float x = kernels::bit_cast<float>(bits);
    const float got = first(kernels::exp_nonpositive(V{} + x));
    const double want = std::exp(static_cast<double>(x));
    if (x < -87.3f) { if (got != 0) return 1; continue; }
    const double ulp = std::nextafter(static_cast<float>(want), 2.0f) - static_cast<float>(want);
    worst = std::max(worst, std::fabs(got - want) / ulp);
  }
  std::printf("%f\n", worst);
  const float nan = first(kernels::exp_nonpositive(V{} + NAN));
  return worst > 2 || nan == nan || first(kernels::exp_nonpositive(V{} - INFINITY)) != 0 ||
         first(kernels::exp_nonpositive(V{})) != 1;
}
int main() { return check<float>() + 2 * check<cpu::Vector<float, 16>>(); }
"""


@pytest.mark.parametrize("step", [100003, pytest.param(1, marks=pytest.mark.long)])
def test_exponential_is_accurate(tmp_path, step):
    if not emulator.has_compiler():
        pytest.skip("needs a host compiler")
    source, program = tmp_path / "exp.cpp", tmp_path / "exp"
    source.write_text(EXPONENTIAL.replace("STEP", str(step)).replace("#include <cstdio>",
                      "#include <algorithm>\n#include <cstdio>"))  # fmt: skip
    command = [emulator.CXX, "-std=c++17", "-O2", f"-I{emulator.ROOT / 'csrc'}", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- counts, groups, layouts -------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts(iterations, dtype):
    image, masks = random_case((9, 20), 5, torch.float32, batch=4)
    counts = torch.tensor([0, 3, 5, 99], dtype=dtype)
    masks[1, 3:] = float("nan")  # never read
    masks[0] = float("nan")
    masks.requires_grad_()
    out = refine(image, masks, "varm", iterations=iterations, counts=counts)
    weights = local_affinity(image, "varm")
    assert torch.equal(out, propagate(masks, weights, iterations=iterations, counts=counts))
    for b, count in enumerate((0, 3, 5, 5)):
        full = varm(image[b : b + 1], masks.detach()[b : b + 1, :count], iterations=iterations)
        assert torch.equal(out[b, :count], full[0])
        assert not out[b, count:].any()
    out[1:].nan_to_num().sum().backward()
    assert not masks.grad[0].any() and not masks.grad[1, 3:].any()
    assert masks.grad[3].all()


def test_groups_of_images_do_not_matter(monkeypatch):
    image, masks = random_case((17, 21), 3, torch.float32, batch=5)
    expected = par(image, masks)
    for images in (1, 2, 5):
        monkeypatch.setattr(_local_affinity, "_PACKED_BYTES", {"cpu": images * 48 * 17 * 21 * 4})
        assert torch.equal(par(image, masks), expected)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
def test_empty(shape):
    image = torch.rand(shape[0], 3, *shape[2:])
    masks = torch.rand(shape, requires_grad=True)
    out = pamr(image, masks)
    assert out.shape == shape
    out.sum().backward()
    assert masks.grad.shape == shape
    assert local_affinity(image, "par").shape == (shape[0], 48, *shape[2:])


def test_expanded_and_sliced_inputs():
    image, masks = random_case((12, 20), 2, torch.float32)
    image, masks = image.expand(3, -1, -1, -1), masks.expand(3, -1, -1, -1)
    out = varm(image[..., ::2], masks[..., ::2])
    assert torch.equal(out, varm(image[..., ::2].contiguous(), masks[..., ::2].contiguous()))
    assert torch.equal(out[0], out[2])


def test_packed_and_back():
    image, masks = random_case((7, 37), 2, torch.float64)
    weights = local_affinity(image, "varm", (1, 5))
    packed = torch.ops.wsis.local_affinity_packed(image, "varm", [1, 5])
    assert packed.shape == (1, 7, 3, 16, 16)
    assert not packed[:, :, -1, :, 37 % 16 :].any()
    direct = torch.ops.wsis.propagate(masks, packed, None, [1, 5], 2, False)
    assert torch.equal(direct, propagate(masks, weights, (1, 5), 2))


def test_scratch_is_less_than_two_masks():
    """The issue's bound on memory: 48 weights per pixel and two masks. With their border they are
    larger, but only a few are needed at a time."""
    for size, planes in ((448, 21), (321, 21), (448, 81)):
        elements = _C.propagate_scratch_size(planes, size, size, list(DILATIONS), False, 1)
        assert elements <= 2 * 8 * (size * (size + 48 + 32) + 64 * 16) + 99
        assert elements < 2 * planes * size**2
