from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from wsis.engine import distributed
from wsis.errors import InputError

ROOT = Path(__file__).parents[2]


def test_without_a_launch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    model = nn.Linear(2, 2)
    with distributed.session("cpu") as device:
        assert device == torch.device("cpu")
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert distributed.is_main()
        values = {"b": torch.tensor(2.0), "a": torch.tensor(0.5, dtype=torch.float64)}
        assert list(distributed.mean_values(values).items()) == [("b", 2.0), ("a", 0.5)]
        assert distributed.from_main(lambda: 3) == 3
        assert distributed.gather_objects({1: "a"}) == [{1: "a"}]
        assert distributed.any_rank(True) is True
        assert distributed.any_rank(False) is False
        assert distributed.wrap_ddp(model) is model
    with distributed.session() as device:
        assert device == distributed.default_device()


def test_half_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"MASTER_ADDR.*torchrun"), distributed.session("cpu"):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="found 2"), distributed.session("cuda"):
        pass


WORKER = """
    import json, os, sys, torch
    from pathlib import Path
    from torch import nn
    from wsis.engine import distributed
    torch.set_num_threads(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.used, self.late = nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, first, second, late):
            self.norm.eval()
            out = self.used(self.norm(first)).sum(1) + self.used(self.norm(second)).sum(1)
            return out + self.late(first).sum(1) if late else out

    def train(model, x, late):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(x[step], x[step].flip(1), late).square().mean().backward()
            optimizer.step()

    with distributed.session("cpu", timeout=8) as device:
        rank, world = distributed.rank(), distributed.world_size()
        found = {"rank": rank, "world": world, "main": distributed.is_main()}
        mine = {"b": torch.tensor(2.0 + rank), "a": torch.tensor(float(rank))}
        found["mean"] = distributed.mean_values(mine)
        found["any"] = [distributed.any_rank(rank == 1), distributed.any_rank(False)]
        found["main's"] = distributed.from_main(lambda: ["of", rank])
        found["each"] = distributed.gather_objects({"of": rank})
        x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
        for late in (True, False):
            torch.manual_seed(rank)  # DDP takes the weights of rank 0
            model = distributed.wrap_ddp(Net(), find_unused=not late)
            train(model, x[:, rank::2], late)
            found[f"late={late}"] = [p.tolist() for p in model.parameters()]
            torch.manual_seed(0)
            alone = Net()
            train(alone, x, late)
            found[f"alone={late}"] = [p.tolist() for p in alone.parameters()]
        Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
        if rank == 1:
            os._exit(3)
        distributed.any_rank(False)  # waits for a process that is gone
"""


def test_two_processes_agree_and_one_does_not_outlive_the_other(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **launch, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=open(tmp_path / f"{rank}.err", "w"),
        )
        for rank in range(2)
    ]
    try:
        codes = [processes[1].wait(timeout=60)]
        began = time.monotonic()
        codes.append(processes[0].wait(timeout=30))
        waited = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
    errors = [(tmp_path / f"{rank}.err").read_text() for rank in range(2)]
    assert codes[0] == 3, errors
    assert codes[1] not in (0, None), "rank 0 must not end well when rank 1 died"
    assert waited < 12

    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(f["rank"], f["world"], f["main"]) for f in found] == [(0, 2, True), (1, 2, False)]
    for f in found:
        assert list(f["mean"].items()) == [("b", 2.5), ("a", 0.5)]
        assert f["any"] == [True, False]
        assert f["main's"] == ["of", 0] and f["each"] == [{"of": 0}, {"of": 1}]
    for late in (True, False):
        first, second = (f[f"late={late}"] for f in found)
        assert first == second, "ranks drifted apart"
        for ours, alone in zip(first, found[0][f"alone={late}"], strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(alone))
