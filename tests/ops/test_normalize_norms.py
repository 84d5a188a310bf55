"""max_norm, seed_scores and ctr_scores with their gradients, against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import normalize_torch as reference
from tests.workers import run_forked
from wsis import _C
from wsis.errors import InputError
from wsis.ops import _native, ctr_scores, max_norm, seed_scores

NORMS = {
    "max_norm": (max_norm, reference.max_norm),
    "seed": (seed_scores, reference.seed_scores),
    "ctr": (ctr_scores, reference.ctr_scores),
    "ctr_clamped": (
        lambda x: ctr_scores(x, clamp=True),
        lambda x: reference.ctr_scores(x, clamp=True),
    ),
}
SHAPES = [(1, 2, 1, 1), (2, 3, 7, 5), (1, 4, 17, 13), (2, 2, 67, 65), (0, 3, 4, 4), (1, 82, 3, 3)]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def sample(shape, seed=0, dtype=torch.float64):
    """Planes of every kind: signed, positive, empty, with ties at the extrema."""
    x = draw(*shape, seed=seed)
    planes = x.flatten(0, 1)
    planes[1::5] = planes[1::5].abs() + 0.5
    planes[2::5] = planes[2::5].clamp(0.2, 0.8)
    planes[3::5] = -planes[3::5].abs()
    return x.to(dtype)


def both(call, expect, x):
    """Scores and gradient of an operator and of the reference in float64, at one upstream."""
    x = x.clone().requires_grad_()
    scores = call(x)
    upstream = draw(*scores.shape, seed=9)
    (gradient,) = torch.autograd.grad(scores, x, upstream.to(scores.dtype))
    wide = x.detach().double().requires_grad_()
    expected = expect(wide)
    (expected_gradient,) = torch.autograd.grad(expected, wide, upstream)
    return scores.detach(), gradient, expected.detach(), expected_gradient


def check(kind, x, call=None):
    call, expect = call or NORMS[kind][0], NORMS[kind][1]
    scores, gradient, expected, expected_gradient = both(call, expect, x)
    assert scores.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == x.dtype
    tight = 1e-12 if x.dtype == torch.float64 else 5e-6
    assert ((scores.double() - expected).abs() <= tight * (1 + expected.abs())).all()
    coarse = {torch.float64: 1e-11, torch.float32: 2e-5}.get(x.dtype, 2e-2)
    error = (gradient.double() - expected_gradient).abs().flatten(-2)
    largest = expected_gradient.abs().flatten(-2).amax(-1, keepdim=True)
    # In a flat plane the gradients of minimum and maximum are large, and cancel where they meet.
    positive = x.double().relu().flatten(-2)
    width = positive.amax(-1, keepdim=True) - positive.amin(-1, keepdim=True) + 1e-5
    flat = positive.amax(-1, keepdim=True) / width
    assert (error <= coarse * (largest + 1) * (1 + flat)).all(), error.max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NORMS)
def test_equals_plain_torch(kind, shape, dtype):
    check(kind, sample(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_half_is_computed_in_float32(kind, dtype):
    x = draw(2, 3, 7, 5).to(dtype)
    check(kind, x)


CASE = {
    "kind": st.sampled_from(list(NORMS)),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "batch": st.integers(0, 3),
    "seed": st.integers(0, 9999),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    classes=st.integers(2, 9), height=st.integers(1, 40), width=st.integers(1, 40), **CASE
)  # fmt: skip
def test_any_maps(kind, dtype, batch, seed, classes, height, width):
    check(kind, sample((batch, classes, height, width), seed, dtype))


@pytest.mark.long
@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    classes=st.integers(2, 81), height=st.integers(1, 130), width=st.integers(1, 130), **CASE
)  # fmt: skip
def test_any_maps_long(kind, dtype, batch, seed, classes, height, width):
    check(kind, sample((batch, classes, height, width), seed, dtype))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 3, 4, 3), (1, 2, 5, 1)])
@pytest.mark.parametrize("kind", NORMS)
def test_gradcheck(kind, shape, seed):
    x = draw(*shape, seed=seed)
    x[:, -1] = x[:, -1].abs() + 0.5  # the minimum matters
    assert torch.autograd.gradcheck(NORMS[kind][0], x.requires_grad_())


@pytest.mark.parametrize("kind", NORMS)
def test_constant_planes(kind):
    check(kind, torch.stack([torch.full((3, 5, 4), v) for v in (0.7, 0.0, -1.0)]).double())


def test_gradient_of_ties_goes_to_the_first():
    x = torch.tensor([[3.0, 1.0, 3.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    for kind in ("max_norm", "ctr"):
        shaped = x if kind == "max_norm" else x.view(1, 1, 1, 5).expand(1, 2, 1, 5)
        _, gradient, _, expected = both(*NORMS[kind], shaped)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_seed_shares_the_background_among_ties():
    x = torch.tensor([1.0, 2.0]).double().repeat(3, 1).view(1, 3, 1, 2).requires_grad_()
    _, gradient, _, expected = both(*NORMS["seed"], x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_second_derivative_is_refused():
    x = draw(2, 3, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(max_norm(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_rank_and_layout():
    x = draw(2, 3, 8, 6)
    expected = max_norm(x)
    assert torch.equal(max_norm(x[1, 2]), expected[1, 2])
    assert torch.equal(max_norm(x[None]), expected[None])
    assert torch.equal(max_norm(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(max_norm(x.mT.contiguous().mT), expected)
    check("seed", x.to(memory_format=torch.channels_last))
    check("ctr", draw(1, 3, 8, 6).expand(2, 3, 8, 6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_its_map_only(bad):
    x = draw(2, 3, 7, 5)
    x[1, 2, 3, 4] = bad
    for scores in (max_norm(x), ctr_scores(x)):
        assert scores[1, 2].isnan().all()
        assert scores[0].isfinite().all() and scores[1, :2].isfinite().all()


def test_eps():
    x = draw(2, 3, 7, 5)
    torch.testing.assert_close(max_norm(x, 0.25), reference.max_norm(x, 0.25), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        seed_scores(x, 0.25), reference.seed_scores(x, 0.25), rtol=0, atol=1e-14
    )


def scores_and_gradient(seed, kind="seed"):
    x = sample((2, 4, 61, 75), seed, torch.float32)
    scores, gradient, *_ = both(*NORMS[kind], x)
    return scores.numpy(), gradient.numpy()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", NORMS)
def test_threads_do_not_matter(monkeypatch, kind, threads):
    expected = scores_and_gradient(0, kind)
    monkeypatch.setattr(_native, "num_threads", lambda: threads)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    for got, want in zip(scores_and_gradient(0, kind), expected, strict=True):
        assert np.array_equal(got, want)


def forward_only(seed):
    return seed_scores(sample((2, 4, 61, 75), seed, torch.float32)).numpy()


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(_native, "num_threads", lambda: 4)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    expected = forward_only(1)  # threads have run in the parent
    assert all(np.array_equal(scores, expected) for scores in run_forked(forward_only, 1))


@pytest.mark.parametrize(
    ("call", "x", "message"),
    [
        (max_norm, torch.ones(3), r"x must be \[..., h, w\].* got \[3\]"),
        (max_norm, torch.ones(3, 0, 2), r"got \[3, 0, 2\]"),
        (seed_scores, torch.ones(3, 2, 2), r"cams must be \[B, K, h, w\].* got \[3, 2, 2\]"),
        (seed_scores, torch.ones(3, 0, 2, 2), r"got \[3, 0, 2, 2\]"),
        (ctr_scores, torch.ones(2, 2), r"refined must be \[B, C, h, w\].* got \[2, 2\]"),
    ],
)
def test_refuses(call, x, message):
    with pytest.raises(InputError, match=message):
        call(x)


def test_bindings_guard_themselves():
    maps, scores, extrema = np.zeros((1, 2, 9)), np.zeros((1, 2, 9)), np.zeros((1, 2, 2))
    _C.norm_planes_cpu(maps, scores, extrema, 0, 0, 3, 1e-5, 1)
    with pytest.raises(ValueError, match="scores must be of shape"):
        _C.norm_planes_cpu(maps, scores, extrema, 0, 1, 3, 1e-5, 1)
    with pytest.raises(ValueError, match="extrema must be float64"):
        _C.norm_planes_cpu(maps, scores, extrema.astype(np.float32), 0, 0, 3, 1e-5, 1)
    with pytest.raises(ValueError, match="norm must be a code"):
        _C.norm_planes_cpu(maps, scores, extrema, 0, 0, 9, 1e-5, 1)
    with pytest.raises(ValueError, match="parts must be positive"):
        _C.norm_planes_cpu(maps, scores, extrema, 0, 0, 3, 1e-5, 0)
    scores.flags.writeable = False
    with pytest.raises(ValueError, match="scores is read-only"):
        _C.norm_planes_cpu(maps, scores, extrema, 0, 0, 3, 1e-5, 1)


@pytest.mark.parametrize("kind", NORMS)
def test_opcheck(kind):
    x = draw(2, 3, 4, 3, dtype=torch.float32)
    operator = torch.ops.wsis.norm_planes
    torch.library.opcheck(operator, (x.clone().requires_grad_(), kind, 1e-5, 0.2))
    scores, extrema = operator(x, kind, 1e-5, 0.2)
    arguments = (torch.ones_like(scores), x, extrema, scores if kind == "seed" else None, kind)
    torch.library.opcheck(torch.ops.wsis.norm_planes_backward, (*arguments, 1e-5))


def test_compiles_as_one_graph():
    def loss(x):
        return (max_norm(x) ** 2).sum() + seed_scores(x).sum() + (ctr_scores(x) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = draw(2, 3, 4, 5)
    results = []
    for function in (compiled, loss):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
