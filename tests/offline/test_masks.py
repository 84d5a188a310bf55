from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from wsis.errors import InputError
from wsis.offline.masks import NO_CLASS, read_mask, voc_palette, write_mask

MASK_IDS = (8, 10, 12)


def test_palette_is_vocs():
    palette = voc_palette()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0)}
    known |= {15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: tuple(palette[index].tolist()) for index in known} == known
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


def test_palette_is_that_of_the_real_masks(shared_data):
    path = next((shared_data / "voc-animals" / "SegmentationClass").glob("*.png"))
    with Image.open(path) as picture:
        stored = np.array(picture.getpalette(), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(voc_palette()[: len(stored)], stored)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 33)])
def test_written_masks_read_back(tmp_path, shape):
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), shape)
    path = tmp_path / "new" / "a.png"
    write_mask(path, mask, MASK_IDS)
    np.testing.assert_array_equal(read_mask(path, MASK_IDS), mask)
    with Image.open(path) as picture:
        assert picture.mode == "P"
        values = np.array(picture)
    np.testing.assert_array_equal(values, np.array([0, 8, 10, 12] + [255] * 252)[mask])
    assert os.listdir(path.parent) == ["a.png"]


def test_non_contiguous_and_wide_integers(tmp_path):
    mask = np.arange(4, dtype=np.int64).repeat(2).reshape(1, 8)[:, ::2]
    write_mask(tmp_path / "a.png", mask, MASK_IDS)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", MASK_IDS), mask)


@pytest.mark.parametrize(
    "mask",
    [
        np.array([[4]]),
        np.array([[-1]]),
        np.array([[254]], np.uint8),
        np.zeros((1, 2, 2), np.uint8),
        np.zeros((2, 2), np.float32),
    ],
)
def test_bad_masks_are_not_written(tmp_path, mask):
    with pytest.raises(InputError, match=r"a\.png"):
        write_mask(tmp_path / "a.png", mask, MASK_IDS)
    assert os.listdir(tmp_path) == []


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_mask(path, np.array([[1]]), MASK_IDS)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=r"a\.png: No space left"):
        write_mask(path, np.array([[2]]), MASK_IDS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_unknown_file_ids_stay_out_of_range(tmp_path):
    Image.fromarray(np.array([[0, 1, 3, 8, 9, 12, 254, 255]], np.uint8)).save(tmp_path / "a.png")
    expected = [[0, NO_CLASS, NO_CLASS, 1, 9, 3, 254, 255]]
    assert read_mask(tmp_path / "a.png", MASK_IDS).tolist() == expected


def test_files_that_are_no_masks(tmp_path):
    with pytest.raises(InputError, match=r"none\.png"):
        read_mask(tmp_path / "none.png", MASK_IDS)
    Image.new("RGB", (2, 2)).save(tmp_path / "rgb.png")
    with pytest.raises(InputError, match=r"rgb\.png.*RGB"):
        read_mask(tmp_path / "rgb.png", MASK_IDS)
    (tmp_path / "text.png").write_text("<html>")
    with pytest.raises(InputError, match=r"text\.png"):
        read_mask(tmp_path / "text.png", MASK_IDS)
    write_mask(tmp_path / "cut.png", np.ones((64, 64), np.uint8), MASK_IDS)
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) - 30])
    with pytest.raises(InputError, match=r"cut\.png"):
        read_mask(tmp_path / "cut.png", MASK_IDS)
