from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.offline.fakes import CLASSES, MASK_IDS, ColourModel, painted
from wsis.errors import InputError
from wsis.evaluate.cam_quality import evaluate_cams
from wsis.evaluate.conventions import scores
from wsis.evaluate.protocols import Protocol, list_hash
from wsis.evaluate.segmentation import (
    THRESHOLDS,
    best_and_worst,
    evaluate_folder,
    evaluate_segmentation,
    format_table,
)
from wsis.offline.cams import make_seeds
from wsis.offline.masks import read_mask, write_mask
from wsis.offline.predict import predict, predict_masks
from wsis.pseudo import PseudoRule

SMALL = Protocol(scales=(1.0,), background=0.4)


def confusion(prediction: np.ndarray, truth: np.ndarray, size: int) -> np.ndarray:
    counts = np.zeros((size, size), int)
    for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
        if t != 255:
            counts[t, p] += 1
    return counts


def test_result_equals_a_count_by_hand(tmp_path):
    data, model = painted(tmp_path / "data"), ColourModel()
    result = evaluate_segmentation(model, data, protocol=SMALL, out=tmp_path / "out")
    answers = [predict(model, data.image(i), scales=(1.0,), background=0.4) for i in range(2)]
    expected = sum(confusion(a.mask.numpy(), data.mask(i), 3) for i, a in enumerate(answers))
    assert result["confusion"] == expected.tolist()
    assert result["scores"] == scores(expected).as_dict()
    assert result["scores"]["miou"] > 70
    for index, answer in enumerate(answers):
        own = scores(confusion(answer.mask.numpy(), data.mask(index), 3))
        assert result["images"][index] == {
            "index": index,
            "id": f"image{index}",
            "miou": own.miou,
        }
        stored = read_mask(tmp_path / "out" / f"image{index}.png", MASK_IDS)
        np.testing.assert_array_equal(stored, answer.mask.numpy())
    at = 37
    swept = [predict_masks(a.scores, float(np.float32(THRESHOLDS[at]))).numpy() for a in answers]
    counts = sum(confusion(m, data.mask(i), 3) for i, m in enumerate(swept))
    assert result["curve"]["miou"][at] == pytest.approx(scores(counts).miou)
    assert result["curve"]["best_miou"] == max(result["curve"]["miou"])
    assert result["classification"]["map"] == 100
    assert list(result["classification"]["ap"]) == list(CLASSES)
    json.dumps(result, allow_nan=False)


def test_stored_masks_score_like_their_network(tmp_path):
    data = painted(tmp_path / "data")
    first = evaluate_segmentation(ColourModel(), data, protocol=SMALL, out=tmp_path / "out")
    second = evaluate_folder(tmp_path / "out", data)
    assert second["scores"] == first["scores"]
    assert second["images"] == first["images"]
    assert second["coverage"] == 100


def test_one_image_and_an_absent_class(tmp_path):
    data = painted(tmp_path / "data", sizes=((7, 5),))
    result = evaluate_segmentation(ColourModel(), data, protocol=SMALL)
    assert len(result["images"]) == 1
    assert result["scores"]["iou"][2] is None
    assert result["classification"]["ap"][CLASSES[1]] is None
    json.dumps(result, allow_nan=False)


def test_limit_is_named_in_the_protocol(tmp_path):
    data = painted(tmp_path / "data", sizes=((16, 16),) * 3)
    result = evaluate_segmentation(ColourModel(), data, protocol=SMALL, limit=2)
    assert result["protocol"]["images"] == len(result["images"]) == 2
    assert result["protocol"]["list_hash"] == list_hash(("image0", "image2")) != list_hash(data.ids)
    with pytest.raises(InputError, match="limit"):
        evaluate_segmentation(ColourModel(), data, limit=0)


def test_missing_and_foreign_masks(tmp_path):
    data = painted(tmp_path / "data")
    with pytest.raises(InputError, match="no such folder"):
        evaluate_folder(tmp_path / "nowhere", data)
    folder = tmp_path / "masks"
    write_mask(folder / "image0.png", data.mask(0), MASK_IDS)
    with pytest.raises(InputError, match=r"image1\.png: .*(missing|no such file)"):
        evaluate_folder(folder, data, unsure="wrong")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(folder / "image1.png")
    with pytest.raises(InputError, match=r"image1\.png.*one size"):
        evaluate_folder(folder, data, unsure="wrong")
    Image.fromarray(np.full((33, 25), 9, np.uint8)).save(folder / "image1.png")
    with pytest.raises(InputError, match=r"image1\.png.*predicted id 9"):
        evaluate_folder(folder, data, unsure="wrong")
    os.remove(data.mask_path(0))
    result = evaluate_segmentation(ColourModel(), data, protocol=SMALL)
    assert [row["id"] for row in result["images"]] == ["image1"]
    assert result["protocol"]["images"] == 1


def test_undecided_pixels_in_a_folder(tmp_path):
    data = painted(tmp_path / "data", sizes=((16, 24),))
    mask = data.mask(0)
    mask[8:, :12] = 255
    write_mask(tmp_path / "masks" / "image0.png", mask, MASK_IDS)
    labelled = (data.mask(0) != 255).sum()
    ignored = evaluate_folder(tmp_path / "masks", data, unsure="ignored")
    wrong = evaluate_folder(tmp_path / "masks", data, unsure="wrong")
    assert ignored["scores"]["miou"] == 100
    assert wrong["scores"]["miou"] < 100
    assert wrong["coverage"] == pytest.approx(100 * (labelled - 96) / labelled)
    assert "255 wrong" in wrong["protocol"]["line"]
    with pytest.raises(InputError, match="predicted id 255"):
        evaluate_folder(tmp_path / "masks", data)


@pytest.mark.parametrize("crr", [True, False])
def test_cam_quality(tmp_path, crr):
    data, model = painted(tmp_path / "data"), ColourModel(crr=crr)
    result = evaluate_cams(model, data, protocol=SMALL, rule=PseudoRule(refine="none"))
    json.dumps(result, allow_nan=False)
    seeds = [make_seeds(model, data.image(i), data.labels[i], scales=(1.0,)) for i in range(2)]
    masks = [predict_masks(s.cam, float(np.float32(0.2))).numpy() for s in seeds]
    counts = sum(confusion(m, data.mask(i), 3) for i, m in enumerate(masks))
    assert result["cam"]["fixed"]["0.20"] == pytest.approx(scores(counts).miou)
    assert result["cam"]["best_miou"] >= result["cam"]["fixed"]["0.17"]
    assert (result["refined"] is None) is not crr
    pseudo = result["pseudo"]
    assert pseudo["ignored"]["miou"] >= pseudo["wrong"]["miou"]
    assert 0 < pseudo["coverage"] <= 100
    assert pseudo["rule"]["refine"] == "none"
    assert "image labels given" in result["protocol"]["line"]
    assert "not a result" in result["protocol"]["line"]


def test_protocol_line_names_every_choice(tmp_path):
    data = painted(tmp_path / "data")
    protocol = Protocol(base_long=160, checkpoint="best on val labels")
    line = protocol.on(data, range(2)).describe()
    for piece in (
        "folder val: 2 images",
        list_hash(data.ids),
        "ground truth masks",
        "scales 0.5 1 1.5 2 of long side 160",
        "with flip",
        "CRF none",
        "image labels not used",
        "background 0.17 (chosen on VOC val by the method's authors)",
        "checkpoint best on val labels",
        "mean IoU as voc",
    ):
        assert piece in line
    assert "\n" not in line
    assert "background 0.3 (set by the user)" in replace(protocol, background=0.3).describe()
    assert (
        "0.3 (tuned on x)"
        in replace(protocol, background=0.3, background_choice="tuned on x").describe()
    )
    stored = protocol.as_dict()
    assert stored.pop("line") == protocol.describe()
    with pytest.raises(InputError, match="background"):
        replace(protocol, background=None).prediction()
    assert Protocol(**{**stored, "scales": protocol.scales, "changes": ()}) == protocol


def test_table_is_aligned():
    result = scores(np.array([[5, 1, 0], [1, 3, 0], [0, 0, 0]])).as_dict()
    lines = format_table(["a", "a long name"], result).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].startswith("background")
    assert lines[2].endswith(" 71.43")
    assert lines[4].endswith("     -")
    assert "mean IoU " in lines[6]


def test_best_and_worst():
    images = [{"index": i, "miou": v} for i, v in enumerate((50.0, None, 90.0, 10.0, 50.0))]
    assert best_and_worst(images, 1) == ([2], [3])
    assert best_and_worst(images, 9) == ([2, 0], [3, 4])
    assert best_and_worst(images[:2], 3) == ([], [])
