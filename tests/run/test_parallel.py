"""Several processes compute what one does."""

from __future__ import annotations

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

from tests.run.conftest import TINY
from wsis.models.backbones import create_backbone
from wsis.models.weights import read_state

# In float64, so that the order of sums does not grow into another choice of best positions.
WORKER = """
    import sys
    from pathlib import Path
    import torch
    from wsis.commands.train import load_config
    from wsis.engine import distributed
    from wsis.engine.trainer import Trainer

    torch.set_default_dtype(torch.float64)
    config, out = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    with distributed.session("cpu"):
        trainer = Trainer(config, out, resume=False)
        trainer._validate = lambda: 0.0  # its images are float32
        trainer.run()
        torch.save(trainer.model.state_dict(), out / f"rank-{distributed.rank()}.pt")
"""


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


@pytest.mark.parametrize("prototypes", [pytest.param("ties", marks=pytest.mark.long), "confident"])
def test_two_processes_compute_what_one_does(tree, tmp_path, prototypes):
    backbone = create_backbone("small").state_dict()
    save_file(backbone, tmp_path / "small.safetensors")
    config = {
        **TINY,
        "data": {**TINY["data"], "root": str(tree)},
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
        "optim": {**TINY["optim"], "epochs": 7},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    one, two = (
        train(count, tmp_path / "config.yaml", tmp_path / f"by-{count}") for count in (1, 2)
    )
    assert len(one) == len(two) == 21
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert {"ctr_intra", "com", "seg"} <= one[-1].keys()
    ranks = [torch.load(tmp_path / "by-2" / f"rank-{rank}.pt") for rank in (0, 1)]
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
    final = [read_state(tmp_path / f"by-{count}" / "weights.safetensors") for count in (1, 2)]
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value, rtol=1e-6, atol=1e-8)
