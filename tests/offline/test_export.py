"""Pseudo masks of a training list on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.offline.fakes import ColourModel, painted
from wsis.errors import InputError
from wsis.offline.cams import make_seeds, pseudo_mask
from wsis.offline.export import MANIFEST, crf_of_mask, export_pseudo_masks
from wsis.offline.masks import read_mask
from wsis.offline.predict import predict
from wsis.pseudo import PseudoRule

RULE = PseudoRule(high=0.5, low=0.2, iterations=1, dilations=(1,), down_scale=1)
PASSES = {"scales": (1.0,), "flip": True, "base_long": None}
PREDICTION = {**PASSES, "background": 0.17, "background_power": None, "gate": True}


@pytest.fixture
def data(tmp_path):
    return painted(tmp_path / "data")


def export(data, out, **changes):
    arguments = {"rule": RULE, "prediction": PREDICTION, **changes}
    return export_pseudo_masks(ColourModel(), data, out, **arguments)


def masks(data, out):
    return [read_mask(out / f"{name}.png", data.mask_ids) for name in data.ids]


def test_masks_of_cams_are_the_rules(data, tmp_path, monkeypatch):
    monkeypatch.setattr(type(data), "mask", None)  # ground truth is not opened
    assert export(data, tmp_path / "out") == (2, 0)
    for i, found in enumerate(masks(data, tmp_path / "out")):
        image, label = data.image(i), data.labels[i]
        seeds = make_seeds(ColourModel(), image, label, **PASSES)
        assert np.array_equal(found, pseudo_mask(seeds.best, image, label, RULE))
        assert set(np.unique(found)) <= {0, 255, *(np.flatnonzero(label) + 1)}
    assert {1, 2} <= set(np.unique(masks(data, tmp_path / "out")[1]))


def test_masks_of_the_decoder_know_the_label(data, tmp_path):
    label = data.labels[1].copy()
    data.labels.setflags(write=True)
    data.labels[1] = [1, 0]
    assert export(data, tmp_path / "out", source="decoder") == (2, 0)
    found = masks(data, tmp_path / "out")[1]
    free = predict(ColourModel(), data.image(1), **PREDICTION).mask.numpy()
    assert label.tolist() == [1, 1] and {1, 2} <= set(np.unique(free))
    assert set(np.unique(found)) == {0, 1}
    assert np.array_equal(found == 1, free == 1)


def test_a_stopped_export_goes_on_and_keeps_what_is_there(data, tmp_path):
    out = tmp_path / "out"
    assert export(data, out) == (2, 0)
    before = (out / "image0.png").read_bytes(), (out / "image1.png").read_bytes()
    (out / "image1.png").unlink()
    (out / "image0.png").touch()
    assert export(data, out) == (1, 1)
    assert ((out / "image0.png").read_bytes(), (out / "image1.png").read_bytes()) == before
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "decoder"}, "other source"),
        ({"crf": "psa"}, "other crf"),
        ({"rule": PseudoRule()}, "other rule"),
        ({"about": {"run": "b"}}, "other run"),
    ],
)
def test_masks_made_otherwise_are_refused(data, tmp_path, changes, message):
    export(data, tmp_path / "out", about={"run": "a"})
    with pytest.raises(InputError, match=message):
        export(data, tmp_path / "out", **{"about": {"run": "a"}, **changes})


def test_other_weights_are_refused_and_foreign_pngs(data, tmp_path):
    out = tmp_path / "out"
    export(data, out)
    model = ColourModel()
    model.scale.data += 1
    with pytest.raises(InputError, match="other weights"):
        export_pseudo_masks(model, data, out, rule=RULE, prediction=PREDICTION)
    (out / MANIFEST).unlink()
    with pytest.raises(InputError, match="unknown origin"):
        export(data, out)


def test_the_manifest_says_how(data, tmp_path):
    export(data, tmp_path / "out", about={"run": "a"})
    made = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (made["run"], made["source"], made["crf"]) == ("a", "cam", "none")
    assert made["rule"]["high"] == 0.5 and made["prediction"]["scales"] == [1.0]
    assert made["images"] == data.fingerprint()


def test_a_crf_decides_every_pixel_among_the_images_classes(data, tmp_path):
    export(data, tmp_path / "out", crf="irn-label")
    for i, found in enumerate(masks(data, tmp_path / "out")):
        assert set(np.unique(found)) <= {0, *(np.flatnonzero(data.labels[i]) + 1)}
    image, unsure = data.image(1), np.full((33, 25), 255, np.uint8)
    assert not crf_of_mask(image, unsure, "psa").any()
    unsure[:16], unsure[16:20] = 0, 2
    out = crf_of_mask(image, unsure, "irn-label")
    assert out.dtype == np.uint8 and set(np.unique(out)) == {0, 2}
    half = predict(ColourModel(), image, **PREDICTION, label=np.array([0, 0])).mask
    assert not torch.any(half)
