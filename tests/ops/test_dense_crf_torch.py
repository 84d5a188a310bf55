"""The dense CRF as an operator: threads, processes, instruction sets, memory, gradients. Values are
in test_dense_crf.py."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from importlib import import_module

import numpy as np
import pytest
import torch

from tests import emulator
from tests.ops.test_dense_crf import PSA, photograph, scores
from tests.workers import run_forked
from wsis import _C, _lattice
from wsis.ops.dense_crf import Bilateral, Features, Gaussian, _make_term, dense_crf
from wsis.ops.permutohedral import permutohedral_filter

SIZE = (61, 75)


def everything(labels=5, size=SIZE):
    """Arrays that depend on all that threads do."""
    image, probs = photograph(size), scores(labels, size)
    matrix = [[float(i != j) for j in range(labels)] for i in range(labels)]
    terms = [Gaussian(2, 3), Bilateral(20, 9, matrix, "before")]
    out = [dense_crf(image, probs, preset="psa"), dense_crf(image, probs, terms=terms)]
    out.append(dense_crf(image, probs, preset="deeplab", output="labels"))
    out.append(permutohedral_filter(probs, image.float() / 20, normalization="after"))
    return [array.numpy() for array in out]


def test_threads_do_not_matter(monkeypatch):
    expected = everything()
    for threads in (1, 2, 3, 7, 64):
        for name in ("permutohedral", "dense_crf", "_lattice"):
            module = import_module(f"wsis.ops.{name}")
            monkeypatch.setattr(module, "num_threads", lambda n=threads: n)
        for got, wanted in zip(everything(), expected, strict=True):
            assert np.array_equal(got, wanted)


def mean_field():
    lattice = _lattice.build_image((40, 50), np.empty, spatial=(3, 3), threads=3)
    term = _lattice.make_term(lattice, 3, "symmetric", 4, np.empty, threads=3)
    unary = np.random.default_rng(0).random((1, 4, 2000), np.float32)
    return _lattice.mean_field(unary, [term], 5, np.empty, threads=3)[0]


def test_works_after_fork():
    expected = mean_field()  # threads have run in the parent
    assert all(np.array_equal(result, expected) for result in run_forked(mean_field))


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_every_instruction_set(isa, tmp_path):
    """Equal to rounding; and the very same vertices, which rounding must not touch."""
    program = """
        import sys, numpy as np, torch
        from tests.ops.test_dense_crf_torch import everything
        from tests.ops.test_dense_crf import photograph
        from wsis.ops.permutohedral import bilateral_lattice
        lattice = bilateral_lattice(photograph((61, 75)), 30, 7)
        arrays = [a.numpy() for a in lattice.images[0]]
        np.savez(sys.argv[1], *everything(21), *arrays)
    """
    results = []
    for name in (isa, None):
        path = tmp_path / f"{name}.npz"
        environment = {**os.environ, "PYTHONPATH": str(emulator.ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"WSIS_ISA": name} if name else {}
        command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
        subprocess.run(command, check=True, cwd=emulator.ROOT, env=environment)
        results.append([array for _, array in sorted(np.load(path).items())])
    for got, wanted in zip(*results, strict=True):
        if got.dtype.kind == "f" and got.ndim == 4:
            error = np.abs(got - wanted)  # amplified in ten iterations; kernels differ in FMA
            assert error.max() <= 1e-4 and error.mean() <= 1e-6
        else:
            assert np.mean(got != wanted) <= (1e-3 if got.dtype == np.int64 else 0)


def test_fresh_memory_does_not_matter():
    """Scratch and results full of NaN, or of ones in every bit."""
    image, probs = photograph(SIZE), scores(11, SIZE)
    unary = -probs.flatten(2).clamp(1e-5, 1).log().numpy()

    def run(fill):
        def empty(shape, kind):
            array = np.empty(shape, kind)
            array.view(np.uint8).fill(fill)
            return array

        pixels = image.numpy()
        gauss = _lattice.build_image(SIZE, empty, spatial=(3, 3))
        both = _lattice.build_image(SIZE, empty, spatial=(30, 30), image=pixels, widths=[9] * 3)
        terms = [
            _lattice.make_term(gauss, 3, "symmetric", 11, empty),
            _lattice.make_term(both, np.ones(11) * -4, "after", 11, empty),
        ]
        return _lattice.mean_field(unary, terms, 3, empty, labels=True, threads=3)

    expected = run(0)
    for got, wanted in zip(run(255), expected, strict=True):
        assert np.array_equal(got, wanted)


# ---- gradients and compilation -----------------------------------------------------------------

TINY = (4, 5)


@pytest.mark.parametrize("kind", ["energy", "logits", "probs"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("form", ["potts", "matrix", "none"])
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.long)])
def test_gradcheck(kind, iterations, form, fast):
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, *TINY), generator=g, dtype=torch.uint8)
    matrix = torch.rand(3, 3, generator=g)
    terms = {
        "potts": [Gaussian(2, 1), Bilateral(3, 60, [-1.0, -2.0, -0.5], "before")],
        "matrix": [Features(torch.rand(1, 4, *TINY, generator=g), matrix, "after")],
        "none": [Gaussian(2, 0.1, "none")],
    }[form]
    unary = torch.rand(2, 3, *TINY, generator=g, dtype=torch.float64) + 0.1

    def call(u):
        return dense_crf(image, u, terms=terms, iterations=iterations, unary_kind=kind)

    assert torch.autograd.gradcheck(call, unary.requires_grad_(), fast_mode=fast)


def test_gradient_of_a_start():
    image = photograph(TINY)
    from wsis.ops._lattice import mean_field_op

    terms = [_make_term(term, image, 3) for term in PSA]
    unary = torch.randn(1, 3, 20, dtype=torch.float64, requires_grad=True)
    start = torch.rand(1, 3, 20, dtype=torch.float64).softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, s: mean_field_op(u, terms, 2, start=s)[0], (unary, start)
    )


def test_opcheck(monkeypatch):
    called = []
    real = torch.ops.wsis.mean_field
    image = photograph(TINY).repeat(2, 1, 1, 1)
    from wsis.ops import _lattice as operators

    class Spy:
        @staticmethod
        def mean_field(*arguments):
            called.append(arguments)
            return real(*arguments)

    monkeypatch.setattr(operators.torch.ops, "wsis", Spy)
    unary = torch.rand(2, 3, *TINY, requires_grad=True)
    for output in ("probs", "both", "labels"):
        dense_crf(image, unary, terms=[*PSA, Gaussian(1, [1, 2, 3], "after")], output=output)
    monkeypatch.undo()
    assert len(called) == 3
    for arguments in called:
        torch.library.opcheck(real, arguments)


def test_inference_mode_and_labels_without_gradient():
    image, probs = photograph(TINY), scores(3, TINY).requires_grad_()
    with torch.inference_mode():
        assert dense_crf(image, probs, preset="psa").shape == probs.shape
    labels = dense_crf(image, probs, preset="psa", output="labels")
    assert not labels.requires_grad


# ---- lattices of places ------------------------------------------------------------------------


def test_places_of_one_size_are_made_once(monkeypatch):
    made = []
    build = _lattice.build_image

    def counting(size, *rest, image=None, **keywords):
        if image is None:
            made.append(size)
        return build(size, *rest, image=image, **keywords)

    monkeypatch.setattr(_lattice, "build_image", counting)
    sizes = [(9, 11), (11, 9), (9, 11), (9, 11), (8, 12), (7, 13), (6, 14), (9, 11), (6, 14)]
    _lattice.places.cache_clear()
    kept = [dense_crf(photograph(s), scores(3, s), preset="psa") for s in sizes]
    assert made == [(9, 11), (11, 9), (8, 12), (7, 13), (6, 14)]  # (11, 9) is the oldest of five
    for size, result in zip(sizes, kept, strict=True):
        _lattice.places.cache_clear()
        fresh = dense_crf(photograph(size), scores(3, size), preset="psa")
        assert torch.equal(result, fresh)


def test_places_made_for_inference_serve_a_gradient():
    image, probs = photograph(TINY), scores(3, TINY)
    _lattice.places.cache_clear()
    with torch.inference_mode():
        expected = dense_crf(image, probs, preset="psa").clone()
    probs.requires_grad_()
    got = dense_crf(image, probs, preset="psa")
    got[:, 0].sum().backward()
    assert torch.equal(got.detach(), expected)
    assert probs.grad.abs().sum() > 0


# ---- memory ------------------------------------------------------------------------------------


def test_scratch_is_bounded():
    """Two tables of each lattice, one row a vertex, and a tile or two; no copy of the unaries."""
    height, width, labels = 120, 160, 81
    image = photograph((height, width))
    terms = [_make_term(term, image, labels) for term in PSA]
    lattices = [list(term.lattice.images[0]) for term in terms]
    rows = sum(2 * term.lattice.vertices[0] for term in terms)
    weights = sum((term.lattice.dims + 1) * height * width for term in terms)
    size = _C.dense_crf_scratch(lattices, [True] * 2, True, labels, height, width, 1)
    assert size <= rows * 96 + weights + 64 * 96 * 10


@pytest.mark.long
def test_memory_does_not_grow():
    """1,000 CRFs in a row after 100."""
    image, probs = photograph((48, 64)), scores(5, (48, 64))

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    for _ in range(100):
        dense_crf(image, probs, preset="psa", iterations=2)
    before = resident()
    for _ in range(1000):
        dense_crf(image, probs, preset="psa", iterations=2)
    assert resident() - before < 1 << 20


# ---- sanitizers --------------------------------------------------------------------------------

CASES = [((1, 1), 1), ((3, 70), 2), ((17, 9), 9), ((30, 41), 24), ((8, 8), 40)]


def run_all(module):
    """Everything native, on another build of it."""
    _lattice._C = module
    rng = np.random.default_rng(0)
    for size, labels in CASES:
        pixels = rng.integers(0, 256, (1, 3, *size), dtype=np.uint8)
        unary = rng.random((1, labels, size[0] * size[1]), np.float32)
        for threads, normalization in ((1, "symmetric"), (3, "after")):
            gauss = _lattice.build_image(size, np.empty, spatial=(2, 2), threads=threads)
            both = _lattice.build_image(
                size, np.empty, spatial=(20, 20), image=pixels, widths=[9] * 3, threads=threads
            )
            compat = np.ones((labels, labels))
            terms = [
                _lattice.make_term(gauss, 3, normalization, labels, np.empty, threads=threads),
                _lattice.make_term(both, compat, "none", labels, np.empty, threads=threads),
            ]
            for kind in ("float32", "float64"):
                q, best = _lattice.mean_field(
                    unary.astype(kind), terms, 3, np.empty, labels=True, threads=threads
                )
                assert np.array_equal(best[0], q[0].argmax(0))
    features = (rng.random((1, 7, 90)) * 1e4).astype(np.float32)
    lattice = _lattice.build(features, np.empty, threads=2)
    values = rng.random((1, 2, 90), np.float32)
    assert np.isfinite(_lattice.filter(lattice, values, np.empty, reverse=True)).all()


@pytest.mark.long
@pytest.mark.skipif(not emulator.has_compiler(), reason="needs a host compiler")
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_are_silent(flavour):
    done = emulator.run_sanitized(__name__, flavour)
    assert done.returncode == 0, done.stderr[-4000:]
