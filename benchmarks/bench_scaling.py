"""Training steps of the recipe `lite0` by one process and by two, one thread each, gloo on the CPU.

The global batch is the same, so are the updates (tests/run/test_parallel.py); loading is part of a
step. Measured in processor time of the first process, so that a busy machine changes little: what a
step takes there on a core of its own, exchanging gradients included, waiting for the other process
not. The wall time stands beside it. `--root` names a data set in VOC's layout; without one the
built-in scenes are used.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS, SKIPPED, BATCH = 5, 1, 8
WAYS = {"wsis": 2, "one_process": 1}


def run_steps(folder, root):
    """Prints processor and wall seconds of each step, on the first process."""
    import torch

    from wsis.engine import distributed
    from wsis.engine.trainer import Trainer
    from wsis.recipes import get_recipe

    config = get_recipe("lite0")
    config.data.dataset = "voc" if root else "scenes"
    config.data.root, config.data.workers = root or None, 0
    config.threads, config.device = 1, "cpu"
    config.optim.batch_size = BATCH
    config.pseudo.start = 0.0  # all terms from the first step on
    torch.set_num_threads(1)
    with distributed.session("cpu"):
        trainer = Trainer(config, Path(folder), resume=False)
        trainer.model.train()
        spent, clock = time.process_time(), time.monotonic()
        for step, batch in enumerate(trainer.loader.epoch(0)):
            trainer._train_step(batch, 0)
            trainer.step += 1
            if distributed.is_main():
                seconds = time.process_time() - spent, time.monotonic() - clock
                print("step", *seconds, sep="\t", flush=True)
            spent, clock = time.process_time(), time.monotonic()
            if step + 1 == STEPS + SKIPPED:
                break


def measure(way, folder, root):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", f"--nproc_per_node={WAYS[way]}", str(Path(__file__))]
    command += [str(folder), root or ""]
    path = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    lines = [line.split("\t")[1:] for line in done.stdout.splitlines() if line[:5] == "step\t"]
    return [tuple(map(float, line)) for line in lines[SKIPPED:]]


@pytest.mark.parametrize("way", WAYS)
def test_scaling(benchmark, request, tmp_path, way):
    root = request.config.getoption("--root", default=None)
    benchmark.group = f"RTC step, lite0, batch {BATCH}, 225 px"
    benchmark.extra_info["baseline"] = way == "one_process"
    steps = measure(way, tmp_path / "run", root)
    assert len(steps) == STEPS
    moments = [0.0]
    for spent, _ in steps:
        moments += [moments[-1] + spent] * 2
    ticks = iter(moments)
    benchmark._timer = lambda: next(ticks)  # measured in processes of their own
    benchmark.pedantic(lambda: None, rounds=STEPS, iterations=1)
    wall = statistics.median(seconds for _, seconds in steps)
    benchmark.extra_info["wall_ms"] = round(1e3 * wall, 1)
    benchmark.extra_info["steps_per_s"] = round(1 / benchmark.stats.stats.median, 3)


if __name__ == "__main__":
    run_steps(*sys.argv[1:])
