"""Several processes compute what one does."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.run.conftest import TINY, write_tree
from wsis.models.backbones import create_backbone
from wsis.models.weights import read_state

# In float64, so that the order of sums does not grow into another choice of best positions.
WORKER = """
    import sys
    from pathlib import Path
    import torch
    from wsis.commands.train import load_config
    from wsis.engine import distributed, validate
    from wsis.engine.trainer import Trainer

    torch.set_default_dtype(torch.float64)
    normalize = validate.normalize
    validate.normalize = lambda *arguments: normalize(*arguments).double()
    config, out = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    with distributed.session("cpu"):
        trainer = Trainer(config, out, resume=False)
        trainer.run()
        torch.save(trainer.model.state_dict(), out / f"rank-{distributed.rank()}.pt")
"""


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def train(processes, config, out):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--master_addr=127.0.0.1", f"--master_port={port}"]
    launch.append(f"--nproc_per_node={processes}")
    (out.parent / "worker.py").write_text(textwrap.dedent(WORKER))
    command = [sys.executable, *launch, str(out.parent / "worker.py"), str(config), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Images that neither the batches of an epoch nor the processes divide: a tail is dropped."""
    return write_tree(tmp_path_factory.mktemp("uneven") / "tree", train=19, val=5, masks=False)


@pytest.mark.parametrize(
    ("processes", "prototypes"),
    [
        (2, "confident"),
        *(pytest.param(n, p, marks=pytest.mark.long) for n, p in [(2, "ties"), (4, "confident")]),
    ],
)
def test_several_processes_compute_what_one_does(uneven, tmp_path, processes, prototypes):
    backbone = create_backbone("small").state_dict()
    save_file(backbone, tmp_path / "small.safetensors")
    config = {
        **TINY,
        "data": {**TINY["data"], "root": str(uneven)},
        # Statistics of a batch would be each process's own: they are frozen.
        "model": {
            **TINY["model"],
            "freeze_bn": True,
            "weights": str(tmp_path / "small.safetensors"),
        },
        "loss": {
            "background_prototype": prototypes,
            "mask_topk_by_label": prototypes == "confident",
        },
        "optim": {**TINY["optim"], "epochs": 10, "batch_size": 8},
        "validate_every": 5,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    one, two = (
        train(count, tmp_path / "config.yaml", tmp_path / f"by-{count}") for count in (1, processes)
    )
    assert len(one) == len(two) == 20
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert {"ctr_intra", "com", "seg"} <= one[-1].keys()
    folders = [tmp_path / f"by-{count}" for count in (1, processes)]
    first, *others = [torch.load(folders[1] / f"rank-{rank}.pt") for rank in range(processes)]
    for name, value in first.items():
        assert all(torch.equal(value, other[name]) for other in others), name
    maps = [[row["val_map"] for row in rows(folder / "metrics.csv")] for folder in folders]
    assert [value != "" for value in maps[0]] == [epoch % 5 == 4 for epoch in range(10)]
    assert maps[0] == maps[1]  # every image of val counted once
    final = [read_state(folder / "weights.safetensors") for folder in folders]
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value, rtol=1e-6, atol=1e-8)
