"""PAMR and PAR against plain torch with shifted views, the good baseline, and against the published
form that takes all neighbours apart.

All three give the same masks, which is asserted first. The baseline is asserted to be good: at
least 15 times as fast as the published form, on one image (the published form of the whole batch
takes minutes).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.reference import local_affinity_shifted as shifted
from tests.reference import local_affinity_unfold as unfold
from wsis.ops.local_affinity import DILATIONS, ITERATIONS, pamr, par

CASES = {
    "PAMR 4 x 21 x 321 x 321": ("pamr", 4, 21, 321),
    "PAR 1 x 21 x 448 x 448": ("par", 1, 21, 448),
    "PAR 1 x 4 x 448 x 448": ("par", 1, 4, 448),
}
OPERATORS = {"pamr": pamr, "par": par}
WAYS = {
    "torch_shifted": lambda kind, *case: shifted.refine(*case, kind, ITERATIONS, DILATIONS),
    "torch_unfold": lambda kind, *case: unfold.refine(*case, kind, ITERATIONS, DILATIONS),
    "wsis": lambda kind, *case: OPERATORS[kind](*case),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_case(batch, masks, size):
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, size // 8, size // 8, generator=g)
    image = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    image = image + 0.02 * torch.rand(image.shape, generator=g)
    return image, torch.rand(batch, masks, size, size, generator=g).softmax(dim=1)


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_mib(name, way):
    """Memory of one call above its arguments, result included, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), name, way]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(name, way):
    kind, batch, masks, size = CASES[name]
    torch.set_num_threads(1)
    WAYS[way](kind, *make_case(1, 1, 32))  # what is loaded at the first call
    case = make_case(batch, masks, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    out = WAYS[way](kind, *case)
    assert out.shape == case[1].shape
    print((status("VmHWM") - before) / 1024)


def status(name):
    """KiB."""
    return int(re.search(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1])


def test_baseline_is_good(record_property):
    case = ("pamr", *make_case(1, 21, 321))
    slow, good = (min(seconds(lambda way=way: WAYS[way](*case)) for _ in range(2))
                  for way in ("torch_unfold", "torch_shifted"))  # fmt: skip
    record_property("unfold_over_shifted", slow / good)
    assert slow >= 15 * good, f"the baseline must be 15 times as fast, got {slow / good:.1f}"


@pytest.mark.parametrize("way", ["wsis", "torch_shifted", "torch_unfold"])
@pytest.mark.parametrize("name", CASES)
def test_refine(benchmark, name, way):
    kind, batch, masks, size = CASES[name]
    if way == "torch_unfold" and batch > 1:
        pytest.skip("minutes; see the single image")
    case = (kind, *make_case(batch, masks, size))
    out = WAYS[way](*case)
    assert (out - WAYS["torch_shifted"](*case)).abs().max() <= 2e-5
    benchmark.group = f"{name}, {ITERATIONS} iterations"
    benchmark.extra_info["baseline"] = way == "torch_shifted"
    benchmark.extra_info["peak_mib"] = round(peak_mib(name, way))
    rounds = {"wsis": 15, "torch_shifted": 5, "torch_unfold": 1}[way]
    benchmark.pedantic(WAYS[way], args=case, rounds=rounds, warmup_rounds=0)


@pytest.mark.parametrize("way", ["wsis", "torch_shifted"])
def test_gradient(benchmark, way):
    image, masks = make_case(1, 4, 224)
    masks.requires_grad_()

    def both():
        masks.grad = None
        WAYS[way]("par", image, masks).sum().backward()

    benchmark.group = "PAR 1 x 4 x 224 x 224 with gradient"
    benchmark.extra_info["baseline"] = way == "torch_shifted"
    benchmark.pedantic(both, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    print_peak(*sys.argv[1:])
