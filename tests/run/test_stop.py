"""Runs that are stopped by a signal or killed, and go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

import pytest

from tests.run.conftest import command


def weights(folder) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def logs(folder) -> tuple[str, str]:
    return (folder / "log.jsonl").read_text(), (folder / "metrics.csv").read_text()


def kill_and_resume(config, folder, kills: int, seed: int, span: float) -> None:
    """Start the run, kill it -9 after random times, resume until it ends by itself."""
    moments = random.Random(seed)
    line = command(
        "train",
        "--config",
        config,
        "--out",
        folder,
        "--resume",
        "auto",
        "--save_every",
        "2",
        "--quality_images",
        "0",
        "--report_images",
        "0",
    )
    for _ in range(kills):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        while not (folder / "log.jsonl").exists() and process.poll() is None:
            assert time.monotonic() - started < 120
            time.sleep(0.05)
        time.sleep(moments.uniform(0, span))
        process.kill()
        process.wait()
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.long)])
def test_killed_runs_end_bit_identical(trained, tiny, tmp_path, kills):
    folder = tmp_path / "killed"
    kill_and_resume(trained / "config.yaml", folder, kills, seed=kills, span=2.0)
    assert weights(folder) == weights(trained)
    assert logs(folder) == logs(trained)


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)]
)
def test_a_signal_to_the_whole_group_saves_and_tells_how_to_go_on(
    trained, tmp_path, number, workers
):
    """As a terminal's Ctrl-C, `timeout` and batch systems send it: to data workers as well."""
    folder = tmp_path / "stopped"
    config = trained / "config.yaml"
    flags = ["--optim.epochs", "400", "--data.workers", workers]
    process = subprocess.Popen(
        command("train", "--config", config, "--out", folder, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (folder / "log.jsonl").exists() or not (folder / "log.jsonl").read_text():
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, number)
    out, errors = process.communicate(timeout=60)  # ends when the workers, too, close the pipe
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "--resume auto" in out
    assert (folder / "ckpt" / "last").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
