"""`wsis bench`: its references are the operators, its table is whole."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from tests.data.files import photo, write_folder
from wsis.bench import cases, measure, references
from wsis.cli import main
from wsis.ops import pamr, par

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Small sizes and one call each."""

    def once(call, device, budget=0.0):
        call()
        start = time.perf_counter()
        call()
        return measure.Measured(time.perf_counter() - start, 1.0)

    for name, value in {"_SIZE": 40, "CROP": 40, "RANGE": (40, 60), "_CRF": (48, 64)}.items():
        monkeypatch.setattr(cases, name, value)
    monkeypatch.setattr(cases, "measure", once)


def test_the_table_is_whole(quick, tmp_path, capsys):
    write_folder(tmp_path / "data", {f"{k}.jpg": photo(50, 40, seed=k) for k in range(5)})
    out = tmp_path / "bench.json"
    where = ["--root", str(tmp_path / "data"), "--dataset", "folder"]
    assert main(["bench", "--device", "cpu", "--out", str(out), *where]) == 0
    said = capsys.readouterr().out
    content = json.loads(out.read_text())
    names = [row["name"].split(",")[0] for row in content["rows"]]
    assert [name.split(" ")[0] for name in names] == [
        "PAMR", "PAR", "CAM", "confusion", "dense", "loader", "training", "evaluation",
    ]  # fmt: skip
    assert content["device"] == "cpu" and content["versions"]["torch"]
    for row in content["rows"]:
        assert row["name"] in said and row["ms"] > 0 and row["peak_mib"] == 1.0
        against = row["reference"]
        assert (row["ratio"] is None) == (against in ("", "pydensecrf is not installed"))
    step = content["rows"][-2]
    assert list(step["parts"]) == [
        "load", "forward", "CRR", "refine", "losses", "backward", "optimiser",
    ]  # fmt: skip
    assert all(ms > 0 for ms in step["parts"].values())
    assert sum(step["parts"].values()) < 3 * step["ms"]


@pytest.mark.parametrize(("kind", "operator"), [("pamr", pamr), ("par", par)])
def test_references_are_the_operators(kind, operator):
    g = torch.Generator().manual_seed(1)
    image, masks = torch.rand(2, 3, 17, 23, generator=g), torch.rand(2, 3, 17, 23, generator=g)
    expected = operator(image, masks, iterations=3, dilations=(1, 2, 5))
    found = references.refine(image, masks, kind, 3, (1, 2, 5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_result_that_differs_is_not_timed(quick, monkeypatch, capsys):
    monkeypatch.setattr(cases, "pamr", lambda image, masks, **_: masks)
    assert main(["bench", "--device", "cpu"]) == 1
    assert "pamr" in capsys.readouterr().err


def test_measuring_time_and_memory():
    measured = measure.measure(lambda: time.sleep(0.01), CPU, budget=0.05)
    assert 0.01 <= measured.seconds < 0.5
    held = measure.measure(lambda: np.ones(2**23, np.uint8), CPU, budget=0.01)
    assert held.peak_mib is None or 7 < held.peak_mib < 40


def test_mistakes_are_named(tmp_path, capsys):
    assert main(["bench", "--out", str(tmp_path / "absent" / "b.json")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["bench", "--root", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
