"""A dense CRF in the stream of an evaluation: `wsis evaluate --crf PRESET`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.offline.fakes import ColourModel, painted
from wsis.cli import main
from wsis.errors import InputError
from wsis.evaluate.conventions import scores
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.segmentation import WITH_TRUTH, evaluate_segmentation
from wsis.offline.crf import crf_of_labels, crf_of_scores
from wsis.offline.predict import predict

SMALL = Protocol(scales=(1.0,), background=0.4)


@pytest.mark.parametrize("preset", ["psa", "irn-label"])
def test_masks_are_the_crfs(preset, tmp_path):
    data, model = painted(tmp_path / "data"), ColourModel()
    before = sorted(tmp_path.rglob("*"))
    plain = evaluate_segmentation(model, data, protocol=SMALL)
    result = evaluate_segmentation(model, data, protocol=replace(SMALL, crf=preset))
    assert sorted(tmp_path.rglob("*")) == before  # nothing on disk
    counts = np.zeros((3, 3), int)
    for index in range(2):
        image, truth = data.image(index), data.mask(index)
        own = predict(model, image, scales=(1.0,), background=0.4)
        planes = torch.cat([torch.full((1, *own.mask.shape), 0.4), own.scores])
        mask = (
            crf_of_labels(np.asarray(image), own.mask, 3, preset)
            if preset == "irn-label"
            else crf_of_scores(np.asarray(image), planes, preset)
        ).numpy()
        known = truth != 255
        np.add.at(counts, (truth[known], mask[known]), 1)
    assert result["confusion"] == counts.tolist()
    assert result["scores"] == scores(counts).as_dict()
    assert result["scores"]["miou"] > plain["scores"]["miou"]  # painted edges are easy for it
    assert result["protocol"]["crf"] == preset
    assert f"CRF {preset};" in result["protocol"]["line"]
    # What is swept are the scores, and the report must say so.
    assert result["curve"]["miou"] == plain["curve"]["miou"]
    assert plain["curve"]["note"] == WITH_TRUTH
    assert result["curve"]["note"] == f"{WITH_TRUTH}, and without the CRF"


def test_the_other_maps_stay(tmp_path):
    data, model = painted(tmp_path / "data"), ColourModel()
    plain = predict(model, data.image(0), scales=(1.0,))
    refined = predict(model, data.image(0), scales=(1.0,), crf="toco")
    torch.testing.assert_close(plain.scores, refined.scores, rtol=0, atol=0)
    torch.testing.assert_close(plain.class_probs, refined.class_probs, rtol=0, atol=0)
    assert refined.mask.dtype == torch.uint8 and not refined.mask.is_cuda


def test_the_decoders_own_background(tmp_path):
    data, model = painted(tmp_path / "data"), ColourModel()
    found = predict(model, data.image(1), scales=(1.0,), background_power=3, crf="psa")
    assert found.mask.shape == data.mask(1).shape


def test_unknown_presets(tmp_path, capsys):
    data, model = painted(tmp_path / "data"), ColourModel()
    with pytest.raises(InputError, match="unknown CRF preset 'psaa', expected one of"):
        evaluate_segmentation(model, data, protocol=replace(SMALL, crf="psaa"))
    assert main(["evaluate", "--masks", str(tmp_path), "--crf", "psa"]) == 2
    assert "--crf goes with a run folder only" in capsys.readouterr().err


def test_no_crf_by_default():
    assert Protocol().crf == "none"
    assert "CRF none;" in Protocol().describe()
