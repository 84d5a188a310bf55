"""One training step of RTC on one thread: with dense correlation, and with the native one.

Time and peak memory of forward, losses and backward of one image at 448 px with WideResNet38 and
21 classes, all terms on, in a process for each way; and where the time of the native step goes.
Weights are random: they do not change what a step costs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.memory import peak_so_far

SIZE, VIEW2, CLASSES = 448, 128, 20
CASES = {"wideresnet38": (1, SIZE, VIEW2), "efficientnet_lite0": (8, 225, 129)}
WAYS = ("wsis", "dense correlation")


def run_step(way, backbone):
    """Prints seconds of processor time by part, and the peak in MiB."""
    import torch

    from tests.reference.pixel_correlation_dense import pixel_correlation as dense
    from wsis.config import ModelConfig, PseudoConfig
    from wsis.data.views import second_view
    from wsis.engine.build import build_model
    from wsis.engine.step import Siamese, pseudo_masks
    from wsis.losses.rtc import RtcWeights, rtc_losses
    from wsis.models import crr
    from wsis.types import Batch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, size, view2 = CASES[backbone]
    native, spent = crr.pixel_correlation, [0.0]

    def timed(*arguments):
        start = time.process_time()
        out = (native if way == "wsis" else dense)(*arguments)
        spent[0] += time.process_time() - start
        return out

    crr.pixel_correlation = timed
    config = replace(ModelConfig(), backbone=backbone, freeze_stem=False, dropout=0.0)
    model = build_model(config, CLASSES)
    model = model.to(memory_format=torch.channels_last).train()
    label = torch.zeros(images, CLASSES)
    label[:, :2] = 1
    box = torch.tensor([[0, size, 0, size]] * images)
    batch = Batch(torch.randn(images, 3, size, size), label, box, torch.arange(images))
    marks = {}

    def mark(name, start):
        marks[name] = marks.get(name, 0.0) + time.process_time() - start
        return time.process_time()

    start = time.process_time()
    first, second = Siamese(model)(batch.image, second_view(batch.image, view2), True)
    marks["correlation, forward"] = spent[0]
    start = mark("forward", start + spent[0])
    masks = pseudo_masks(model, batch, first, PseudoConfig())
    start = mark("pseudo masks", start)
    losses = rtc_losses(
        first,
        second,
        label,
        image_size=(size, size),
        view2_size=view2,
        weights=RtcWeights.reconstructed(),
        pseudo_masks=masks,
    )
    start = mark("losses", start)
    losses["total"].backward()
    start = mark("backward", start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    start = time.process_time()
    optimizer.step()
    mark("optimizer", start)
    for name, seconds in marks.items():
        print(f"{name}\t{seconds}")
    print(f"peak\t{peak_so_far()}")


def measure(way, backbone):
    command = [sys.executable, str(Path(__file__)), way, backbone]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return {k: float(v) for k, v in (line.split("\t") for line in done.stdout.splitlines())}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backbone", CASES)
def test_step(benchmark, backbone, way):
    images, size, _ = CASES[backbone]
    benchmark.group = f"RTC step, {backbone}, {images} x {size} x {size}"
    benchmark.extra_info["baseline"] = way != "wsis"
    best = measure(way, backbone)
    benchmark.extra_info["peak_mib"] = round(best.pop("peak"))
    benchmark.extra_info["parts_ms"] = {name: round(1e3 * s, 1) for name, s in best.items()}
    ticks = iter((0.0, sum(best.values())))
    benchmark._timer = lambda: next(ticks)  # measured in the process of its own
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)


if __name__ == "__main__":
    run_step(*sys.argv[1:])
