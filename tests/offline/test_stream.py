"""Many images in a stream: what a plain loop gives, bounded, with names, and gone afterwards."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.offline.fakes import ColourModel, painted
from wsis.errors import InputError
from wsis.evaluate.cam_quality import evaluate_cams
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.segmentation import evaluate_folder, evaluate_segmentation
from wsis.offline.predict import conclude, predict
from wsis.offline.stream import stream_passes
from wsis.pseudo import PseudoRule

SIZES = ((40, 56), (33, 25), (17, 60), (48, 48), (25, 33), (61, 20), (30, 30))
PASSES = {"scales": (0.5, 1.0), "flip": True, "base_long": None}


def ours() -> int:
    return sum(thread.name.startswith("wsis") for thread in threading.enumerate())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return painted(tmp_path_factory.mktemp("stream") / "data", sizes=SIZES)


@pytest.mark.parametrize("crf", ["none", "psa"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_predictions_are_those_of_a_loop(data, workers, crf):
    model, order = ColourModel(), [5, 0, 3, 1, 6]

    def keep(index, image, passes, _):
        return index, conclude(passes, image, crf=crf)

    found = stream_passes(model, data, order, keep, **PASSES, decode=True, workers=workers)
    for (index, answer), i in zip(found, order, strict=True):
        alone = predict(model, data.image(i), scales=(0.5, 1.0), crf=crf)
        assert index == i
        for name in ("scores", "mask", "class_probs"):
            assert torch.equal(getattr(answer, name), getattr(alone, name)), name
    assert ours() == 0


@pytest.mark.parametrize("convention", ["voc", "mmseg"])
def test_evaluation_does_not_depend_on_the_threads(data, tmp_path, convention):
    protocol = Protocol(scales=(0.5, 1.0), background=0.4, crf="psa", convention=convention)
    results, masks = [], []
    for workers in (0, 1, 3):
        out = tmp_path / f"{workers}"
        options = {"protocol": protocol, "workers": workers}
        predicted = evaluate_segmentation(ColourModel(), data, out=out, **options)
        masks.append([(out / f"{name}.png").read_bytes() for name in data.ids])
        quality = evaluate_cams(ColourModel(), data, **options, rule=PseudoRule(refine="none"))
        stored = evaluate_folder(out, data, convention=convention, workers=workers)
        results.append((predicted, quality, stored))
    assert results[0] == results[1] == results[2]
    assert masks[0] == masks[1] == masks[2]
    assert [row["id"] for row in results[0][0]["images"]] == list(data.ids)


@pytest.mark.parametrize("workers", [1, 2])
def test_images_in_hand_are_bounded(data, workers):
    lock, now, most = threading.Lock(), 0, 0

    def count(step):
        nonlocal now, most
        with lock:
            now += step
            most = max(most, now)

    class Slow(ColourModel):
        def forward(self, image, **options):
            return super().forward(image, **options)

    def end(*_):
        count(-1)

    many = list(range(len(data))) * 8
    stream = stream_passes(
        Slow(), data, many, end, scales=(1.0,), flip=False, base_long=None, decode=True,
        workers=workers, beside=lambda i: count(1),
    )  # fmt: skip
    assert len(list(stream)) == len(many)
    assert most <= 4 * workers + 2


class Failing(ColourModel):
    """Fails on the image whose width it is told."""

    def forward(self, image, **options):
        if image.shape[-1] == 48:
            raise RuntimeError("out of memory")
        return super().forward(image, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["read", "mask", "network", "scores", "conclude", "write"])
def test_an_error_of_any_stage_names_the_image(tmp_path, stage, workers):
    data = painted(tmp_path / "data", sizes=SIZES)
    model, out, protocol = ColourModel(), tmp_path / "out", Protocol(scales=(1.0,), background=0.4)
    kind = InputError
    if stage == "read":
        path = data.image_path(3)
        path.write_bytes(path.read_bytes()[:90])
    elif stage == "mask":
        Image.fromarray(np.full((48, 48), 9, np.uint8)).save(data.mask_path(3))
    elif stage == "network":
        model, kind = Failing(), RuntimeError
    elif stage == "scores":
        model = NotFinite()
    elif stage == "conclude":
        protocol = replace(protocol, crf="psaa")
    else:
        (out / "image3.png").mkdir(parents=True)
    with pytest.raises(kind) as caught:
        evaluate_segmentation(model, data, protocol=protocol, out=out, workers=workers)
    name = "image0" if stage == "conclude" else "image3"
    assert name in str(caught.value) and "\n" not in str(caught.value)
    if name == "image3":
        assert sorted(p.name for p in out.glob("*.png") if p.is_file())[:3] == [
            f"image{k}.png" for k in range(3)
        ]
    assert ours() == 0


class NotFinite(ColourModel):
    """Its scores overflow on the image of 48 pixels."""

    def forward(self, image, **options):
        maps = super().forward(image, **options)
        if image.shape[-1] == 48:
            maps.logits.fill_(float("nan"))
        return maps


def test_left_early_nothing_stays(data):
    stream = stream_passes(
        ColourModel(), data, range(7), lambda *_: None, **PASSES, decode=True, workers=2
    )
    with closing(stream):
        next(stream)
    assert ours() == 0


def test_dali_reads_for_the_network_too(data):
    pytest.importorskip("nvidia.dali")
    protocol = Protocol(scales=(0.5, 1.0), background=0.4)
    options = {"protocol": protocol, "workers": 2}
    torch_result = evaluate_segmentation(ColourModel(), data, **options)
    dali_result = evaluate_segmentation(ColourModel(), data, **options, loader="dali")
    assert dali_result["scores"]["miou"] == pytest.approx(torch_result["scores"]["miou"], abs=0.5)
    assert dali_result["scores"]["pixels"] == torch_result["scores"]["pixels"]
