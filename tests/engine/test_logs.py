from __future__ import annotations

import csv
import json
import math
import os
import resource
import sys
import types
from pathlib import Path

import pytest

from wsis.engine import logs
from wsis.engine.logs import RunLog, versions, write_json_atomic, write_text_atomic
from wsis.errors import InputError

FILES = ("log.jsonl", "metrics.csv", "times.jsonl")


def run(log: RunLog, start: int, stop: int) -> None:
    """Steps start+1..stop of a run with 4 steps per epoch; `seg` appears in epoch 3."""
    for step in range(start + 1, stop + 1):
        extra = {"seg": 1 / (7 * step)} if step > 8 else {}
        log.record(step, epoch=(step - 1) // 4 + 1, total=1 / (3 * step), **extra)
        if step % 4 == 0:
            log.epoch(step // 4, step, total=0.1 * step, **extra)
            log.time(step, seconds=step / 10)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def straight(tmp_path):
    folder = tmp_path / "straight"
    with RunLog(folder) as log:
        run(log, 0, 16)
    return contents(folder)


@pytest.mark.parametrize("saved", [0, 1, 4, 7, 8, 9, 12, 15])
@pytest.mark.parametrize("later", [0, 1, 3])
@pytest.mark.parametrize("torn", [b"", b'{"step": 13, "tot', b"{", b'{"step": 2}', b"\xff\xfe"])
def test_a_resumed_run_writes_the_same_bytes(tmp_path, straight, saved, later, torn):
    folder = tmp_path / "killed"
    run(RunLog(folder), 0, min(saved + later, 16))  # never closed, as after a kill
    for name in ("log.jsonl", "times.jsonl"):
        with open(folder / name, "ab") as file:
            file.write(torn)
    with RunLog(folder) as log:
        log.rewind(saved)
        run(log, saved, 16)
    assert contents(folder) == straight
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_rewinding_drops_the_columns_of_the_dropped_rows(tmp_path):
    early, late = tmp_path / "early", tmp_path / "late"
    with RunLog(early) as log:
        run(log, 0, 8)
    with RunLog(late) as log:
        run(log, 0, 16)
    with RunLog(late) as log:
        log.rewind(8)
    assert contents(late) == contents(early)


def test_records_read_back_exactly(tmp_path):
    with RunLog(tmp_path) as log:
        log.record(1, total=0.1 + 0.2, name='quote " and, comma', none=None, nan=math.nan)
        log.epoch(1, 1, total=0.1 + 0.2, name='quote " and, comma', nan=math.nan, big=10**20)
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["total"] == 0.1 + 0.2
    assert record["none"] is None
    assert math.isnan(record["nan"])
    with open(tmp_path / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["epoch", "step", "total", "name", "nan", "big"]
    assert float(row["total"]) == 0.1 + 0.2
    assert row["name"] == 'quote " and, comma'
    assert math.isnan(float(row["nan"]))
    assert int(row["big"]) == 10**20


def test_columns_keep_their_order(tmp_path):
    with RunLog(tmp_path) as log:
        log.epoch(1, 4, total=1.0)
        log.epoch(2, 8, seg=2.0, total=1.5)
        log.epoch(3, 12, total=1.25)
    assert (tmp_path / "metrics.csv").read_text() == (
        "epoch,step,total,seg\n1,4,1.0,\n2,8,1.5,2.0\n3,12,1.25,\n"
    )


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path)
    log.record(1, total=1.0)
    log.time(1, seconds=2.0)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "total": 1.0}\n'
    assert (tmp_path / "times.jsonl").read_text() == '{"step": 1, "seconds": 2.0}\n'
    log.sync()
    log.close()
    log.close()


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"total": 1}', '{"step": "x"}', ""])
def test_damage_within_a_file_is_named_and_kept(tmp_path, line):
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"log\.jsonl, line 2"):
        RunLog(tmp_path).rewind(5)
    assert (tmp_path / "log.jsonl").read_text() == text


def test_a_foreign_table_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"metrics\.csv"):
        RunLog(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/run"):
        RunLog(tmp_path / "file" / "run")


def test_atomic_writes_keep_the_old_file_on_a_full_disk(tmp_path):
    path = tmp_path / "about.json"
    write_json_atomic(path, {"a": [1, 2.5]})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*about\.json.*5000 bytes needed"):
            write_text_atomic(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(path.read_text()) == {"a": [1, 2.5]}
    assert os.listdir(tmp_path) == ["about.json"]


def test_a_full_disk_stops_the_log_with_its_name(tmp_path):
    log = RunLog(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*log\.jsonl"):
            log.record(1, text="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_versions():
    found = versions()
    assert list(found) == ["python", "wsis", "torch", "torchvision", "numpy", "platform", "cpu"]
    assert found["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert all(found[name] for name in ("torch", "cpu", "platform"))
    json.dumps(found)


def test_tensorboard_gets_numbers_and_hides_the_rewound(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            calls.append(("open", Path(folder).name, purge_step))

        def add_scalar(self, *args):
            calls.append(args)

        def close(self):
            calls.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: name == "tensorboard")
    with RunLog(tmp_path) as log:
        log.record(1, total=2.0, name="text")
        log.rewind(0)
        log.epoch(1, 4, total=3.0)
    assert calls == [
        ("open", "tensorboard", None),
        ("total", 2.0, 1),
        "close",
        ("open", "tensorboard", 1),
        ("epoch/total", 3.0, 4),
        "close",
    ]
