"""Local affinity as an operator of torch: threads, processes, instruction sets, gradients,
compilation, bad input. Values are in test_local_affinity.py."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from tests import emulator
from tests.ops.test_local_affinity import REFINERS, random_case
from tests.workers import run_forked
from wsis import _C
from wsis.errors import InputError
from wsis.ops import _native
from wsis.ops.local_affinity import local_affinity, pamr, par, propagate, refine, varm


def forward_and_back(kind="par"):
    image, masks = random_case((29, 43), 5, torch.float32, batch=2)
    masks.requires_grad_()
    out = REFINERS[kind](image, masks, iterations=3)
    out.backward(image[:, :1].expand_as(out))
    return out.detach().numpy(), masks.grad.numpy()


@pytest.mark.parametrize("kind", REFINERS)
def test_threads_do_not_matter(monkeypatch, kind):
    expected = forward_and_back(kind)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    for threads in (1, 2, 3, 64):
        monkeypatch.setattr(_native, "num_threads", lambda threads=threads: threads)
        for got, wanted in zip(forward_and_back(kind), expected, strict=True):
            assert np.array_equal(got, wanted)


def refined():
    image, masks = random_case((29, 43), 5, torch.float32)
    return pamr(image, masks).numpy()


def test_works_after_fork(monkeypatch):
    monkeypatch.setattr(_native, "num_threads", lambda: 4)
    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    expected = refined()  # threads have run in the parent
    assert all(np.array_equal(result, expected) for result in run_forked(refined))


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_every_instruction_set(isa):
    program = """
        import sys, torch
        from tests.ops.test_local_affinity import check_against_shifted, random_case
        for kind in ("pamr", "par", "varm"):
            for dtype in (torch.float32, torch.float64):
                check_against_shifted(kind, (23, 37), 11, (1, 2, 24), 3, dtype)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        cwd=emulator.ROOT,
        env={**os.environ, "WSIS_ISA": isa, "PYTHONPATH": str(emulator.ROOT)},
    )


# ---- gradients and compilation -----------------------------------------------------------------


@pytest.mark.parametrize("kind", REFINERS)
@pytest.mark.parametrize("size", [(4, 3), (1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize(
    ("dilations", "iterations"), [((1,), 1), ((1, 2), 3), ((7,), 2), ((2, 9), 1)]
)
def test_gradcheck(kind, size, dilations, iterations):
    image, masks = random_case(size, 2, torch.float64, batch=2)
    counts = torch.tensor([1, 2]) if iterations > 1 else None
    masks.requires_grad_()

    def both(m):
        once = refine(image, m, kind, iterations=iterations, dilations=dilations, counts=counts)
        weights = local_affinity(image, kind, dilations)
        return once, propagate(m, weights, dilations, iterations, counts)

    assert torch.autograd.gradcheck(both, masks)
    if size == (4, 3) and iterations == 3:
        assert torch.autograd.gradgradcheck(both, masks)


SAMPLES = [((2, 5, 7), (1, 2), torch.float32, None), ((1, 1, 1), (3,), torch.float64, None),
           ((2, 4, 20), (1, 2, 4, 8, 12, 24), torch.float32, [0, 2])]  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    (batch, *size), dilations, dtype, counts = sample
    image, masks = random_case(size, 2, dtype, batch=batch)
    counts = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    dilations, masks = list(dilations), masks.requires_grad_()
    ops = torch.ops.wsis
    packed = ops.local_affinity_packed(image, "varm", dilations)
    torch.library.opcheck(ops.local_affinity_packed, (image, "par", dilations))
    for transposed in (False, True):
        torch.library.opcheck(ops.propagate, (masks, packed, counts, dilations, 2, transposed))
        torch.library.opcheck(
            ops.local_refine, (image, masks, counts, "pamr", dilations, 2, transposed)
        )


def test_compiles_as_one_graph():
    image, masks = random_case((9, 12), 2, torch.float32, batch=2)

    def everything(image, masks, counts):
        weights = local_affinity(image, "par", (1, 2))
        m = propagate(masks, weights, (1, 2), 2, counts)
        return pamr(image, m) + varm(image, masks[..., ::2, ::2]) + refine(image, m, "par")

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    counts = torch.tensor([1, 2])
    ours, theirs = masks.clone().requires_grad_(), masks.clone().requires_grad_()
    out, expected = compiled(image, ours, counts), everything(image, theirs, counts)
    assert torch.allclose(out, expected, atol=1e-6)  # the resize is another one when compiled
    out.sum().backward()
    expected.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5)


def test_inference_mode_and_image_with_gradient():
    image, masks = random_case((5, 6), 2, torch.float32)
    image.requires_grad_()
    with torch.inference_mode():
        assert par(image, masks).shape == masks.shape
    with pytest.raises(InputError, match="image must not require a gradient"):
        par(image, masks)


IMAGE, MASKS = torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_affinity(IMAGE[0], "par"), r"\[B, 3, H, W\], got \[3, 4, 4\]"),
        (lambda: local_affinity(IMAGE[:, :0], "par"), r"got \[1, 0, 4, 4\]"),
        (lambda: local_affinity(IMAGE, "crf"), "pamr, par or varm, got 'crf'"),
        (lambda: local_affinity(IMAGE, "par", ()), "dilations must be positive"),
        (lambda: local_affinity(IMAGE, "par", (1, 0)), "dilations must be positive"),
        (lambda: local_affinity(IMAGE, "par", range(1, 66)), "at most 64"),
        (lambda: local_affinity(IMAGE + 1j, "par"), "image must be real, got torch.complex64"),
        (lambda: par(IMAGE.expand(2, -1, -1, -1), MASKS), "B=2"),
        (lambda: par(IMAGE, MASKS[0]), r"masks must be \[B, C, h, w\].*got \[1, 4, 4\]"),
        (lambda: par(IMAGE, MASKS[..., :0]), "masks must not be empty"),
        (lambda: par(IMAGE, MASKS.to("meta")), "masks must be on cpu like the rest, got meta"),
        (lambda: par(IMAGE, MASKS, iterations=-1), "iterations must be 0 or more.*got -1"),
        (lambda: refine(IMAGE, MASKS, "par", counts=torch.ones(2)), r"counts must be \[B=1\] int"),
        (lambda: propagate(MASKS, torch.rand(1, 8, 4, 4), (1, 2)), "weights must"),
        (lambda: propagate(MASKS[0], torch.rand(1, 8, 4, 4), (1,)), "masks must be"),
        (
            lambda: propagate(MASKS, torch.rand(1, 8, 4, 4, requires_grad=True), (1,)),
            "weights must not require",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_bindings_guard_themselves():
    image, masks = np.zeros((1, 3, 4, 4), np.float32), np.zeros((1, 2, 4, 4), np.float32)
    packed = np.zeros((1, 4, 1, 8, 16), np.float32)
    size = _C.local_affinity_padded_size(3, 4, 4, [1])
    scratch = np.zeros(size, np.float32)
    with pytest.raises(ValueError, match="dilations must be positive"):
        _C.local_affinity_cpu(image, packed, scratch, 0, [0], [], 1)
    with pytest.raises(ValueError, match="position must be"):
        _C.local_affinity_cpu(image, packed, scratch, 1, [1], [], 1)
    with pytest.raises(ValueError, match="packed must be of shape"):
        _C.local_affinity_cpu(image, packed[..., :8], scratch, 0, [1], [], 1)
    with pytest.raises(ValueError, match="scratch must be of shape"):
        _C.local_affinity_cpu(image, packed, scratch[1:], 0, [1], [], 1)
    with pytest.raises(ValueError, match="packed must be float32"):
        _C.propagate_cpu(masks, packed.astype(float), None, masks, scratch, [1], 1, False, 1)
    counts = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="counts must be of shape"):
        _C.propagate_cpu(masks, packed, counts, masks, scratch, [1], 1, False, 1)
