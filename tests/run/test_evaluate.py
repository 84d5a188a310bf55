"""What a finished run is good for: evaluate, predict, submit."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.run.conftest import run_twice_at_once
from wsis.cli import main


def test_evaluate_and_predict_with_a_crf(trained, tree, tmp_path, capsys):
    out = tmp_path / "crf"
    assert main(["evaluate", str(trained), "--crf", "irn-label", "--out", str(out)]) == 0
    assert "CRF irn-label;" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["protocol"]["crf"] == "irn-label"
    assert len(list((out / "masks").glob("*.png"))) == 4
    image = tree / "JPEGImages" / "val_000.jpg"
    assert main(["predict", str(trained), str(image), "--out", str(out), "--crf", "irn-label"]) == 0
    with Image.open(out / "val_000.png") as found, Image.open(out / "masks/val_000.png") as want:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(want))
    assert main(["evaluate", str(trained), "--crf", "psaa"]) == 2
    assert "unknown CRF preset 'psaa'" in capsys.readouterr().err
    assert main(["predict", str(trained), str(image), "--crf", "psaa"]) == 2


def test_localization_of_a_run(trained, tree, tmp_path, capsys):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    labels = json.loads((root / "labels.json").read_text())["labels"]
    boxes = {name: [[8, 8, 40, 50, kinds[0]]] for name, kinds in labels.items() if kinds}
    (root / "boxes.json").write_text(json.dumps({"boxes": boxes}))
    arguments = ["evaluate", "wsol", str(trained), "--root", str(root), "--step", "0.01"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "MaxBoxAccV2" in printed and "refined CAM" in printed and "boxes of" in printed
    result = json.loads((tmp_path / "out" / "localization.json").read_text())
    for kind in ("cam", "refined"):
        assert 0 <= result[kind]["MaxBoxAccV2"] <= 100 and 0 < result[kind]["PxAP"] <= 100
        assert result[kind]["images"] == len([name for name in boxes if name.startswith("val")])
    with Image.open(tmp_path / "out" / "localization.png") as picture:
        assert picture.size == (3 * 256, result["cam"]["images"] * 256)
    (root / "boxes.json").unlink()
    assert main(arguments) == 2
    assert "Annotations" in capsys.readouterr().err
    assert main(["evaluate", "wsol"]) == 2
    assert main(["evaluate", "wsol", str(trained), "--metadata", "x"]) == 2


def test_evaluate_repeats_the_numbers(trained, capsys):
    before = json.loads((trained / "metrics.json").read_text())
    assert main(["evaluate", str(trained)]) == 0
    assert "mean IoU" in capsys.readouterr().out
    assert json.loads((trained / "metrics.json").read_text()) == before


def test_evaluate_best_and_masks(trained, tree, capsys):
    folder = trained.parent / "copy"
    shutil.copytree(trained, folder)
    assert main(["evaluate", str(folder), "--weights", "best"]) == 0
    assert "best on val labels" in capsys.readouterr().out
    assert main(["evaluate", "--masks", str(trained / "masks"), "--root", str(tree)]) == 0
    miou = json.loads((trained / "metrics.json").read_text())["scores"]["miou"]
    assert f"{miou:.2f}" in capsys.readouterr().out


def test_predict_writes_masks_and_overlays(trained, tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(trained), str(tree / "JPEGImages"), "--out", str(out)]) == 0
    assert "16 masks" in capsys.readouterr().out
    assert len(list(out.glob("*.png"))) == 16 and len(list(out.glob("*.overlay.jpg"))) == 16
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*"))


@pytest.mark.long
def test_two_processes_evaluate_as_one(trained, tmp_path):
    """The files of one process: figures byte for byte, and every mask; each image once."""
    assert main(["evaluate", str(trained), "--out", str(tmp_path / "one")]) == 0
    done = run_twice_at_once(29519, "evaluate", trained, "--out", tmp_path / "two")
    assert done.stdout.count("report: ") == 1  # one process speaks
    one, two = (sorted((tmp_path / k).rglob("*")) for k in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    for alone, together in zip(one, two, strict=True):
        if alone.suffix in (".json", ".png"):
            assert alone.read_bytes() == together.read_bytes(), alone.name


def test_without_ground_truth_masks_are_predicted_not_scored(trained, tree, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(tree, bare)
    shutil.rmtree(bare / "SegmentationClass")
    assert main(["evaluate", str(trained), "--root", str(bare), "--out", str(tmp_path / "e")]) == 0
    assert "no ground truth" in capsys.readouterr().out
    assert len(list((tmp_path / "e" / "masks").glob("*.png"))) == 4
    assert (tmp_path / "e" / "report.html").exists()
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["scores"]["miou"] is None


def test_some_missing_masks_are_left_out_and_counted(trained, tree, tmp_path):
    partial = tmp_path / "partial"
    shutil.copytree(tree, partial)
    for name in ("train_003", "val_001"):
        (partial / "SegmentationClass" / f"{name}.png").unlink()
    out = tmp_path / "e"
    assert main(["evaluate", str(trained), "--root", str(partial), "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["protocol"]["images"] == 3
    assert metrics["cams"]["protocol"]["images"] == 11
    arguments = ["train", "--config", str(trained / "config.yaml"), "--data.root", str(partial)]
    assert main([*arguments, "--supervision", "masks", "--out", str(tmp_path / "t")]) == 2


def test_other_settings_do_not_touch_the_runs_own_figures(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = (folder / "metrics.json").read_bytes()
    assert main(["evaluate", str(folder), "--background", "0.4"]) == 0
    assert "0.4 (given to wsis evaluate, after training)" in capsys.readouterr().out
    assert (folder / "metrics.json").read_bytes() == before
    assert (folder / "evaluate-1" / "metrics.json").exists()


def test_other_images_do_not_touch_the_runs_own_figures(trained, tree, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    other = tmp_path / "night photos"
    shutil.copytree(tree, other)
    own = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    here = os.path.relpath(tree)  # the run's own folder, spelt in another way
    assert main(["evaluate", str(folder), "--root", here]) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert not list(folder.glob("evaluate*"))
    own[folder / "report.html"] = (folder / "report.html").read_bytes()
    for flags, name in [
        (["--root", str(other)], "evaluate-night photos-1"),
        (["--root", str(other)], "evaluate-night photos-2"),
        (["--root", str(other), "--split", "train"], "evaluate-night photos-train-1"),
        (["--split", "train"], "evaluate-train-1"),
    ]:
        assert main(["evaluate", str(folder), *flags]) == 0
        assert f"report: {folder / name / 'report.html'}" in capsys.readouterr().out
        assert (folder / name / "metrics.json").exists()
        if "train" in name:
            assert "voc train, 12 images" in (folder / name / "report.html").read_text()
            assert "voc val" not in (folder / name / "report.html").read_text()
        assert {path: path.read_bytes() for path in own} == own


def test_evaluate_and_predict_under_a_named_protocol(trained, tree, tmp_path, capsys):
    out = tmp_path / "toco"
    named = ["--protocol", "voc-toco-crf"]
    arguments = ["evaluate", str(trained), *named, "--out", str(out)]
    assert main([*arguments, "--scales", "[1.0,0.5]", "--crf", "none"]) == 0
    name = "protocol: voc-toco-crf with scales 1 0.5, CRF none, 4 images (its list has 1449); "
    text = capsys.readouterr().out
    assert name in text
    assert "flip-sum-max; class gate off; CRF none; image labels not used" in text
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["protocol"]["convention"] == "toco"
    assert stored["cams"]["protocol"]["name"] == ""  # seeds have a protocol of their own
    image = tree / "JPEGImages" / "val_000.jpg"
    assert main(["evaluate", str(trained), *named, "--out", str(out)]) == 0
    assert main(["predict", str(trained), str(image), "--out", str(out), *named]) == 0
    with Image.open(out / "val_000.png") as found, Image.open(out / "masks/val_000.png") as want:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(want))
    capsys.readouterr()
    for words in (["evaluate", "absent"], ["predict", "absent", "x"], ["submit", "absent"]):
        assert main([*words, "--protocol", "voc-tocco"]) == 2
        assert "did you mean 'voc-toco'" in capsys.readouterr().err


def test_submission_of_a_run(trained, tmp_path, capsys):
    out = tmp_path / "submission"
    arguments = ["submit", str(trained), "--split", "val", "--out", str(out)]
    assert main([*arguments, "--protocol", "voc-rtc"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["protocol"]["line"].startswith("voc-rtc with 4 images (its list has 1449); ")
    assert manifest["images"] == 4
    first = (out / "results.tgz").read_bytes()
    folder = out / "results/VOC2012/Segmentation/comp6_test_cls"
    (folder / "val_002.png").unlink()
    kept = folder / "val_001.png"
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    assert main([*arguments, "--protocol", "voc-rtc"]) == 0
    assert "3 masks of the same weights and protocol are there" in capsys.readouterr().out
    assert (out / "results.tgz").read_bytes() == first
    assert kept.stat().st_mtime_ns == before
    assert main(arguments) == 0  # the run's own inference: nothing is kept
    assert "are there" not in capsys.readouterr().out
    assert kept.stat().st_mtime_ns != before


@pytest.mark.parametrize("way", ["own", "file"])
def test_a_submission_goes_on_from_another_folder(trained, tmp_path, capsys, monkeypatch, way):
    out = tmp_path / "submission"
    (tmp_path / "elsewhere").mkdir()
    for here, stay in ((tmp_path, "4 masks"), (tmp_path / "elsewhere", "3 masks of the same")):
        monkeypatch.chdir(here)
        arguments = ["submit", os.path.relpath(trained), "--split", "val", "--out", str(out)]
        if way == "file":
            arguments += ["--weights", os.path.relpath(trained / "weights.safetensors")]
        assert main([*arguments, "--protocol", "voc-rtc"]) == 0
        assert stay in capsys.readouterr().out
        (out / "results/VOC2012/Segmentation/comp6_test_cls/val_002.png").unlink()
    assert json.loads((out / "plan.json").read_text())["run"] == str(trained.resolve())


def test_commands_use_the_threads_of_the_run(trained, tree, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("\nthreads: 1\n", "\nthreads: 3\n"))
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    image = str(tree / "JPEGImages" / "val_000.jpg")
    boxes = tmp_path / "boxes"
    shutil.copytree(tree, boxes)
    names = json.loads((tree / "labels.json").read_text())["labels"]
    found = {name: [[8, 8, 40, 50, kinds[0]]] for name, kinds in names.items() if kinds}
    (boxes / "boxes.json").write_text(json.dumps({"boxes": found}))
    for words in (
        ["evaluate", str(folder), "--out", str(tmp_path / "e")],
        ["evaluate", "wsol", str(folder), "--root", str(boxes), "--out", str(tmp_path / "w")],
        ["predict", str(folder), image, "--out", str(tmp_path / "p")],
        ["predict", str(folder), "--pseudo", "--out", str(tmp_path / "q")],
        ["submit", str(folder), "--split", "val", "--out", str(tmp_path / "s")],
    ):
        given.clear()
        assert main(words) == 0
        assert given == [3], words


def test_predict_never_overwrites_a_photograph(trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (32, 24)).save(photos / "a.png")
    assert main(["predict", str(trained), str(photos), "--out", str(photos)]) == 2
    assert "a.png is one of the images" in capsys.readouterr().err
    Image.new("RGB", (32, 24)).save(photos / "a.jpg")
    assert main(["predict", str(trained), str(photos), "--out", str(tmp_path / "out")]) == 2
    assert "both become a.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
