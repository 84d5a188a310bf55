"""A run whose training list has unreadable files."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.run.conftest import TINY, run, write_tree
from wsis.cli import main
from wsis.commands.train import load_config
from wsis.engine.about import identity
from wsis.engine.trainer import Trainer


@pytest.fixture
def damaged(tmp_path):
    """Fourteen training images of which two are bad, and the configuration of a run on them."""
    tree = write_tree(tmp_path / "tree", train=14)
    for k in (3, 9):
        image = tree / "JPEGImages" / f"train_{k:03d}.jpg"
        image.write_bytes(image.read_bytes()[:300])
    values = {**TINY, "data": {**TINY["data"], "root": str(tree), "on_error": "skip"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**values, "save_every": 1}))
    return path


def test_skip_trains_evaluates_and_says_what_is_missing(damaged, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--config", str(damaged), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "left out 2 of 14 training images" in said
    assert "train_003.jpg" in said and "train_009.jpg" in said
    about = json.loads((out / "about.json").read_text())
    assert (about["on_error"], about["train"]["images"]) == ("skip", 12)
    assert about["quarantine"] == json.loads((out / "quarantine.json").read_text())
    assert [bad["image"] for bad in about["quarantine"]["bad"]] == ["train_003", "train_009"]
    assert len((out / "log.jsonl").read_text().splitlines()) == 9  # 3 epochs of 12 / 4 steps
    # The CAMs of the training images are scored too: of those that can be read.
    assert json.loads((out / "metrics.json").read_text())["cams"]["cam"]["best_miou"] > 0
    # And pseudo masks are made of those.
    masks = tmp_path / "masks"
    assert main(["predict", str(out), "--pseudo", "--out", str(masks)]) == 0
    names = {path.stem for path in masks.glob("*.png")}
    assert len(names) == 12 and not names & {"train_003", "train_009"}


def test_a_killed_run_resumes_with_its_list(damaged, tmp_path, monkeypatch):
    config = load_config(damaged)
    Trainer(config, tmp_path / "straight", resume=True).run()
    trainer = Trainer(config, tmp_path / "killed", resume=True)
    step = trainer._train_step

    def mortal(batch, epoch):
        if trainer.step == 4:
            raise KeyboardInterrupt
        return step(batch, epoch)

    monkeypatch.setattr(trainer, "_train_step", mortal)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    monkeypatch.setattr("wsis.engine.quarantine.unreadable", None)  # it would be called
    resumed = Trainer(config, tmp_path / "killed", resume=True)
    assert resumed.step == 4
    resumed.run()
    ends = [tmp_path / name / "weights.safetensors" for name in ("straight", "killed")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_identity_follows_the_images_that_are_left(damaged, tmp_path):
    config = load_config(damaged)
    trainer = Trainer(config, tmp_path / "run", resume=False)
    assert len(trainer.train_set) == 12
    assert trainer.identity == identity(config, trainer.train_set)
    assert trainer.identity != identity(config, trainer.train_set.base)
    config.data.labels = "elsewhere.json"  # what it holds is in the fingerprint
    assert trainer.identity == identity(config, trainer.train_set)


def test_a_run_with_a_cache_is_the_run_without(damaged, tmp_path):
    config = load_config(damaged)
    plain = Trainer(config, tmp_path / "plain", resume=False)
    plain.run()
    config.data.cache, config.data.workers = str(tmp_path / "cache"), 1
    stored = Trainer(config, tmp_path / "stored", resume=False)
    assert stored.identity == plain.identity and len(stored.train_set) == 12
    stored.run()
    ends = [tmp_path / name / "weights.safetensors" for name in ("plain", "stored")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.long
def test_two_processes_leave_out_the_same(damaged, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("train", "--config", damaged, "--out", one).returncode == 0
    done = run("train", "--config", damaged, "--out", two, "--gpus", 2)
    assert done.returncode == 0, done.stderr
    assert (one / "quarantine.json").read_text() == (two / "quarantine.json").read_text()
    assert len((two / "log.jsonl").read_text().splitlines()) == 9
