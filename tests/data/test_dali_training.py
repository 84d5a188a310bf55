"""A run whose batches come from DALI, straight and stopped and resumed."""

from __future__ import annotations

import json
import os

import pytest
import torch
import yaml

if "dali" not in os.environ.get("WSIS_REQUIRE", "").split(","):
    pytest.importorskip("nvidia.dali")

from tests.run.conftest import TINY, write_tree
from wsis.commands.train import load_config
from wsis.engine.about import identity
from wsis.engine.trainer import Trainer


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("dali") / "tree")


def tiny(tree, folder, **data):
    folder.mkdir(parents=True, exist_ok=True)
    values = {**TINY, "data": {**TINY["data"], "root": str(tree), **data}, "save_every": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "config.yaml")


def train(config, folder, monkeypatch, stop: int | None = None) -> bytes:
    """Train on from what is in the folder; with `stop`, die before that step."""
    trainer = Trainer(config, folder, resume=True)
    assert trainer.loader.kind == config.data.loader
    step = trainer._train_step

    def mortal(batch, epoch):
        if trainer.step == stop:
            raise KeyboardInterrupt
        return step(batch, epoch)

    monkeypatch.setattr(trainer, "_train_step", mortal)
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        return b""
    assert trainer.run().finished
    return (folder / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        return train(tiny(tree, folder, loader="dali"), folder, patch)


STOPS = [(1, 0), (5, 2)]
MORE = [(s, w) for s in (2, 3, 4, 6, 7, 8) for w in (0, 1, 3)]


@pytest.mark.parametrize(
    ("stop", "workers"), [*STOPS, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]
)
def test_resumed_is_straight_bit_for_bit(tree, straight, tmp_path, monkeypatch, stop, workers):
    train(tiny(tree, tmp_path, loader="dali"), tmp_path, monkeypatch, stop)
    resumed = tiny(tree, tmp_path, loader="dali", workers=workers)
    assert train(resumed, tmp_path, monkeypatch) == straight


def test_a_run_may_go_on_with_the_other_loader(tree, straight, tmp_path, monkeypatch):
    ours, theirs = (tiny(tree, tmp_path, loader=kind) for kind in ("dali", "torch"))
    train(ours, tmp_path, monkeypatch, 4)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["loader"] == "dali"
    train(theirs, tmp_path, monkeypatch)
    data = Trainer(theirs, tmp_path, resume=True).train_set
    assert identity(ours, data) == identity(theirs, data) == about["identity"]
    assert torch.isfinite(
        torch.tensor(json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["total"])
    )
