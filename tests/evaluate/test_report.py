from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.offline.fakes import ColourModel, painted
from wsis.errors import InputError
from wsis.evaluate.cam_quality import evaluate_cams
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.report import (
    class_colours,
    make_panels,
    overlay_mask,
    sample_indices,
    write_report,
)
from wsis.evaluate.segmentation import evaluate_segmentation
from wsis.offline.masks import voc_palette

SMALL = Protocol(scales=(1.0,))
HISTORY = [
    {"epoch": "1", "step": "10", "lr": "0.01", "total": "2.5", "cls": "0.7", "val_map": ""},
    {"epoch": "2", "step": "20", "lr": "0.005", "total": "1.5", "cls": "nan", "val_map": "61.5"},
]


class Page(HTMLParser):
    """Collects the tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data, model = painted(folder / "data"), ColourModel()
    result = evaluate_segmentation(model, data, protocol=SMALL)
    return {
        "data": data,
        "result": result,
        "panels": make_panels(model, data, [0, 1], protocol=SMALL),
        "quality": evaluate_cams(model, data, protocol=SMALL),
    }


def write(path, run, **changes):
    result = run["result"]
    arguments = {
        "title": "demo",
        "summary": {"mean IoU": result["scores"]["miou"], "images": 2},
        "protocol": result["protocol"],
        "scores": result["scores"],
        "classes": run["data"].classes,
        "history": HISTORY,
        "config_text": "seed: 1\n",
        "versions": {"python": "3", "data": run["data"].fingerprint(), "torchvision": None},
        "panels": run["panels"],
        "best": run["panels"][:1],
        "worst": run["panels"][1:],
        "mask_ids": run["data"].mask_ids,
        "curve": result["curve"],
        "quality": run["quality"],
    }
    write_report(path, **{**arguments, **changes})
    return path.read_text()


def test_panels_show_every_stage(run):
    captions = [caption for caption, _ in run["panels"][1].pictures]
    assert captions == [
        "image",
        "CAM",
        "refined CAM",
        "pseudo mask",
        "prediction",
        "ground truth",
    ]
    for panel, size in zip(run["panels"], ((40, 56), (33, 25)), strict=True):
        assert {picture.shape for _, picture in panel.pictures} == {(*size, 3)}
        assert {picture.dtype for _, picture in panel.pictures} == {np.dtype(np.uint8)}
    assert run["panels"][0].note.startswith("red thing · IoU ")


def test_page_is_whole_and_needs_nothing_from_elsewhere(tmp_path, run):
    text = write(tmp_path / "sub" / "report.html", run)
    page = Page(text)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3 + 6 * 4
    assert all(source.startswith("data:image/") for source in images)
    loaders = {"script", "link", "iframe", "object", "embed", "video", "source", "base", "form"}
    assert not {tag for tag, _ in page.tags} & loaders
    assert not re.search(r"https?://", text)
    assert not re.search(r"url\(|@import", text)
    assert os.listdir(tmp_path / "sub") == ["report.html"]
    picture = next(source for source in images if "jpeg" in source)
    with Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))) as decoded:
        assert decoded.size == (56, 40)


def test_numbers_carry_their_protocol(tmp_path, run):
    words = " ".join(Page(write(tmp_path / "report.html", run)).words)
    assert run["result"]["protocol"]["line"] in words
    assert run["quality"]["protocol"]["line"] in words
    assert words.count("chosen with ground truth: not a result") >= 3
    assert f"{run['result']['scores']['miou']:.2f}" in words
    assert run["data"].fingerprint() in words


def test_text_is_escaped(tmp_path, run):
    evil = "<script>alert(1)</script>"
    text = write(
        tmp_path / "report.html",
        run,
        title=evil,
        classes=[evil, '"><img src=x onerror=y>'],
        config_text=evil,
        versions={evil: evil},
    )
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.words.count(evil) >= 4
    assert "green <b>thing</b>" in "".join(page.words)  # class name in a panel's note
    assert "b" not in {tag for tag, _ in page.tags}


def test_the_same_run_gives_the_same_bytes(tmp_path, run):
    assert write(tmp_path / "a.html", run) == write(tmp_path / "b.html", run)


def test_little_is_enough(tmp_path, run):
    nothing = {"history": [], "panels": [], "best": [], "worst": [], "curve": None}
    text = write(tmp_path / "report.html", run, quality=None, summary={"mean IoU": None}, **nothing)
    assert "<dd>-</dd>" in text
    assert "<img" not in text
    one_row = write(tmp_path / "report.html", run, **{**nothing, "history": HISTORY[:1]})
    assert one_row.count("<img") == 1


def test_failed_write_leaves_the_old_page(tmp_path, run, monkeypatch):
    path = tmp_path / "report.html"
    before = write(path, run)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=r"report\.html"):
        write(path, run, title="other")
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["report.html"]


def test_masks_have_their_files_colours():
    colours = class_colours((8, 12))
    np.testing.assert_array_equal(colours[[0, 1, 2, 255]], voc_palette()[[0, 8, 12, 255]])
    white = Image.new("RGB", (3, 1), "white")
    shown = overlay_mask(white, np.array([[0, 1, 255]], np.uint8), colours)
    assert shown[0, 0].tolist() == [238, 238, 238] or shown[0, 0].min() > 230
    assert shown[0, 1, 0] > shown[0, 1, 1] == shown[0, 1, 2]


def test_sample_is_fixed_and_spread():
    assert sample_indices(100, 3) == [0, 49, 99]
    assert sample_indices(2, 8) == [0, 1]
    assert sample_indices(1, 1) == [0]
