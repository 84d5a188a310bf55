from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulator
from tests.reference import gated_crf as reference
from tests.workers import run_forked
from wsis import _C
from wsis.errors import InputError
from wsis.ops import _native, gated_crf
from wsis.ops.gated_crf import gated_crf_loss, window_filter

NAME = "gatedcrf_n2_k4_20x24"
ONE = [{"weight": 1.0, "xy": 6.0, "rgb": 0.1}]
TWO = [{"weight": 0.9, "xy": 6.0, "rgb": 0.1}, {"weight": 0.1, "xy": 6.0}]
THREE = [{"weight": 0.5, "rgb": 0.3}, {"weight": -0.2, "edge": 0.5, "xy": 2.0}, *TWO]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make_case(size=(7, 9), classes=3, dtype=torch.float64, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    probs = torch.randn(batch, classes, *size, generator=g, dtype=dtype).softmax(dim=1)
    rgb = torch.rand(batch, 3, *size, generator=g, dtype=dtype)
    edge = torch.rand(batch, 1, *size, generator=g, dtype=dtype)
    return probs, {"rgb": rgb, "edge": edge}


def make_masks(probs, seed=3):
    g = torch.Generator().manual_seed(seed)
    shape = (len(probs), 1, *probs.shape[-2:])
    return [(torch.rand(shape, generator=g) < 0.6).to(probs.dtype) for _ in range(2)]


def with_gradient(loss, probs, *arguments, **rest):
    probs = probs.clone().requires_grad_()
    value = loss(probs, *arguments, **rest)
    value.backward()
    return value.detach(), probs.grad


@pytest.mark.parametrize("case", ["plain", "masked", "two"])
def test_golden(case, golden, golden_spec, assert_golden):
    z, spec = golden(NAME), golden_spec(NAME)
    params = spec["params"][case]
    image = torch.from_numpy(z["image_u8"]).permute(0, 3, 1, 2).float() / 255
    masks = {name: torch.from_numpy(z[name]) for name in params["masks"]}
    value, gradient = with_gradient(
        gated_crf_loss,
        torch.from_numpy(z["y"]),
        {"rgb": image},
        params["kernels"],
        params["radius"],
        **masks,
    )
    assert_golden(spec, f"loss_{case}", value.numpy()[None], z[f"loss_{case}"])
    assert_golden(spec, f"grad_{case}", gradient.numpy(), z[f"grad_{case}"])


@pytest.mark.parametrize("kernels", [ONE, TWO, THREE])
@pytest.mark.parametrize(
    ("size", "radius"), [((1, 1), 1), ((7, 5), 2), ((1, 6), 9), ((17, 2), 3), ((4, 33), 1)]
)
def test_filter_is_the_formula(kernels, size, radius):
    probs, modalities = make_case(size)
    expected = reference.filter_slowly(
        probs.numpy(), {n: m.numpy() for n, m in modalities.items()}, kernels, radius
    )
    out = window_filter(probs, modalities, kernels, radius)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    classes=st.integers(1, 23),
    radius=st.integers(1, 7),
    kernels=st.sampled_from([ONE, TWO, THREE]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    masks=st.sampled_from([(), ("mask_src",), ("mask_dst",), ("mask_src", "mask_dst")]),
    seed=st.integers(0, 99),
)
def test_anything(size, classes, radius, kernels, dtype, masks, seed):
    probs, modalities = make_case(size, classes, dtype, seed=seed)
    chosen = dict(zip(("mask_src", "mask_dst"), make_masks(probs, seed), strict=True))
    chosen = {name: mask for name, mask in chosen.items() if name in masks}
    ours = with_gradient(gated_crf_loss, probs, modalities, kernels, radius, **chosen)
    theirs = with_gradient(reference.unfold_loss, probs, modalities, kernels, radius, **chosen)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        scale = max(1.0, float(expected.abs().max()))
        assert (got - expected).abs().max() <= 4 * TOLERANCE[dtype] * scale


def test_compatibility():
    probs, modalities = make_case()
    masks = dict(zip(("mask_src", "mask_dst"), make_masks(probs), strict=True))
    mu = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0], [3.0, 1.0, 0.0]], dtype=probs.dtype)
    ours = with_gradient(gated_crf_loss, probs, modalities, TWO, 2, **masks, compatibility=mu)
    theirs = with_gradient(reference.unfold_loss, probs, modalities, TWO, 2, **masks, mu=mu)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_shifted_reference_agrees():
    """The benchmark's good baseline: the same gradient; the loss lacks the border's constant."""
    probs, modalities = make_case((9, 11))
    ours = with_gradient(gated_crf_loss, probs, modalities, TWO, 3)
    shifted = with_gradient(reference.shifted_loss, probs, modalities, TWO, 3)
    torch.testing.assert_close(ours[1], shifted[1], rtol=1e-9, atol=1e-12)
    inside = with_gradient(
        gated_crf_loss, probs, modalities, TWO, 3, mask_src=torch.ones_like(probs[:, :1])
    )
    torch.testing.assert_close(inside[0], shifted[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 7, 8, 9, 21, 81])
def test_values_are_alone(classes):
    """Which values come along does not matter, not even for rounding."""
    probs, modalities = make_case((6, 19), classes, torch.float32)
    together = window_filter(probs, modalities, TWO, 2)
    for c in {0, classes // 2, classes - 1}:
        alone = window_filter(probs[:, c : c + 1], modalities, TWO, 2)
        assert torch.equal(alone[:, 0], together[:, c])


def test_masks_are_not_changed_and_nan_counts_as_zero():
    probs, modalities = make_case()
    mask, _ = make_masks(probs)
    odd = mask.clone()
    odd[0, 0, 0, :4] = torch.tensor([0.5, 0.99, float("nan"), -1.0])
    mask[0, 0, 0, :4] = 0
    kept = odd.clone()
    value = gated_crf_loss(probs, modalities, TWO, 2, mask_src=odd, mask_dst=odd)
    assert torch.equal(
        value, gated_crf_loss(probs, modalities, TWO, 2, mask_src=mask, mask_dst=mask)
    )
    torch.testing.assert_close(odd, kept, rtol=0, atol=0, equal_nan=True)


def test_empty_masks_give_zero():
    probs, modalities = make_case()
    none = torch.zeros_like(probs[:, :1])
    assert gated_crf_loss(probs, modalities, mask_src=none, mask_dst=none) == 0


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty(shape):
    probs = torch.rand(shape, requires_grad=True)
    rgb = torch.rand(shape[0], 3, *shape[2:])
    loss = gated_crf_loss(probs, {"rgb": rgb})
    loss.backward()
    assert loss == 0 and probs.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_compute_in_float32(dtype):
    probs, modalities = make_case(dtype=torch.float32)
    probs, modalities = probs.to(dtype), {n: m.to(dtype) for n, m in modalities.items()}
    loss = gated_crf_loss(probs, modalities, THREE, 2)
    full = {n: m.float() for n, m in modalities.items()}
    assert loss.dtype == torch.float32
    assert torch.equal(loss, gated_crf_loss(probs.float(), full, THREE, 2))


def test_non_contiguous_inputs():
    probs, modalities = make_case((8, 10))
    expected = gated_crf_loss(probs, modalities, TWO, 2)
    strided = probs.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    rgb = modalities["rgb"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(gated_crf_loss(strided, {"rgb": rgb}, TWO, 2), expected)


def test_constant_image_is_a_plain_gaussian():
    values = torch.zeros(1, 1, 9, 9)
    values[0, 0, 4, 4] = 1
    out = window_filter(values, {"rgb": torch.full((1, 3, 9, 9), 0.3)}, ONE, 3)[0, 0]
    assert out[4, 4] == 0 and not out[0].any()
    assert torch.allclose(out[4, 5], torch.tensor(-0.5 / 36).exp())


# ---- threads, processes, instruction sets ------------------------------------------------------


def forward_and_back():
    probs, modalities = make_case((23, 37), 5, torch.float32)
    value, gradient = with_gradient(gated_crf_loss, probs, modalities, TWO, 4)
    return value.numpy(), gradient.numpy()


def test_threads_do_not_matter(monkeypatch):
    expected = forward_and_back()
    monkeypatch.setattr(gated_crf, "num_parts", lambda touched: _native.num_threads())
    for threads in (1, 2, 3, 64):
        monkeypatch.setattr(_native, "num_threads", lambda threads=threads: threads)
        for got, wanted in zip(forward_and_back(), expected, strict=True):
            assert np.array_equal(got, wanted)


def filtered():
    probs, modalities = make_case((23, 37), 5, torch.float32)
    return window_filter(probs, modalities, ONE, 4).numpy()


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(gated_crf, "num_parts", lambda touched: 4)
    expected = filtered()  # threads have run in the parent
    assert all(np.array_equal(result, expected) for result in run_forked(filtered))


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_every_instruction_set(isa):
    program = (
        "import torch; from tests.ops.test_gated_crf import *\n"
        "for dtype in (torch.float32, torch.float64):\n"
        "    probs, m = make_case((13, 37), 11, dtype)\n"
        "    ours = with_gradient(gated_crf_loss, probs, m, THREE, 3)\n"
        "    theirs = with_gradient(reference.unfold_loss, probs, m, THREE, 3)\n"
        "    for a, b in zip(ours, theirs, strict=True):\n"
        "        assert (a - b).abs().max() <= 4 * TOLERANCE[dtype] * max(1, b.abs().max())\n"
    )
    environment = {**os.environ, "WSIS_ISA": isa, "PYTHONPATH": str(emulator.ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=emulator.ROOT, env=environment)


# ---- gradients and compilation -----------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 3), (1, 1), (1, 5)])
def test_gradcheck(size):
    probs, modalities = make_case(size, 2)
    source, destination = make_masks(probs)
    probs.requires_grad_()

    def both(p):
        masked = gated_crf_loss(p, modalities, TWO, 2, mask_src=source, mask_dst=destination)
        return masked, window_filter(p, modalities, THREE, 2)

    assert torch.autograd.gradcheck(both, probs)
    assert torch.autograd.gradgradcheck(both, probs)


def test_opcheck():
    probs, modalities = make_case((5, 6), 2, torch.float32)
    rest = (modalities["rgb"], [3], [0.7], [0.1], 2)
    torch.library.opcheck(torch.ops.wsis.window_filter, (probs.requires_grad_(), *rest))


def test_compiles_as_one_graph():
    probs, modalities = make_case((9, 12), 2, torch.float32)
    compiled = torch.compile(gated_crf_loss, fullgraph=True, backend="aot_eager")
    ours = with_gradient(compiled, probs, modalities, TWO, 2)
    theirs = with_gradient(gated_crf_loss, probs, modalities, TWO, 2)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


# ---- bad input ---------------------------------------------------------------------------------

PROBS, RGB = torch.rand(1, 2, 4, 4), {"rgb": torch.rand(1, 3, 4, 4)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window_filter(PROBS[0], RGB), r"values must be a floating \[B, C, H, W\]"),
        (lambda: window_filter(PROBS.long(), RGB), "values must be a floating.*int64"),
        (lambda: window_filter(PROBS, {"rgb": RGB["rgb"][..., 1:]}), "modality rgb must be"),
        (lambda: window_filter(PROBS, {}), "modality 'rgb' must be one of xy"),
        (lambda: window_filter(PROBS, {"rgb": RGB["rgb"].to("meta")}), "must be on cpu"),
        (
            lambda: window_filter(PROBS, {"rgb": RGB["rgb"].clone().requires_grad_()}),
            "must not require a gradient",
        ),
        (lambda: window_filter(PROBS, RGB, []), "kernels must be 1 to 8, got 0"),
        (lambda: window_filter(PROBS, RGB, ONE * 9), "kernels must be 1 to 8, got 9"),
        (lambda: window_filter(PROBS, RGB, [{"rgb": 1.0}]), "must have a finite weight"),
        (lambda: window_filter(PROBS, RGB, [{"weight": 1, "rgb": 0}]), "sigma of rgb.*got 0"),
        (lambda: window_filter(PROBS, RGB, [{"weight": 1, "xy": -1}]), "sigma of xy.*got -1"),
        (lambda: window_filter(PROBS, RGB, radius=0), "radius must be 1 to 32, got 0"),
        (lambda: window_filter(PROBS, RGB, radius=33), "radius must be 1 to 32, got 33"),
        (lambda: gated_crf_loss(PROBS[0], RGB), "probs must be a floating"),
        (lambda: gated_crf_loss(PROBS, {"rgb": torch.rand(3, 4, 4)}), r"modality rgb must be \[B"),
        (lambda: gated_crf_loss(PROBS, RGB, mask_src=PROBS), "mask_src must be"),
        (lambda: gated_crf_loss(PROBS, RGB, mask_dst=PROBS[:, :1, 1:]), "mask_dst must be"),
        (
            lambda: gated_crf_loss(PROBS, RGB, compatibility=torch.zeros(3, 3)),
            r"compatibility must be \[C, C\]",
        ),
        (lambda: gated_crf_loss(PROBS, RGB, compatibility=torch.eye(2)), "0 on the diagonal"),
        (
            lambda: gated_crf_loss(PROBS, RGB, compatibility=-torch.ones(2, 2)),
            "0 on the diagonal and at least 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_bindings_guard_themselves():
    values, features = np.zeros((1, 2, 4, 4), np.float32), np.zeros((1, 3, 4, 4), np.float32)
    scratch = np.zeros(_C.window_filter_scratch(2, 3, 4, 4, 1), np.float32)
    good = [values, features, np.zeros_like(values), scratch, [3], [1.0], [0.5], 1, 1]
    _C.window_filter_cpu(*good)
    for position, bad, message in (
        (0, values[0], "values must be"),
        (1, features.astype(float), "features must be float32"),
        (2, values[:, :1], "result must be of shape"),
        (3, scratch[1:], "scratch must be of shape"),
        (4, [2], "channels must add up"),
        (5, [1.0, 1.0], "as many as the kernels"),
        (6, [-1.0], "0 or more"),
        (7, 0, "radius must be 1 to 32"),
        (8, 0, "parts must be positive"),
    ):
        arguments = [bad if i == position else argument for i, argument in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            _C.window_filter_cpu(*arguments)
