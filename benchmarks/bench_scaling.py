"""Training steps of the recipe `lite0` by one process and by two, one thread each, gloo on the CPU.

The global batch is the same, so are the updates (tests/run/test_parallel.py); loading is part of a
step. Beside them one process with two threads, the other way to use two cores. `--root` names a
data set in VOC's layout; without one the built-in scenes are used. Wall time of the median step.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS, SKIPPED, BATCH = 8, 2, 8
WAYS = {"wsis": (2, 1), "1 process": (1, 1), "1 process, 2 threads": (1, 2)}


def run_steps(folder, root, threads):
    """Prints the seconds of each step, on the first process."""
    import torch

    from wsis.engine import distributed
    from wsis.engine.trainer import Trainer
    from wsis.recipes import get_recipe

    config = get_recipe("lite0")
    config.data.dataset = "voc" if root else "scenes"
    config.data.root, config.data.workers = root or None, 0
    config.model.weights = "none"
    config.threads, config.device = threads, "cpu"
    config.optim.batch_size = BATCH
    config.pseudo.start = 0.0  # all terms from the first step on
    torch.set_num_threads(threads)
    with distributed.session("cpu"):
        trainer = Trainer(config, Path(folder), resume=False)
        trainer.model.train()
        clock = time.monotonic()
        for step, batch in enumerate(trainer.loader.epoch(0)):
            trainer._train_step(batch, 0)
            trainer.step += 1
            if distributed.is_main():
                print(f"step\t{time.monotonic() - clock}", flush=True)
            clock = time.monotonic()
            if step + 1 == STEPS + SKIPPED:
                break


def measure(way, folder, root):
    processes, threads = WAYS[way]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", f"--nproc_per_node={processes}", str(Path(__file__))]
    command += [str(folder), root or "", str(threads)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    steps = [float(line[5:]) for line in done.stdout.splitlines() if line.startswith("step\t")]
    return steps[SKIPPED:]


@pytest.mark.parametrize("way", WAYS)
def test_scaling(benchmark, request, tmp_path, way):
    root = request.config.getoption("--root", default=None)
    benchmark.group = f"RTC step, lite0, batch {BATCH}, 225 px"
    benchmark.extra_info["baseline"] = way == "1 process"
    seconds = measure(way, tmp_path / "run", root)
    assert len(seconds) == STEPS
    moments = [0.0]
    for step in seconds:
        moments += [moments[-1] + step, moments[-1] + step]
    ticks = iter(moments)
    benchmark._timer = lambda: next(ticks)  # measured in processes of their own
    benchmark.pedantic(lambda: None, rounds=STEPS, iterations=1)
    benchmark.extra_info["images_per_s"] = round(BATCH / sorted(seconds)[STEPS // 2], 2)


if __name__ == "__main__":
    run_steps(sys.argv[1], sys.argv[2], int(sys.argv[3]))
