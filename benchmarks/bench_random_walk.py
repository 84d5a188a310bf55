"""Random walks on one thread: wsis against squaring the dense matrix and against a stencil of plain
torch, both of which take the affinities as wsis does.

Three maps and 2^8 steps, as PSA and IRN have them; images of 375 x 500 have a grid of 47 x 63 at
stride 8 (PSA), of 94 x 125 at stride 4 (IRN), where a dense matrix has 552 MB and takes minutes.
Times are processor time.
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
from tests.reference import random_walk as formulas
from tests.reference import random_walk_stencil as reference
from wsis.ops.random_walk import random_walk
from wsis.ops.stencil_affinity import half_disc, pair_affinity, path_affinity

RADIUS, LOG_STEPS = 5, 8
OFFSETS = half_disc(RADIUS)
CHANNELS = 448  # of AffinityNet
# grid, and what drives the walk
CASES = {
    "IRN walk 47 x 63": (47, 63, "irn"),
    "IRN walk 94 x 125": (94, 125, "irn"),
    "PSA walk 47 x 63": (47, 63, "psa"),
    "PSA walk 94 x 125": (94, 125, "psa"),
}
BETAS = {"irn": 10, "psa": 8}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_case(height, width, kind):
    """Maps, and an affinity as networks give it: borders and smooth features."""
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 3, height, width, generator=g)
    if kind == "irn":
        return maps, path_affinity(torch.rand(1, height, width, generator=g) ** 4)
    coarse = torch.randn(1, 64, height // 6 + 1, width // 6 + 1, generator=g)
    features = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return maps, pair_affinity(features)


def walk(way, maps, affinity, kind):
    if way == "wsis":
        return random_walk(maps, affinity, RADIUS, beta=BETAS[kind], log_steps=LOG_STEPS)
    function = reference.dense if way == "torch_dense" else reference.stencil
    return function(maps[0], affinity[0], OFFSETS, BETAS[kind], LOG_STEPS)[None]


def peak_mib(way, name):
    """Memory of one walk above its arguments, results included, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), way, name]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(way, name):
    torch.set_num_threads(1)
    height, width, kind = CASES[name]
    walk(way, *make_case(6, 7, kind), kind)  # what is loaded at the first call
    case = make_case(height, width, kind)
    before = peak_so_far()
    walk(way, *case, kind)
    print(peak_so_far() - before)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", ["wsis", "torch_stencil", "torch_dense"])
@pytest.mark.parametrize("name", CASES)
def test_walk(benchmark, name, way):
    height, width, kind = CASES[name]
    if way == "torch_dense" and height > 47:
        pytest.skip("takes minutes")
    case = make_case(height, width, kind)
    if way == "wsis":  # correctness first
        expected = walk("torch_stencil", *(x.double() for x in case), kind)
        assert (walk(way, *case, kind) - expected).abs().max() <= 2e-5
    benchmark.group = f"{name}, 3 maps, 256 steps"
    benchmark.extra_info["baseline"] = way == "torch_stencil"
    benchmark.extra_info["peak_mib"] = round(peak_mib(way, name))
    rounds = {"wsis": 15, "torch_stencil": 5, "torch_dense": 1}[way]
    arguments = (way, *case, kind)
    benchmark.pedantic(walk, args=arguments, rounds=rounds, warmup_rounds=int(rounds > 1))


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", ["wsis", "torch"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("kind", ["psa", "irn"])
def test_affinities(benchmark, kind, backward, way):
    """As training has them: PSA's features at 56 x 56, radius 5; IRN's edges at 128 x 128, 10."""
    g = torch.Generator().manual_seed(0)
    if kind == "psa":
        source, radius = torch.randn(1, CHANNELS, 56, 56, generator=g), 5
    else:
        source, radius = torch.rand(1, 128, 128, generator=g), 10
    source.requires_grad_(backward)
    ours, theirs = {
        "psa": (pair_affinity, formulas.pair_affinity),
        "irn": (path_affinity, formulas.path_affinity),
    }[kind]

    def call():
        out = ours(source, radius) if way == "wsis" else theirs(source, half_disc(radius))
        return torch.autograd.grad(out.sum(), source)[0] if backward else out

    what = "PSA pairs 448 x 56 x 56" if kind == "psa" else "IRN paths 128 x 128, radius 10"
    benchmark.group = f"{what}, forward{' and backward' if backward else ''}"
    benchmark.extra_info["baseline"] = way == "torch"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    print_peak(sys.argv[1], sys.argv[2])
