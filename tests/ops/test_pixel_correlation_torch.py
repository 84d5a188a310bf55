"""Pixel correlation as an operator of torch: threads, processes, instruction sets, gradients,
compilation, memory, bad input. Values are in test_pixel_correlation.py."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from tests import emulator
from tests.ops.test_pixel_correlation import draw
from tests.ops.test_uninitialised import check, with_gradient
from tests.workers import run_forked
from wsis import _C
from wsis.errors import InputError
from wsis.ops import _native
from wsis.ops.pixel_correlation import pixel_correlation


def forward_and_back(batch=3, size=(23, 19)):
    cams, features = (x.requires_grad_() for x in draw(batch, 5, 11, *size))
    other = features.detach().flip(1).requires_grad_()
    out = pixel_correlation(cams, [features, other])
    gradients = torch.autograd.grad(out.square().sum(), (cams, features, other))
    return [x.detach().numpy() for x in (out, *gradients)]


@pytest.mark.parametrize(("batch", "size"), [(3, (23, 19)), (1, (40, 31)), (4, (3, 3))])
def test_threads_do_not_matter(monkeypatch, batch, size):
    expected = forward_and_back(batch, size)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(_native, "num_threads", lambda threads=threads: threads)
        for got, wanted in zip(forward_and_back(batch, size), expected, strict=True):
            assert np.array_equal(got, wanted)


def correlated():
    cams, features = draw(1, 2, 5, 20, 20)
    return pixel_correlation(cams, features).numpy()


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(_native, "num_threads", lambda: 4)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    expected = correlated()  # threads have run in the parent
    assert all(np.array_equal(result, expected) for result in run_forked(correlated))


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_every_instruction_set(isa):
    program = """
        import torch
        from tests.ops.test_pixel_correlation import check_against_dense
        for dtype in (torch.float32, torch.float64):
            for temperature in (None, 0.2):
                check_against_dense(2, 7, [5, 72], (11, 13), dtype, temperature)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        cwd=emulator.ROOT,
        env={**os.environ, "WSIS_ISA": isa, "PYTHONPATH": str(emulator.ROOT)},
    )


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (12, 8), (10, 20)])
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_fresh_memory_does_not_matter(size, temperature):
    inputs = draw(2, 3, 7, *size)
    check(
        lambda: with_gradient(
            lambda c, f: pixel_correlation(c, [f, f], temperature=temperature),
            *(x.clone() for x in inputs),
        )
    )


# ---- gradients and compilation -----------------------------------------------------------------


def two_maps(cams, features, other, temperature=None):
    return pixel_correlation(cams, [features, other], temperature=temperature)


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("size", [(3, 2), (1, 1), (1, 4)])
def test_gradcheck(size, temperature):
    cams, features = draw(2, 3, 4, *size, torch.float64)
    other = draw(2, 3, 3, *size, torch.float64)[1]
    inputs = tuple(x.requires_grad_() for x in (cams, features, other))
    assert torch.autograd.gradcheck(lambda *x: two_maps(*x, temperature), inputs)


def test_only_wanted_gradients():
    cams, features = draw(2, 3, 4, 9, 12, torch.float64)
    other = features.flip(1)
    inputs = [x.requires_grad_() for x in (cams, features, other)]
    everything = torch.autograd.grad(two_maps(*inputs).square().sum(), inputs)
    for one, expected in zip(inputs, everything, strict=True):
        alone = [x if x is one else x.detach() for x in inputs]
        (gradient,) = torch.autograd.grad(two_maps(*alone).square().sum(), one)
        assert torch.equal(gradient, expected)


def test_second_derivative_is_refused():
    cams, features = (x.requires_grad_() for x in draw(1, 2, 3, 4, 4, torch.float64))
    out = pixel_correlation(cams, features)
    (gradient,) = torch.autograd.grad(out.sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_opcheck(temperature):
    cams, features = (x.flatten(2).requires_grad_() for x in draw(2, 3, 4, 5, 7))
    other = features.detach().flip(1)
    ops = torch.ops.wsis
    torch.library.opcheck(ops.pixel_correlation, (cams, [features, other], 1e-5, temperature))
    _, saved = ops.pixel_correlation(cams, [features, other], 1e-5, temperature)
    rest = (saved.detach(), 1e-5, temperature)
    gradient = cams.detach()
    for wanted in ((True, [True, True]), (False, [True, False]), (True, [False, False])):
        torch.library.opcheck(
            ops.pixel_correlation_backward,
            (gradient, cams.detach(), [features.detach(), other], *rest, *wanted),
        )


def test_compiles_as_one_graph():
    cams, features = draw(2, 3, 4, 9, 12)
    inputs = [x.requires_grad_() for x in (cams, features, features.flip(1))]

    def everything(cams, features, other):
        once = two_maps(cams, features, other)
        return pixel_correlation(once[..., ::2, ::2], other, temperature=0.5)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), everything(*inputs)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def test_inference_mode():
    cams, features = draw(1, 2, 3, 4, 4)
    with torch.inference_mode():
        assert pixel_correlation(cams, features).shape == cams.shape


# ---- memory ------------------------------------------------------------------------------------


def test_scratch_grows_with_pixels():
    """About 12 numbers per pixel and feature, where all pairs would be 12544."""
    for size, depth in ((56, 128), (112, 128), (112, 64)):
        pixels = size * size
        elements = _C.pixel_correlation_scratch(1, 21, depth, pixels, True, 1)
        assert elements <= 1.1 * pixels * (4.2 * depth + 200)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_large_grid_in_little_memory():
    """112 x 112, features 64 + 128, both directions: dense would take 630 MB per matrix."""
    # VmHWM is the peak of this program; ru_maxrss would start from that of its parent.
    program = """
        import re, torch
        from wsis.ops.pixel_correlation import pixel_correlation
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        def run(size):
            cams = torch.rand(1, 21, size, size, requires_grad=True)
            features = [torch.randn(1, d, size, size, requires_grad=True) for d in (64, 128)]
            used = peak()
            pixel_correlation(cams, features).square().sum().backward()
            return peak() - used
        run(4)
        print(run(112) / 1024)
    """
    environment = {**os.environ, "PYTHONPATH": str(emulator.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        cwd=emulator.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert 20 <= float(done.stdout) <= 100


# ---- bad input ---------------------------------------------------------------------------------

CAMS, FEATURES = torch.rand(2, 3, 4, 5), torch.rand(2, 6, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pixel_correlation(CAMS[0], FEATURES),
            r"cams must be a floating .*got torch.float32 \[3, 4, 5\]",
        ),
        (lambda: pixel_correlation(CAMS, FEATURES.long()), "features must be a floating"),
        (lambda: pixel_correlation(CAMS + 1j, FEATURES), "cams must be a floating"),
        (lambda: pixel_correlation(CAMS[:1], FEATURES), "share batch"),
        (lambda: pixel_correlation(CAMS, FEATURES.to("meta")), "share batch and device"),
        (lambda: pixel_correlation(CAMS, []), "features must be .* got none"),
        (lambda: pixel_correlation(CAMS, [FEATURES, FEATURES[..., 1:]]), "features must share"),
        (lambda: pixel_correlation(CAMS[..., :0], FEATURES), "cams must not be empty"),
        (lambda: pixel_correlation(CAMS, FEATURES, eps=0.0), "eps must be positive, got 0.0"),
        (
            lambda: pixel_correlation(CAMS, FEATURES, temperature=0.01),
            "temperature must be at least 0.02, got 0.01",
        ),
        (
            lambda: pixel_correlation(CAMS, FEATURES, temperature=float("nan")),
            "temperature must be at least",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_bindings_guard_themselves():
    cams, features = np.zeros((1, 2, 6), np.float32), np.zeros((1, 3, 6), np.float32)
    saved, result = np.zeros((1, 3, 6), np.float32), np.zeros_like(cams)
    scratch = np.zeros(_C.pixel_correlation_scratch(1, 2, 3, 6, False, 1), np.float32)
    rest = (0, 1e-5, 1e-5, 1.0, 1.0, 1)
    call = _C.pixel_correlation_cpu
    call(cams, features, saved, result, scratch, *rest)
    with pytest.raises(ValueError, match="features must be of shape"):
        call(cams, features[:, :, 1:], saved, result, scratch, *rest)
    with pytest.raises(ValueError, match="features must be float32"):
        call(cams, features.astype(float), saved, result, scratch, *rest)
    with pytest.raises(ValueError, match="saved must be of shape"):
        call(cams, features, saved[:, 1:], result, scratch, *rest)
    with pytest.raises(ValueError, match="scratch must be of shape"):
        call(cams, features, saved, result, scratch[1:], *rest)
    with pytest.raises(ValueError, match="similarity must be"):
        call(cams, features, saved, result, scratch, 2, *rest[1:])
    with pytest.raises(ValueError, match="parts must be positive"):
        call(cams, features, saved, result, scratch, *rest[:-1], 0)
    with pytest.raises(ValueError, match="gradient must be of shape"):
        _C.pixel_correlation_backward_cpu(
            cams[:, 1:], cams, features, saved, None, None, scratch, *rest
        )
