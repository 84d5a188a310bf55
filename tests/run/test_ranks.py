"""Processes that train together end together, and say what they share."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.run.conftest import command
from wsis.cli import main
from wsis.commands.train import load_config
from wsis.engine.check import batch_rule
from wsis.engine.checkpoint import CheckpointStore
from wsis.engine.trainer import Trainer

MARK = "WSIS_TEST_PROCESSES"


def family(mark: str) -> dict[int, dict[str, str]]:
    """Every process that inherited the mark, with its environment: children's children too."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # gone meanwhile
            continue
        environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        if environment.get(MARK) == mark and state != "Z":
            found[int(folder.name)] = environment
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def process_of_rank(mark: str, rank: int) -> int:
    """The training process of a rank, not one of its data workers."""
    members = {p for p, e in family(mark).items() if e.get("RANK") == str(rank)}
    (pid,) = [p for p in members if parent(p) not in members]
    return pid


def command_line(way: str, config: Path, out: Path, *flags: str) -> list[str]:
    arguments = ["train", "--config", config, "--out", out, *flags]
    if way == "gpus":
        return command(*arguments, "--gpus", 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--master_addr=127.0.0.1"]
    launch += [f"--master_port={port}", "--nproc_per_node=2"]
    return [*launch, *command(*arguments)[1:]]


def start(way: str, config: Path, folder: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """Start an endless run of two processes; return it when both have trained a step."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command_line(way, config, folder / "run", "--optim.epochs", "100000", *flags),
        stdout=open(folder / "out", "w"),
        stderr=open(folder / "err", "w"),
        env=environment,
        text=True,
    )
    log = folder / "run" / "log.jsonl"
    while not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
        assert process.poll() is None, (folder / "err").read_text()
    return process, mark


def ends_within(process: subprocess.Popen[str], mark: str, seconds: float) -> int:
    """The exit code, when nothing of the family is left in time; kills what is left otherwise."""
    deadline = time.monotonic() + seconds
    try:
        code = process.wait(timeout=seconds)
        while (left := family(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"{len(left)} processes live on"
        return code
    finally:
        for pid in family(mark):
            os.kill(pid, signal.SIGKILL)


def trials() -> list:
    """The first is for every run of the tests; the others make it 20 of every kind."""
    rng = random.Random(0)
    kinds = [(way, rank) for way in ("gpus", "torchrun") for rank in (0, 1)] * 5
    return [
        pytest.param(
            *(way, rank, rng.choice([0, 1]), rng.uniform(0, 2)),
            id=f"{number}-{way}-rank{rank}",
            marks=[pytest.mark.long] if number else [],
        )
        for number, (way, rank) in enumerate(kinds)
    ]


@pytest.mark.parametrize(("way", "rank", "workers", "after"), trials())
def test_a_killed_process_ends_the_others(tiny, tmp_path, way, rank, workers, after):
    process, mark = start(way, tiny, tmp_path, "--data.workers", str(workers))
    time.sleep(after)
    os.kill(process_of_rank(mark, rank), signal.SIGKILL)
    assert ends_within(process, mark, 60) not in (0, None)
    if way == "gpus":
        last = (tmp_path / "err").read_text().strip().splitlines()[-1]
        assert last == f"wsis: error: process {rank} was killed by SIGKILL; the others were ended"


@pytest.mark.parametrize(
    ("way", "number", "workers", "to_all"),
    [
        ("gpus", signal.SIGTERM, 1, False),
        ("gpus", signal.SIGTERM, 1, True),
        *(
            pytest.param(way, number, workers, False, marks=pytest.mark.long)
            for way, number, workers in [
                ("gpus", signal.SIGTERM, 0),
                ("gpus", signal.SIGINT, 0),
                ("gpus", signal.SIGINT, 1),
                ("gpus", signal.SIGKILL, 0),
                ("torchrun", signal.SIGTERM, 1),
                ("torchrun", signal.SIGKILL, 0),
            ]
        ),
    ],
)
def test_processes_save_and_end_with_what_started_them(
    tiny, tmp_path, way, number, workers, to_all
):
    """Whether torchrun alone is told, which passes it on, or every process, as systemd does."""
    process, mark = start(way, tiny, tmp_path, "--data.workers", str(workers))
    for pid in family(mark) if to_all else [process.pid]:
        os.kill(pid, number)
    code = ends_within(process, mark, 60)
    assert code == 130 if way == "gpus" and number != signal.SIGKILL else code != 0
    assert (tmp_path / "run" / "ckpt" / "last").exists()
    if number != signal.SIGKILL:  # after that, nobody asks the processes to save but their parent
        assert "Error" not in (tmp_path / "err").read_text()


RULE = "global batch 4, {} images each; learning rate 0.01, which belongs to the global batch\n"


def test_what_stays_the_same_is_said_when_processes_change(tiny, tmp_path, capsys):
    config, out = load_config(tiny), tmp_path / "run"
    Trainer(config, out, resume=False)._save()
    assert capsys.readouterr().out == ""
    about = json.loads((out / "about.json").read_text())
    store = CheckpointStore(out / "ckpt")
    groups, state = store.load(store.latest())
    store.save(1, groups, state)
    (out / "about.json").write_text(json.dumps({**about, "world_size": 2}))
    Trainer(config, out, resume=True)
    assert capsys.readouterr().out == f"1 process (until now 2): {RULE.format(4)}"
    assert json.loads((out / "about.json").read_text())["world_size"] == 1
    Trainer(config, out, resume=True)
    assert capsys.readouterr().out == ""


def test_the_rule_of_a_batch(tiny):
    config = load_config(tiny)
    assert batch_rule(config, 1) is None and batch_rule(config, 1, 1) is None
    assert batch_rule(config, 2, 2) + "\n" == f"2 processes: {RULE.format(2)}"
    assert batch_rule(config, 2, 4).startswith("2 processes (until now 4): global batch 4, 2 ")
    config.optim.accumulate = 2
    assert "2 images each in 2 parts;" in batch_rule(config, 2)


def test_a_batch_that_processes_cannot_share_is_refused_before_they_start(tiny, tmp_path, capsys):
    arguments = ["train", "--config", str(tiny), "--out", str(tmp_path / "run"), "--gpus", "3"]
    assert main(arguments) == 2
    assert "must be a multiple" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
