"""The second stage: pseudo masks of a first run, a segmentation network on them, its evaluation."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.run.conftest import TINY
from wsis.cli import main
from wsis.commands.train import load_config
from wsis.data import dataset as data_sets
from wsis.data.loader import make_loader
from wsis.engine.check import check
from wsis.engine.trainer import Trainer
from wsis.errors import InputError
from wsis.evaluate.run_masks import make_pseudo_masks
from wsis.evaluate.trained import load_model
from wsis.recipes import get_recipe

SECOND = {
    "--model.head": "deeplabv1",
    "--predict.gate": "false",
    "--predict.fuse": "logits",
    "--predict.background_power": "1",
    "--data.hsv": "[10,10,10]",
    "--data.resize_scale": "[0.5,1.5]",
    "--optim.steps": "7",
}


@pytest.fixture(scope="module")
def first(tree, tmp_path_factory):
    """A finished first stage and its pseudo masks."""
    base = tmp_path_factory.mktemp("stages")
    path = base / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "root": str(tree)}}))
    flags = ["--optim.epochs", "2", "--quality_images", "0", "--report_images", "0"]
    assert main(["train", "--config", str(path), "--out", str(base / "first"), *flags]) == 0
    out = ["--pseudo", "--out", str(base / "masks")]
    assert main(["predict", str(base / "first"), *out]) == 0
    return base


@pytest.fixture(scope="module")
def second(first):
    """A finished second stage on those masks."""
    arguments = ["train", "--config", str(first / "tiny.yaml"), "--out", str(first / "second")]
    arguments += ["--supervision", "pseudo", "--masks", str(first / "masks")]
    assert main([*arguments, *(word for pair in SECOND.items() for word in pair)]) == 0
    return first / "second"


def weights(folder) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def test_masks_are_those_of_the_labels(first, tree):
    labels = json.loads((tree / "labels.json").read_text())["labels"]
    names = [path.stem for path in (first / "masks").glob("*.png")]
    assert sorted(names) == sorted(name for name in labels if name.startswith("train"))
    for name in names:
        with Image.open(first / "masks" / f"{name}.png") as mask:
            assert set(np.unique(np.asarray(mask))) <= {0, 255, *labels[name]}


def test_the_run_counts_steps_and_is_evaluated(second):
    lines = (second / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 8))
    last = json.loads(lines[-1])
    assert set(last) >= {"seg", "total"} and "cls" not in last and last["seg"] == last["total"]
    assert last["epoch"] == 3  # of three steps each
    metrics = json.loads((second / "metrics.json").read_text())
    assert metrics["protocol"]["images"] == 4
    assert metrics["cams"] is None and metrics["curve"] is None
    line = metrics["protocol"]["line"]
    assert "with flip, logits; class gate off; CRF none; image labels not used" in line
    assert "background the decoder's own;" in line


def test_the_report_shows_no_cam(first, second):
    page = (second / "report.html").read_text()
    assert "prediction</figcaption>" in page and "learnt from masks" in page
    assert "CAM</figcaption>" not in page and "pseudo mask</figcaption>" not in page


def test_masks_are_the_argmax_of_the_mean_logits(second, tree):
    from wsis.data.augment import normalize

    config = load_config(second / "config.yaml")
    model = load_model(config, second, 6)
    with Image.open(tree / "JPEGImages" / "val_001.jpg") as image:
        x = normalize(image.convert("RGB"), model.backbone.mean, model.backbone.std)[None]
    with torch.inference_mode():
        plain, mirrored = (
            torch.nn.functional.interpolate(
                model(view).logits, x.shape[-2:], mode="bilinear", align_corners=True
            )
            for view in (x, x.flip(-1))
        )
    expected = (plain + mirrored.flip(-1))[0].argmax(0).numpy()
    with Image.open(second / "masks" / "val_001.png") as found:
        assert (np.asarray(found) == expected).mean() > 0.999


def test_evaluate_predict_and_submit_a_second_stage(second, tree, tmp_path, capsys):
    before = json.loads((second / "metrics.json").read_text())
    assert main(["evaluate", str(second)]) == 0
    assert json.loads((second / "metrics.json").read_text()) == before
    out = str(tmp_path / "e")
    assert main(["evaluate", str(second), "--background", "0.3", "--out", out]) == 0
    assert "background 0.3 (given to wsis evaluate" in capsys.readouterr().out
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["curve"] is not None
    image = tree / "JPEGImages" / "val_000.jpg"
    assert main(["predict", str(second), str(image), "--out", str(tmp_path / "p")]) == 0
    ours, theirs = tmp_path / "p" / "val_000.png", second / "masks" / "val_000.png"
    assert ours.read_bytes() == theirs.read_bytes()
    flags = ["--split", "val", "--out", str(tmp_path / "s")]
    assert main(["submit", str(second), *flags]) == 0
    assert (tmp_path / "s" / "results.tgz").exists()
    assert main(["evaluate", str(second), "--protocol", "voc-rtc"]) == 2
    assert "a class gate does not go with it" in capsys.readouterr().err
    assert main(["evaluate", "wsol", str(second)]) == 2
    assert "without CAMs" in capsys.readouterr().err
    assert main(["predict", str(second), "--pseudo", "--out", str(tmp_path / "c")]) == 2
    assert "give --pseudo decoder" in capsys.readouterr().err
    assert main(["predict", str(second), "--pseudo", "decoder", "--out", str(tmp_path / "c")]) == 0
    assert len(list((tmp_path / "c").glob("*.png"))) == 12


def test_pseudo_masks_of_the_cams_leave_pixels_unsure(first, tmp_path, capsys):
    out = ["--out", str(tmp_path / "cam")]
    flags = ["--pseudo", *out]
    assert main(["predict", str(first / "first"), *flags]) == 0
    assert "12 pseudo masks written" in capsys.readouterr().out
    assert main(["predict", str(first / "first"), *flags]) == 0
    assert "0 pseudo masks written" in capsys.readouterr().out
    values = [np.unique(np.asarray(Image.open(p))) for p in (tmp_path / "cam").glob("*.png")]
    assert 255 in np.concatenate(values)
    assert main(["predict", str(first / "first"), "--pseudo", "decoder", *out]) == 2
    assert "other source" in capsys.readouterr().err
    assert main(["predict", str(first / "first"), *out]) == 2
    assert "either images or --pseudo" in capsys.readouterr().err


def test_a_decoder_of_objects_has_no_masks_of_classes(first, tmp_path):
    config = load_config(first / "first" / "config.yaml")
    config.model.decoder = "object"
    arguments = {"source": "decoder", "crf": "none", "weights": "last"}
    with pytest.raises(InputError, match="trained to localize"):
        make_pseudo_masks(config, first / "first", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_ground_truth_is_never_opened(first, second, tree, tmp_path, monkeypatch):
    """Neither by the check before training nor in it; the result is the same without any."""
    bare = tmp_path / "bare"
    shutil.copytree(tree, bare)
    shutil.rmtree(bare / "SegmentationClass")
    config = load_config(second / "config.yaml")
    opened = []

    def read_mask(path):
        opened.append(path)
        return read(path)

    read = data_sets.read_mask
    monkeypatch.setattr(data_sets, "read_mask", read_mask)
    Trainer(config, tmp_path / "with", resume=False).run()
    config.data.root = str(bare)
    Trainer(config, tmp_path / "without", resume=False).run()
    assert opened and {path.parent for path in opened} == {first / "masks"}
    assert weights(tmp_path / "with") == weights(tmp_path / "without") == weights(second)


@pytest.mark.parametrize("head", ["deeplabv1", "deeplabv2"])
def test_an_interrupted_run_ends_bit_identical(first, second, tmp_path, monkeypatch, head):
    config = load_config(second / "config.yaml")
    config.model.head = head
    config.save_every = 2
    Trainer(config, tmp_path / "straight", resume=False).run()
    folder = tmp_path / "broken"
    for stop in (2, 5):  # in the middle of an epoch, of three steps
        trainer = Trainer(config, folder, resume=True)
        step = trainer._train_step

        def dies(batch, epoch, trainer=trainer, step=step, stop=stop):
            if trainer.step == stop:
                raise KeyboardInterrupt
            return step(batch, epoch)

        monkeypatch.setattr(trainer, "_train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    resumed = Trainer(config, folder, resume=True)
    assert resumed.step == 4
    assert resumed.run().finished
    assert weights(folder) == weights(tmp_path / "straight")
    assert (folder / "log.jsonl").read_text() == (tmp_path / "straight" / "log.jsonl").read_text()
    assert (folder / "metrics.csv").read_text() == (
        tmp_path / "straight" / "metrics.csv"
    ).read_text()


def test_other_masks_do_not_resume(first, second, tmp_path):
    folder, masks = tmp_path / "run", tmp_path / "masks"
    shutil.copytree(second, folder)
    shutil.copytree(first / "masks", masks)
    config = load_config(second / "config.yaml")
    config.data.masks = str(masks)
    Trainer(config, folder, resume=True)  # the same masks elsewhere
    with Image.open(masks / "train_000.png") as image:
        values = np.array(image)
    values[0, 0] = 255
    Image.fromarray(values).save(masks / "train_000.png")
    with pytest.raises(InputError, match="another configuration, data set or masks"):
        Trainer(config, folder, resume=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--supervision", "pseudo"], "needs the masks of a first stage"),
        (["--masks", "x"], "data.masks goes with supervision pseudo only"),
        (["--supervision", "pseudo", "--masks", "x"], "--model.head deeplabv1"),
        (["--model.head", "deeplabv1"], "learns from masks"),
        (["--recipe", "deeplab_lite0", "--masks", "absent"], "absent: no such folder"),
        (["--recipe", "deeplab_lite0", "--masks", "x", "--predict.gate", "true"], "predict.gate"),
        (["--recipe", "deeplab_lite0", "--masks", "x", "--optim.batch_size", "1"], "two images"),
        (["--recipe", "deeplab_lite0", "--masks", "x", "--data.hsv", "[10,10,256]"], "data.hsv"),
        (["--optim.steps", "-1"], "optim.steps must be at least 0"),
    ],
)
def test_mistakes(tree, tmp_path, capsys, flags, message):
    out = ["--data.root", str(tree), "--data.dataset", "voc", "--out", str(tmp_path / "run")]
    assert main(["train", *flags, *out]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_missing_mask_is_said_before_training(first, tmp_path, capsys):
    masks = tmp_path / "masks"
    shutil.copytree(first / "masks", masks)
    (masks / "train_007.png").unlink()
    flags = ["--supervision", "pseudo", "--masks", str(masks), "--out", str(tmp_path / "run")]
    flags += [word for pair in SECOND.items() for word in pair]
    assert main(["train", "--config", str(first / "tiny.yaml"), *flags]) == 2
    assert "have no mask, the first is train_007.png" in capsys.readouterr().err


def test_dali_has_no_shifts_in_hsv(tree):
    data = data_sets.open_dataset("voc", tree, "train")
    usual = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "jitter": (0.0,) * 4, "flip": 0.5, "seed": 1}
    options = {**usual, "batch_size": 2, "crop": 48, "resize_long": (48, 64), "hsv": (10, 0, 0)}
    with pytest.raises(InputError, match="'dali' has no shifts in HSV"):
        make_loader("dali", data, **options)
    assert make_loader("auto", data, device="cuda:0", **options).kind == "torch"


@pytest.mark.parametrize("name", ["deeplabv1_voc_wr38", "deeplabv2_voc_r101", "deeplab_lite0"])
def test_recipes_are_possible_and_the_papers(name):
    config = get_recipe(name)
    config.data.masks = "masks"
    check(config, 1)
    assert (config.optim.momentum, config.optim.weight_decay, config.optim.power) == (
        0.9,
        5e-4,
        0.9,
    )
    assert config.data.hsv == (10, 10, 10) and config.data.flip == 0.5
    if name == "deeplab_lite0":
        return
    assert (config.optim.lr, config.optim.steps, config.optim.batch_size) == (0.001, 20_000, 10)
    assert (config.data.crop, config.data.resize_scale) == (448, (0.5, 1.5))
    assert config.data.jitter == (0.0, 0.0, 0.0, 0.0)
    assert config.predict.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) and config.predict.flip
