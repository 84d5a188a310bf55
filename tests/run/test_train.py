"""A whole run: trained in every variant, alone and in two processes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.run.conftest import run, run_twice_at_once, write_tree
from wsis.cli import main
from wsis.commands.train import load_config
from wsis.engine.trainer import NonFiniteError, Trainer


def weights(folder) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def test_a_run_leaves_all_it_promises(trained, tree):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 <= metrics["scores"]["miou"] <= 100
    assert metrics["cams"]["refined"]["best_miou"] > 0
    report = (trained / "report.html").read_text()
    assert "refined CAM" in report
    assert "<script src" not in report and "http://" not in report.replace("http://www.w3.org", "")
    masks = sorted((trained / "masks").glob("*.png"))
    assert len(masks) == 4
    with Image.open(masks[0]) as mask:
        assert mask.mode == "P" and mask.size == (64, 64)
        assert set(np.unique(mask)) <= set(range(7))
    about = json.loads((trained / "about.json").read_text())
    assert about["versions"]["torch"] and about["train"]["images"] == 12
    assert load_config(trained / "config.yaml").data.root == str(tree)
    rows = (trained / "log.jsonl").read_text().splitlines()
    assert len(rows) == 9
    terms = {"cls", "er", "ecr", "min_pool", "com", "ctr_intra", "total"}
    assert terms <= json.loads(rows[0]).keys()
    assert "seg" not in json.loads(rows[2]) and "seg" in json.loads(rows[3])


def test_contrast_waits_for_its_epoch(trained, tmp_path):
    arguments = ["train", "--config", str(trained / "config.yaml"), "--out", str(tmp_path / "run")]
    flags = ["--loss.contrast_start", "0.34", "--quality_images", "0", "--report_images", "0"]
    assert main([*arguments, *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["com" in row for row in rows] == [False] * 3 + [True] * 6


def test_worker_count_does_not_change_the_result(trained, tmp_path):
    config = trained / "config.yaml"
    assert (
        main(
            [
                "train",
                "--config",
                str(config),
                "--out",
                str(tmp_path / "w"),
                "--data.workers",
                "2",
                "--quality_images",
                "0",
                "--report_images",
                "0",
            ]
        )
        == 0
    )
    assert weights(tmp_path / "w") == weights(trained)


def test_training_reads_no_mask(trained, tree, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tree, bare)
    shutil.rmtree(bare / "SegmentationClass")
    config = trained / "config.yaml"
    assert (
        main(
            [
                "train",
                "--config",
                str(config),
                "--out",
                str(tmp_path / "run"),
                "--data.root",
                str(bare),
            ]
        )
        == 0
    )
    assert weights(tmp_path / "run") == weights(trained)


def test_non_finite_loss_leaves_the_weights_untouched(trained, tmp_path, monkeypatch):
    config = load_config(trained / "config.yaml")
    trainer = Trainer(config, tmp_path / "nan", resume=False)
    trainer.model.train()
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    batch = next(trainer.loader.epoch(0))
    batch.image[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="train_"):
        trainer._train_step(batch, 0)
    after = trainer.model.state_dict()
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in parameters)


def test_accumulated_parts_are_one_batch(trained, tmp_path):
    config = load_config(trained / "config.yaml")
    config.optim.accumulate = 2
    trainer = Trainer(config, tmp_path / "parts", resume=False)
    parts = list(trainer._parts(next(trainer.loader.epoch(0))))
    assert [len(part.image) for part in parts] == [2, 2]
    assert trainer.run().finished


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.crr", "false"],
        ["--loss.ctr", "0", "--loss.com", "0"],
        ["--loss.com", "0"],
        ["--supervision", "masks"],
        ["--optim.amp", "bf16", "--optim.ema", "0"],
        ["--optim.name", "adamw", "--optim.lr", "0.001"],
    ],
)
def test_ladder_and_variants_train(trained, tmp_path, flags):
    config = trained / "config.yaml"
    arguments = [
        "train",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "run"),
        *flags,
        "--optim.epochs",
        "1",
        "--pseudo.start",
        "0",
        "--quality_images",
        "2",
    ]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(record["total"]) and "seg" in record


def test_a_used_folder_is_not_overwritten(trained, capsys):
    arguments = ["train", "--config", str(trained / "config.yaml"), "--out", str(trained)]
    assert main(arguments) == 2
    assert "--resume auto" in capsys.readouterr().err


def test_two_processes_train_and_end_together(trained, tmp_path):
    config, out = trained / "config.yaml", tmp_path / "ddp"
    flags = ["--optim.epochs", "1", "--quality_images", "0", "--report_images", "0"]
    done = run("train", "--config", config, "--out", out, "--gpus", "2", *flags)
    assert done.returncode == 0, done.stderr
    assert "2 processes: global batch 4, 2 images each" in done.stdout
    assert (out / "weights.safetensors").exists()
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    flags = ["--out", str(tmp_path / "x"), "--gpus", "0"]
    assert main(["train", "--config", str(config), *flags]) == 2


def test_two_processes_train_the_supervised_twin(trained, tmp_path):
    flags = ["--supervision", "masks", "--optim.epochs", "2", "--report_images", "0"]
    config, out = trained / "config.yaml", tmp_path / "ddp"
    done = run_twice_at_once(29518, "train", "--config", config, "--out", out, *flags)
    assert "2 processes: global batch 4, 2 images each" in done.stdout
    assert json.loads((tmp_path / "ddp" / "metrics.json").read_text())["cams"] is None


@pytest.mark.parametrize(
    "flags", [["--data.view2_flip", "true"], ["--predict.background_power", "3"]]
)
def test_reconstructions_are_options(trained, tmp_path, flags):
    arguments = ["train", "--config", str(trained / "config.yaml"), "--out", str(tmp_path / "run")]
    assert main([*arguments, *flags, "--optim.epochs", "1", "--report_images", "0"]) == 0


def test_unreadable_image_names_the_file(tmp_path, tiny):
    root = write_tree(tmp_path / "broken", train=4, val=4)
    victim = root / "JPEGImages" / "train_002.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    done = run(
        "train",
        "--config",
        tiny,
        "--data.root",
        root,
        "--out",
        tmp_path / "run",
        "--data.workers",
        "1",
    )
    assert done.returncode == 2
    assert "train_002.jpg" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 400
