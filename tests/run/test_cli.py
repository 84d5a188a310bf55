"""A user's mistake is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from wsis.cli import main


def fails(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" or captured.out.startswith("usage")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--optm.lr", "1"], "did you mean 'optim.lr'"),
        (["train", "--data.crpo", "64"], "did you mean 'data.crop'"),
        (["train", "--data.crop", "many"], "data.crop"),
        (["train", "--recipe", "nope"], "known recipes: deeplab"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "--resume", "maybe"], "--resume must be"),
        (["train", "--data.dataset", "voc", "--data.root", "absent"], "absent"),
        (["train", "--model.backbone", "resnet51", "--out", "unused"], "resnet5"),
        (["train", "--device", "cuda:7", "--out", "unused"], "--device cpu"),
        (["train", "--device", "gpu", "--out", "unused"], "--device auto"),
        (["train", "--optim.accumulate", "3", "--out", "unused"], "multiple of"),
        (["train", "--validate_every", "0", "--out", "unused"], "validate_every must be at least"),
        (["train", "--optim.epochs", "0", "--out", "unused"], "optim.epochs must be at least"),
        (["train", "--data.jitter", "[0,0,0,0.7]", "--out", "unused"], "hue"),
        (["train", "--model.freeze_bn", "true", "--out", "unused"], "model.weights is 'none'"),
        (["train", "--optim.amp", "fp16", "--device", "cpu", "--out", "unused"], "needs a GPU"),
        (["train", "--data.root", "photos"], "'scenes' is built in"),
        (["train", "--data.labels", "x.json"], "data.labels goes with"),
        (["train", "--predict.crf", "psaa"], "unknown CRF preset 'psaa'"),
        (["train", "--predict.fuse", "max"], "unknown fuse rule 'max'"),
        (["train", "--predict.fuse", "flip-sum-max"], "class gate goes with fuse 'mean'"),
        (["train", "--predict.convention", "coco"], "unknown convention 'coco'"),
        (["evaluate"], "either a run folder or --masks"),
        (["evaluate", "absent"], "not a run folder"),
        (["predict", "absent", "x.jpg"], "not a run folder"),
        (["refine", "absent", "also_absent"], "no such folder"),
        (["refine", "images"], "maps"),
        (["data", "chekc"], "usage"),
        (["data", "check", "--dataset", "voc", "--root", "absent"], "absent"),
        (["convert", "absent.pth", "out.safetensors"], "absent.pth"),
        (["convert", "absent.pth", "out.pth"], ".safetensors"),
        (["doctor", "--all"], "no options"),
        (
            ["evaluate", "--masks", "m", "--weights", "best"],
            "--weights goes with a run folder only",
        ),
        (["evaluate", "--masks", "m", "--device", "cpu"], "--device goes with a run folder only"),
        (["evaluate", "x", "--scales", "big"], "scales: expected list, got big; see"),
        (
            ["predict", "x", "--pseudo", "sure"],
            "pseudo: expected one of 'cam', 'decoder', got sure",
        ),
        (["submit", "x", "--competition", "7"], "competition: expected one of 5, 6, got 7"),
        (["data", "check", ".", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["submit"], "either a run folder or --masks"),
        (["evaluate", "broken"], "broken/config.yaml: Group 'optim'"),
        (["evaluate", "object", "--protocol", "voc-rtc"], "wsis evaluate wsol"),
        (["evaluate", "object", "--background", "7"], "background must be a score in [0, 1]"),
        (["predict", "object", "x.jpg", "--workers", "-1"], "--workers must be 0 or more"),
        (["submit", "object", "--workers", "-1"], "--workers must be 0 or more"),
    ],
)
def test_mistakes(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, text in (
        ("broken", "optim: {lerning_rate: 1}"),
        ("object", "model: {decoder: object}"),
    ):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text(text)
    assert expected in fails(arguments, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_unknown_key_in_a_file(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lerning_rate: 1}\n")
    assert "lerning_rate" in fails(["train", "--config", str(path)], capsys)


@pytest.mark.parametrize("words", [["doctor"], ["data"], ["evaluate"], ["predict"], ["submit"]])
def test_help_of_commands(words, capsys):
    try:
        code = main([*words, "--help"])
    except SystemExit as end:  # argparse ends so
        code = end.code
    assert code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: wsis {words[0]}")
    assert "null" not in text.split("\n\n", 1)[1].replace("{true,false,null}", "")


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_print_config_is_a_config(tmp_path):
    line = [sys.executable, "-m", "wsis", "train"]
    printed = subprocess.run(
        [*line, "--recipe", "rtc_voc_wr38", "--optim.lr", "0.5", "--print_config"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    values = yaml.safe_load(printed)
    assert values["optim"]["lr"] == 0.5
    assert values["optim"]["momentum"] == 5e-4
    assert values["data"]["crop"] == 448
    assert values["loss"]["background_prototype"] == "ties"
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    again = subprocess.run(
        [*line, "--config", str(path), "--print_config"], capture_output=True, text=True, check=True
    ).stdout
    assert yaml.safe_load(again) == values


def test_data_show_and_check(tmp_path, capsys):
    assert (
        main(
            [
                "data",
                "show",
                "--dataset",
                "scenes",
                "--out",
                str(tmp_path / "s.png"),
                "--count",
                "3",
            ]
        )
        == 0
    )
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert not list(tmp_path.glob(".*"))
