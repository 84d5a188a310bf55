"""Random walks and their affinities as operators of torch: threads, processes, instruction sets,
gradients, compilation, memory, bad input. Values are in test_random_walk.py."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from tests import emulator
from tests.ops.test_random_walk import draw
from tests.ops.test_uninitialised import check as check_fresh
from tests.ops.test_uninitialised import with_gradient
from tests.workers import run_forked
from wsis import _C
from wsis.errors import InputError
from wsis.ops import _native
from wsis.ops.random_walk import attention_propagate, propagate_to_edge, random_walk
from wsis.ops.stencil_affinity import flat, half_disc, pair_affinity, path_affinity


def everything(batch=3, classes=5, size=(23, 19)):
    """Results and gradients of all operators."""
    maps, affinity = draw(batch, classes, *size, dtype=torch.float32)
    other = draw(batch, classes, *size, symmetric=False, dtype=torch.float32)[1]
    edge = maps[:, 0].clone()
    results = []
    for source, function in (
        (maps, lambda m: random_walk(m, affinity)),
        (maps, lambda m: random_walk(m, other, symmetric=False, log_steps=3)),
        (maps, pair_affinity),
        (edge, path_affinity),
    ):
        results += with_gradient(function, source.clone())
    return [x.numpy() for x in results]


@pytest.mark.parametrize(
    ("batch", "classes", "size"), [(3, 5, (23, 19)), (1, 3, (40, 31)), (4, 1, (3, 3))]
)
def test_threads_do_not_matter(monkeypatch, batch, classes, size):
    expected = everything(batch, classes, size)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(_native, "num_threads", lambda threads=threads: threads)
        for got, wanted in zip(everything(batch, classes, size), expected, strict=True):
            assert np.array_equal(got, wanted)


def walked():
    maps, affinity = draw(1, 2, 20, 20, dtype=torch.float32)
    return random_walk(maps, affinity).numpy()


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(_native, "num_threads", lambda: 4)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    expected = walked()  # threads have run in the parent
    assert all(np.array_equal(result, expected) for result in run_forked(walked))


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_every_instruction_set(isa):
    program = """
        import torch
        from tests.ops import test_random_walk as walk, test_random_walk_affinity as affinity
        for dtype in (torch.float32, torch.float64):
            for symmetric in (True, False):
                walk.check(2, 4, (11, 21), 5, 8, 7, symmetric, dtype)
        for single in (True, False):
            affinity.check_pairs(2, 9, (11, 21), 5, single, 0)
            affinity.check_paths(2, (11, 21), 5, single, 5, 0)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        cwd=emulator.ROOT,
        env={**os.environ, "WSIS_ISA": isa, "PYTHONPATH": str(emulator.ROOT)},
    )


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (12, 16), (10, 20)])
def test_fresh_memory_does_not_matter(size):
    maps, affinity = draw(2, 3, *size, dtype=torch.float32)
    other = draw(2, 3, *size, symmetric=False, dtype=torch.float32)[1]
    for function in (
        lambda m: random_walk(m, affinity, log_steps=8),
        lambda m: random_walk(m, affinity, log_steps=1),
        lambda m: random_walk(m, other, log_steps=2, symmetric=False),
        pair_affinity,
        lambda m: path_affinity(m[:, 0]),
    ):
        check_fresh(lambda function=function: with_gradient(function, maps.clone()))


# ---- gradients and compilation -----------------------------------------------------------------


@pytest.mark.parametrize("log_steps", [0, 2, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [(3, 2), (1, 1), (1, 4)])
def test_gradcheck(size, symmetric, log_steps):
    maps, affinity = draw(2, 2, *size, symmetric=symmetric)

    def function(maps):
        return random_walk(maps, affinity, log_steps=log_steps, symmetric=symmetric)

    assert torch.autograd.gradcheck(function, maps.requires_grad_())
    assert torch.autograd.gradgradcheck(function, maps)


def test_gradcheck_of_affinities():
    features = draw(2, 3, 4, 5)[0] * 4
    assert torch.autograd.gradcheck(lambda f: pair_affinity(f, 3), features.requires_grad_())
    edge = draw(2, 1, 4, 5)[0][:, 0].requires_grad_()
    assert torch.autograd.gradcheck(lambda e: path_affinity(e, 3), edge)


def test_adjoint():
    """<g, x T^n> = <g (T^t)^n, x>."""
    for symmetric in (True, False):
        maps, affinity = draw(2, 3, 9, 12, symmetric=symmetric)
        other = maps.flip(1, 2).requires_grad_()
        out = random_walk(other, affinity, symmetric=symmetric, log_steps=6)
        (gradient,) = torch.autograd.grad((maps * out).sum(), other)
        ours, theirs = (maps * out).sum().detach(), (gradient * other).sum().detach()
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_of_affinities_are_refused():
    features = draw(1, 2, 3, 4)[0].requires_grad_()
    for function in (pair_affinity, lambda f: path_affinity(f[:, 0])):
        (gradient,) = torch.autograd.grad(
            function(features).square().sum(), features, create_graph=True
        )
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric):
    maps, affinity = draw(2, 3, 5, 7, radius=3, symmetric=symmetric)
    half = list(half_disc(3))
    offsets = flat(half if symmetric else half + [(-y, -x) for y, x in half])
    ops = torch.ops.wsis
    for steps in (2, 256):
        for transposed in (True, False):
            arguments = (offsets, symmetric, transposed, 8, steps)
            torch.library.opcheck(ops.random_walk, (maps.requires_grad_(), affinity, *arguments))


def test_opcheck_of_affinities():
    features, affinity = draw(2, 3, 5, 7, radius=3)
    offsets, ops = flat(half_disc(3)), torch.ops.wsis
    gradient = affinity.flip(1)
    torch.library.opcheck(ops.pair_affinity, (features.clone().requires_grad_(), offsets))
    torch.library.opcheck(ops.pair_affinity_backward, (gradient, features, affinity, offsets))
    edge = features[:, 0].clone().requires_grad_()
    torch.library.opcheck(ops.path_affinity, (edge, offsets))
    _, chosen = ops.path_affinity(edge.detach(), offsets)
    torch.library.opcheck(ops.path_affinity_backward, (gradient, chosen, offsets))


def test_compiles_as_one_graph():
    maps, _ = draw(2, 3, 9, 12, dtype=torch.float32)
    edge = maps[:, :1].flip(2).contiguous()
    features = maps.flip(3).contiguous().requires_grad_()

    def all_of_it(maps, features):
        walked = random_walk(maps, pair_affinity(features, 3).detach(), 3, beta=2.5)
        spread = propagate_to_edge(walked, edge, log_steps=3)
        return spread + path_affinity(features[:, 0]).mean() + pair_affinity(features).mean()

    compiled = torch.compile(all_of_it, fullgraph=True, backend="aot_eager")
    inputs = [maps.requires_grad_(), features]
    out, expected = compiled(*inputs), all_of_it(*inputs)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def test_inference_mode():
    maps, affinity = draw(1, 2, 4, 4)
    with torch.inference_mode():
        assert random_walk(maps, affinity.requires_grad_()).shape == maps.shape


# ---- memory ------------------------------------------------------------------------------------


def test_scratch_grows_with_pixels():
    """A weight per pixel and direction and 3 planes per map, where squaring takes 2 N numbers."""
    for height, width in ((47, 63), (94, 125), (188, 250)):
        elements = _C.random_walk_scratch(1, 3, height, width, flat(half_disc(5)), True)
        assert elements <= 1.35 * height * width * (68 + 2 + 3 * 3)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_walk_fits_in_20_mb():
    """IRN's at 94 x 125, 3 maps: a dense matrix alone has 552 MB."""
    program = """
        import re, torch
        from wsis.ops.random_walk import propagate_to_edge
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        def run(height, width):
            maps, edge = torch.rand(1, 3, height, width), torch.rand(1, height, width)
            used = peak()
            propagate_to_edge(maps, edge)
            return peak() - used
        run(4, 4)
        print(run(94, 125) / 1024)
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
    assert 2 <= float(done.stdout) <= 19  # MiB


# ---- bad input ---------------------------------------------------------------------------------

MAPS, AFFINITY = torch.rand(2, 3, 4, 5), torch.rand(2, 34, 4, 5)
EDGE = torch.rand(2, 1, 4, 5)
ATTENTION = torch.rand(2, 20, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_walk(MAPS[0], AFFINITY), r"maps must be a floating .*\[3, 4, 5\]"),
        (lambda: random_walk(MAPS.int(), AFFINITY), "maps must be a floating"),
        (lambda: random_walk(MAPS + 1j, AFFINITY), "maps must be a floating"),
        (lambda: random_walk(MAPS, AFFINITY.bool()), "affinity must be a floating"),
        (lambda: random_walk(MAPS[:1], AFFINITY), "maps and affinity must share batch"),
        (lambda: random_walk(MAPS, AFFINITY.to("meta")), "share batch and device"),
        (lambda: random_walk(MAPS[..., 1:], AFFINITY), "maps and affinity must share a grid"),
        (lambda: random_walk(MAPS, AFFINITY[:, 1:]), "channel per offset, got 33 for 34"),
        (lambda: random_walk(MAPS, AFFINITY, symmetric=False), "got 34 for 68"),
        (lambda: random_walk(MAPS, AFFINITY, 0), "radius must be an integer from 1 to 18, got 0"),
        (lambda: random_walk(MAPS, AFFINITY, torch.rand(34, 2)), "offsets must be a radius or"),
        (lambda: random_walk(MAPS, AFFINITY, [(0, 0)]), r"offsets must differ .* got \(0, 0\)"),
        (lambda: random_walk(MAPS, AFFINITY, [(0, 1), (0, -1)]), r"got \(0, -1\)"),
        (
            lambda: random_walk(MAPS, AFFINITY, [(0, 1), (0, 1)], symmetric=False),
            r"offsets must differ .* got \(0, 1\)",
        ),
        (lambda: random_walk(MAPS, AFFINITY, [(0, 40000)]), "less than 32767 away"),
        (
            lambda: random_walk(MAPS, AFFINITY, [(0, i + 1) for i in range(513)]),
            "offsets must be at most 512",
        ),
        (lambda: random_walk(MAPS, AFFINITY, beta=0), "beta must be positive and finite, got 0"),
        (lambda: random_walk(MAPS, AFFINITY, beta=float("nan")), "beta must be positive"),
        (lambda: random_walk(MAPS, AFFINITY, beta=float("inf")), "beta must be positive"),
        (lambda: random_walk(MAPS, AFFINITY, log_steps=-1), "log_steps must be from 0 to 20"),
        (lambda: random_walk(MAPS, AFFINITY, log_steps=21), "log_steps must be from 0 to 20"),
        (lambda: random_walk(MAPS, AFFINITY, log_steps=2.0), "log_steps must be an integer"),
        (
            lambda: random_walk(MAPS, AFFINITY.clone().requires_grad_()),
            "affinity must not require a gradient",
        ),
        (lambda: propagate_to_edge(MAPS, MAPS), "edge must have one channel"),
        (lambda: propagate_to_edge(MAPS, EDGE[..., 1:]), "maps and edge must share batch and grid"),
        (lambda: propagate_to_edge(MAPS, EDGE[:1]), "maps and edge must share batch and grid"),
        (
            lambda: propagate_to_edge(MAPS, EDGE.clone().requires_grad_()),
            "edge must not require a gradient",
        ),
        (lambda: attention_propagate(MAPS, ATTENTION[:, 1:]), r"attention must be \[B, h w, h w\]"),
        (lambda: attention_propagate(MAPS, ATTENTION[0]), "attention must be a floating"),
        (lambda: attention_propagate(MAPS, ATTENTION, radius=-1), "radius must be at least 0"),
        (lambda: attention_propagate(MAPS, ATTENTION, eps=-1.0), "eps must not be negative"),
        (lambda: attention_propagate(MAPS, ATTENTION, log_steps=30), "log_steps must be from 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_bindings_guard_themselves():
    offsets = flat(half_disc(2))
    maps, affinity = np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 4, 3, 4), np.float32)
    result = np.zeros_like(maps)
    scratch = np.zeros(_C.random_walk_scratch(1, 2, 3, 4, offsets, True), np.float32)
    rest = (True, False, 8, 2, [], 1)
    call = _C.random_walk_cpu
    call(maps, affinity, scratch, result, offsets, *rest)
    with pytest.raises(ValueError, match="affinity must be of shape"):
        call(maps, affinity[:, 1:], scratch, result, offsets, *rest)
    with pytest.raises(ValueError, match="affinity must be float32"):
        call(maps, affinity.astype(float), scratch, result, offsets, *rest)
    with pytest.raises(ValueError, match="scratch must be of shape"):
        call(maps, affinity, scratch[1:], result, offsets, *rest)
    with pytest.raises(ValueError, match="offsets must be at most 512 pairs"):
        call(maps, affinity, scratch, result, offsets[1:], *rest)
    with pytest.raises(ValueError, match="exponent must be positive"):
        call(maps, affinity, scratch, result, offsets, True, False, 0, 2, [], 1)
    with pytest.raises(ValueError, match="steps must be positive"):
        call(maps, affinity, scratch, result, offsets, True, False, 8, 0, [], 1)
    with pytest.raises(ValueError, match="coefficients must be steps"):
        call(maps, affinity, scratch, result, offsets, True, False, 8, 2, [1.0], 1)
    with pytest.raises(ValueError, match="coefficients need a symmetric"):
        call(maps, affinity, scratch, result, offsets, False, False, 8, 1, [0.0, 1.0], 1)
    with pytest.raises(ValueError, match="parts must be positive"):
        call(maps, affinity, scratch, result, offsets, True, False, 8, 2, [], 0)
    chosen = np.zeros(affinity.shape, np.uint8)
    with pytest.raises(ValueError, match="a path must go down"):
        _C.path_affinity_cpu(maps[:, 0].copy(), chosen, affinity, [-1, 0] * 4, 1)
    with pytest.raises(ValueError, match="chosen must be uint8"):
        _C.path_affinity_cpu(maps[:, 0].copy(), affinity, affinity, offsets, 1)
    with pytest.raises(ValueError, match="gradient must be of shape"):
        _C.pair_affinity_backward_cpu(
            affinity[:, 1:].copy(), maps, affinity, affinity.copy(), result, offsets, 1
        )
    far = np.full(affinity.shape, 255, np.uint8)  # no choice that path_affinity makes
    edge_gradient = np.zeros((1, 3, 4), np.float32)
    _C.path_affinity_backward_cpu(np.ones_like(affinity), far, edge_gradient, offsets, 1)
    assert not edge_gradient.any()
