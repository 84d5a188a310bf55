"""Pixel correlation forward and backward on one thread: torch's dense form against wsis.

Two feature maps (64 and 128 channels) averaged, 21 class maps. Times are processor time. The
baseline is asserted to be a good one: above the six matrix products that it consists of it may
cost no more than three of the largest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.memory import peak_so_far
from tests.reference.pixel_correlation_dense import pixel_correlation as dense
from wsis.ops.pixel_correlation import pixel_correlation

DEPTHS, CLASSES = (64, 128), 21
WAYS = {"wsis": pixel_correlation, "torch_dense": dense}
CASES = {
    "56 x 56 forward": (56, False),
    "56 x 56 forward and backward": (56, True),
    "112 x 112 forward and backward": (112, True),
    "8 images 16 x 16 forward and backward": (16, True),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_case(size):
    g = torch.Generator().manual_seed(0)
    batch = 8 if size == 16 else 1
    cams = torch.rand(batch, CLASSES, size, size, generator=g)
    features = [torch.randn(batch, depth, size, size, generator=g) for depth in DEPTHS]
    upstream = torch.randn(cams.shape, generator=g)
    return [x.requires_grad_() for x in (cams, *features)], upstream


def call(way, inputs, upstream, backward):
    """Result and gradients."""
    with torch.set_grad_enabled(backward):
        out = WAYS[way](inputs[0], inputs[1:])
    return [out, *(torch.autograd.grad(out, inputs, upstream) if backward else ())]


def seconds(function, rounds=9):
    """The least of some: a difference of two times is wanted, and others' work only adds."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def peak_mib(way, size, backward):
    """Memory of one call above its arguments, results included, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), way, str(size), str(int(backward))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(way, size, backward):
    torch.set_num_threads(1)
    call(way, *make_case(4), backward)  # what is loaded at the first call
    case = make_case(size)
    before = peak_so_far()
    call(way, *case, backward)
    print(peak_so_far() - before)


def test_baseline_is_good(record_property):
    (cams, *features), upstream = make_case(56)
    maps, units = cams.detach()[0].flatten(1), [f.detach()[0].flatten(1) for f in features]
    rows = [u.T.contiguous() for u in units]

    def products():
        """All of dense: for every map three with the features and three with the maps."""
        for u, r in zip(units, rows, strict=True):
            affinity = torch.matmul(r, u)
            out = torch.matmul(maps, affinity)
            torch.matmul(out, affinity.T)
            gradient = torch.matmul(maps.T, out)
            torch.matmul(u, gradient)
            torch.matmul(u, gradient.T)

    inputs = [cams, *features]
    for function in (products, lambda: call("torch_dense", inputs, upstream, True)):
        function()
    bare = seconds(products)
    one = seconds(lambda: torch.matmul(rows[1], units[1]))
    whole = seconds(lambda: call("torch_dense", inputs, upstream, True))
    above = (whole - bare) / one
    record_property("products_above", above)
    assert above <= 3, f"dense must cost at most 3 products above torch.matmul, got {above:.2f}"


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_correlate(benchmark, name, way):
    size, backward = CASES[name]
    case = (*make_case(size), backward)
    if size < 112:  # correctness first
        for got, wanted in zip(call(way, *case), call("torch_dense", *case), strict=True):
            # A pair whose product rounds to another side of 0 moves two pixels' gradients.
            off = (got - wanted).detach().abs() > 1e-5 * wanted.detach().abs().max()
            assert off.float().mean() <= 0.01
    benchmark.group = f"PCM pair, {CLASSES} maps, {name}"
    benchmark.extra_info["baseline"] = way == "torch_dense"
    benchmark.extra_info["peak_mib"] = round(peak_mib(way, size, backward))
    rounds = 2 if size == 112 else 7
    benchmark.pedantic(call, args=(way, *case), rounds=rounds, warmup_rounds=1)


if __name__ == "__main__":
    print_peak(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])))
