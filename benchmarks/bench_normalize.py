"""CAM normalisation against eager torch, and against what moving the bytes alone would take.

Eager torch is tests/reference/normalize_torch.py; equality within 1e-5 is asserted before anything
is timed. ``floor`` is a copy of as many bytes as go in and out, half of them read and half written,
between buffers that are larger than the last-level cache. All functions allocate their results.
"""

from __future__ import annotations

import pytest
import torch

from tests.reference import normalize_torch as reference
from wsis.ops import cams_to_labels, max_norm, normalize_cams, seed_scores

K, SIZE = 20, 448
SCALES = (1, 2, 3, 4)
COPIED = 64 << 20  # bytes of one buffer of the copy; the usual last-level cache is 32 MB


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def maps():
    """8 maps [20, 14 s, 14 s], s = 1, 2, 3, 4, plain and flipped."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(K, 14 * s, 14 * s, generator=generator) for s in SCALES for _ in (0, 1)]


def copy_of(total: int):
    """A copy that moves this many bytes, a part of a large buffer at a time."""
    half = total // 2 // 4
    source, target = (torch.zeros(COPIED // 4) for _ in range(2))
    places = COPIED // 4 // half
    turn = 0

    def copy():
        nonlocal turn
        start = turn % places * half
        target[start : start + half].copy_(source[start : start + half])
        turn += 1

    return copy


def check(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def run(benchmark, way, ways, arguments, slow=("eager",)):
    benchmark.extra_info["baseline"] = way == "eager"
    rounds, warmup = (5, 1) if way in slow else (60, 10)
    benchmark.pedantic(ways[way], args=arguments, rounds=rounds, warmup_rounds=warmup)


FLIPS = [False, True] * len(SCALES)


@pytest.mark.benchmark(group="normalize_cams")
@pytest.mark.parametrize("way", ["eager", "floor", "wsis"])
@pytest.mark.parametrize("variant", ["psa", "seam", "afa"])
def test_normalize_cams(benchmark, maps, variant, way):
    benchmark.group = f"normalize_cams {variant}, 8 maps [20, 14 s, 14 s] to [20, 448, 448]"
    options = {"variant": variant, "flips": FLIPS}
    ours = normalize_cams(maps, (SIZE, SIZE), **options)
    check(ours, reference.normalize_cams(maps, (SIZE, SIZE), **options))
    moved = 4 * (sum(m.numel() for m in maps) + ours.numel())
    copy = copy_of(moved)
    ways = {
        "eager": lambda: reference.normalize_cams(maps, (SIZE, SIZE), **options),
        "wsis": lambda: normalize_cams(maps, (SIZE, SIZE), **options),
        "floor": copy,
    }
    run(benchmark, way, ways, ())


@pytest.mark.benchmark(group="normalize_cams seam with 3 present classes and (1 - max)^4")
@pytest.mark.parametrize("way", ["eager", "wsis"])
def test_present_classes(benchmark, maps, way):
    label = torch.zeros(K)
    label[[2, 7, 14]] = 1
    options = {"variant": "seam", "flips": FLIPS, "label": label}

    def eager():
        cams = reference.normalize_cams(maps, (SIZE, SIZE), **options)
        return reference.add_background(cams, "power", 4)

    def ours():
        return normalize_cams(maps, (SIZE, SIZE), **options, background="power", background_value=4)

    check(ours(), eager())
    run(benchmark, way, {"eager": eager, "wsis": ours}, ())


@pytest.mark.benchmark(group="cams_to_labels, two thresholds and a box, 20 x 448 x 448")
@pytest.mark.parametrize("way", ["eager", "wsis"])
def test_labels(benchmark, way):
    cams = torch.rand(1, K, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    label, box = torch.ones(1, K), torch.tensor([[8, 440, 0, 448]])

    def eager():
        best, channel = (cams * label[..., None, None]).max(dim=1)
        labels = channel + 1
        labels[best <= 0.95] = 255
        labels[best <= 0.85] = 0
        inside = torch.full_like(labels, 255)
        inside[:, 8:440] = labels[:, 8:440]
        return inside

    def ours():
        return cams_to_labels(cams, label, low=0.85, high=0.95, valid_box=box)

    assert torch.equal(ours(), eager())
    run(benchmark, way, {"eager": eager, "wsis": ours}, (), slow=())


NORMS = {
    "max_norm": (max_norm, reference.max_norm),
    "seed_scores": (seed_scores, reference.seed_scores),
}


@pytest.mark.benchmark(group="norms")
@pytest.mark.parametrize("way", ["eager", "floor", "wsis"])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_and_gradient(benchmark, norm, way):
    """Forward reads the maps and writes scores, backward reads both gradients' worth and writes."""
    benchmark.group = f"{norm} and its gradient, 2 x 4 x 448 x 448"
    x = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    ours, eager = NORMS[norm]
    upstream = torch.randn_like(eager(x).detach())

    def both(function):
        return torch.autograd.grad(function(x), x, upstream)[0]

    check(both(ours), both(eager))
    moved = 4 * (3 * x.numel() + 2 * upstream.numel())
    copy = copy_of(moved)
    run(benchmark, way, {"eager": lambda: both(eager), "wsis": lambda: both(ours), "floor": copy},
        (), slow=())  # fmt: skip
