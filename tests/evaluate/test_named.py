"""Protocols by name: what they fix, what is said where something departs, and the commands."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from PIL import Image

from tests.offline.fakes import ColourModel, painted
from wsis.cli import main
from wsis.config import PredictConfig
from wsis.errors import InputError
from wsis.evaluate.conventions import CONVENTIONS
from wsis.evaluate.named import (
    CAM_NAMED,
    LIST_LENGTHS,
    NAMED,
    SWEPT,
    configure,
    departures,
    get_protocol,
    table,
)
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.segmentation import THRESHOLDS, evaluate_segmentation
from wsis.offline.crf import check_preset
from wsis.offline.fuse import check_fuse
from wsis.offline.masks import write_mask


@pytest.mark.parametrize("name", NAMED)
def test_what_a_protocol_names_is_there(name):
    protocol = NAMED[name].protocol
    assert protocol.name == name
    assert protocol.convention in CONVENTIONS
    assert check_fuse(protocol.fuse, gate=protocol.gate)
    assert protocol.images == LIST_LENGTHS[protocol.dataset, protocol.split]
    assert protocol.crf == "none" or check_preset(protocol.crf)
    assert name.endswith("-crf") == (protocol.crf != "none")
    assert departures(protocol) == ()
    assert protocol.describe().startswith(f"{name}; predicted masks; ")
    # What a configuration keeps of it makes the same prediction.
    config = PredictConfig(scales=(3.0,), flip=False, gate=True, class_cut=0.5, crf="psa")
    assert configure(config, name) == protocol
    settings = {k: v for k, v in asdict(config).items() if k != "convention"}
    assert protocol.prediction() == settings
    assert {f.name for f in fields(PredictConfig)} <= {f.name for f in fields(Protocol)}


def test_the_papers_figures():
    toco, coco = NAMED["voc-toco-crf"].protocol, NAMED["coco-toco"].protocol
    assert (toco.scales, toco.fuse, toco.crf) == ((1.0, 1.5, 1.25), "flip-sum-max", "toco")
    assert (coco.fuse, coco.images, coco.convention) == ("flip-max-sum", 40137, "toco")
    stage = NAMED["voc-1stage-crf"].protocol
    assert stage.scales == (1.0, 0.5, 1.5, 2.0)
    assert (stage.background_power, stage.class_cut, stage.crf) == (3, 0.1, "psa")
    assert "1024" in NAMED["voc-1stage"].differs
    rtc = NAMED["voc-rtc-crf"].protocol
    assert (rtc.gate, rtc.background, rtc.crf, rtc.convention) == (True, 0.17, "irn-label", "rtc")
    assert (NAMED["voc-afa"].protocol.base_long, CAM_NAMED["voc-irn"].protocol.background) == (
        512,
        0.15,
    )
    assert SWEPT == f"{THRESHOLDS[0]:g} to {THRESHOLDS[-1]:g} in steps of {THRESHOLDS[1]:g}"


def test_departures_are_named():
    official = get_protocol("voc-toco")
    assert departures(replace(official, scales=(1.0, 0.5), flip=False, crf="toco")) == (
        "scales 1 0.5",
        "no flip",
        "CRF toco",
    )
    constant = replace(official, background_power=None, background=0.3, images=201)
    assert departures(constant) == ("background 0.3", "201 images (its list has 1449)")
    moved = replace(official, split="train", convention="voc", ground_truth="SegmentationClassAug")
    assert departures(moved) == ("convention voc", "list voc train")
    assert departures(replace(official, ground_truth="mine")) == ("ground truth mine",)
    line = replace(official, changes=("scales 1 0.5", "no flip")).describe()
    assert line.startswith("voc-toco with scales 1 0.5, no flip; ")
    stored = replace(official, scales=(), background=None, crf="psa")
    assert departures(stored) == ()  # of stored masks nobody knows how they were made


def test_unknown_names():
    with pytest.raises(InputError, match=r"'voc-tocco' \(did you mean 'voc-toco'\?\)"):
        get_protocol("voc-tocco")
    with pytest.raises(InputError, match="'voc-irn' for masks; it goes with wsis evaluate cam"):
        get_protocol("voc-irn")
    with pytest.raises(InputError, match="'voc-toco' for CAMs; it goes with wsis evaluate;"):
        get_protocol("voc-toco", cams=True)


@pytest.mark.parametrize("name", ["voc-toco-crf", "voc-afa", "voc-1stage", "voc-deeplab"])
def test_numbers_carry_the_name(name, tmp_path):
    data = painted(tmp_path / "data")
    protocol = replace(NAMED[name].protocol, scales=(1.0, 0.5))
    result = evaluate_segmentation(ColourModel(), data, protocol=protocol)
    assert result["protocol"]["name"] == name
    assert result["protocol"]["changes"] == [
        "scales 1 0.5",
        "list folder val",
        "ground truth masks",
    ]
    assert result["protocol"]["line"].startswith(f"{name} with scales 1 0.5, list folder val, ")
    assert result["scores"]["miou"] > 60
    json.dumps(result, allow_nan=False)


def test_list_of_protocols(capsys):
    assert main(["evaluate", "--list_protocols"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == table()
    for name, entry in (NAMED | CAM_NAMED).items():
        assert f"\n{name} " in text
        assert entry.source in text
    assert "1 1.5 1.25 +flip" in text


@pytest.fixture
def voc(tmp_path):
    """A devkit with two labelled val images, and masks that miss one object."""
    root = tmp_path / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    (root / "labels.json").write_text(
        json.dumps(
            {
                "classes": {"3": "bird", "8": "cat"},
                "labels": {"2007_000033": [3], "2007_000042": [8]},
            }
        )
    )
    for index, name in enumerate(("2007_000033", "2007_000042")):
        Image.new("RGB", (8, 6)).save(root / "JPEGImages" / f"{name}.jpg")
        mask = np.zeros((6, 8), np.uint8)
        mask[:3, :4] = index + 1
        write_mask(root / "SegmentationClass" / f"{name}.png", mask, (3, 8))
        write_mask(tmp_path / "masks" / f"{name}.png", mask * (index == 0), (3, 8))
        maps = {0: np.asarray(mask > 0, np.float32) * 0.4}
        (tmp_path / "cams").mkdir(exist_ok=True)
        np.save(tmp_path / "cams" / f"{name}.npy", {k + index: v for k, v in maps.items()})
    for split in ("train", "val"):
        names = "2007_000033\n2007_000042\n"
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    return root


def test_stored_masks(voc, tmp_path, capsys):
    arguments = ["evaluate", "--masks", str(tmp_path / "masks"), "--root", str(voc)]
    assert main([*arguments, "--protocol", "voc-toco"]) == 0
    out = capsys.readouterr().out
    assert "protocol: voc-toco with 2 images (its list has 1449); stored masks; voc val" in out
    assert "mean IoU as toco" in out
    assert main([*arguments, "--protocol", "voc-toco", "--convention", "voc"]) == 0
    assert "voc-toco with convention voc, 2 images" in capsys.readouterr().out
    assert main([*arguments, "--protocol", "voc-tco"]) == 2
    assert "did you mean 'voc-toco'" in capsys.readouterr().err


def test_stored_cams(voc, tmp_path, capsys):
    arguments = ["evaluate", "cam", str(tmp_path / "cams"), "--root", str(voc), "--pictures", "0"]
    out = tmp_path / "out"
    assert main([*arguments, "--protocol", "voc-irn", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "voc-irn with 2 images (its list has 1464); stored CAMs" in text
    assert "background 0.15" in text and "mean IoU as irn" in text
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["protocol"]["name"] == "voc-irn"
    assert stored["scores"]["miou"] == 100
    assert main([*arguments, "--protocol", "voc-seam", "--out", str(out)]) == 0
    assert "voc-seam with 2 images (its list has 1464); " in capsys.readouterr().out
    changed = ["--protocol", "voc-irn", "--backgrounds", "[0.5]", "--out", str(out)]
    assert main([*arguments, *changed]) == 0
    assert "voc-irn with background 0.5, 2 images" in capsys.readouterr().out
    assert main([*arguments, "--protocol", "voc-toco"]) == 2
    assert "goes with wsis evaluate;" in capsys.readouterr().err
