from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsis.data import open_dataset
from wsis.errors import InputError, MissingExtraError


def box(y0: int, y1: int, x0: int, x1: int) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def rle(inside: np.ndarray) -> dict:
    """Uncompressed RLE: column-major run lengths, the first of zeros."""
    flat = np.concatenate([[0], inside.ravel(order="F").astype(int), [0]])
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], changes, [inside.size]])).tolist()
    if not inside.ravel(order="F")[-1]:
        return {"size": list(inside.shape), "counts": counts}
    return {"size": list(inside.shape), "counts": counts[:-1]}


def annotation(image: int, category: int, outline, area: float, crowd: int = 0) -> dict:
    return {
        "id": 1, "image_id": image, "category_id": category, "segmentation": outline,
        "area": area, "iscrowd": crowd,
    }  # fmt: skip


CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 7, "name": "c"}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2014").mkdir()
    for number in (5, 6, 7):
        Image.new("RGB", (20, 10)).save(tmp_path / "train2014" / f"COCO_train2014_{number}.jpg")
    return tmp_path


def write(root: Path, annotations: list[dict]) -> None:
    images = [
        {"id": n, "file_name": f"COCO_train2014_{n}.jpg", "height": 10, "width": 20}
        for n in (7, 5, 6)
    ]
    content = {"categories": CATEGORIES, "images": images, "annotations": annotations}
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps(content))


def test_labels_and_category_order(root):
    write(root, [annotation(7, 90, box(0, 2, 0, 2), 4), annotation(5, 1, box(0, 2, 0, 2), 4, 1)])
    data = open_dataset("coco", root)
    assert data.classes == ("person", "c", "toothbrush")
    assert data.mask_ids == (1, 2, 3)
    assert data.ids == ("COCO_train2014_5", "COCO_train2014_7")
    assert data.labels.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert data.has_masks


def test_small_instances_lie_on_top_and_crowds_below(root):
    crowd = np.zeros((10, 20), bool)
    crowd[:, 10:] = True
    write(
        root,
        [
            annotation(5, 7, box(2, 4, 2, 4), 4),
            annotation(5, 1, box(0, 10, 0, 12), 120),
            annotation(5, 1, rle(crowd), 1, crowd=1),
            annotation(5, 90, box(6, 8, 0, 6), 12),
            annotation(5, 7, box(6, 8, 2, 8), 12),
        ],
    )
    expected = np.zeros((10, 20), np.uint8)
    expected[:, 10:] = 255
    expected[:, :12] = 1
    expected[2:4, 2:4] = 2
    expected[6:8, 2:8] = 2
    expected[6:8, 0:6] = 3  # equal area: the first listed keeps its pixels
    mask = open_dataset("coco", root).mask(0)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


def test_every_kind_of_outline(root):
    from pycocotools import mask as coco_mask

    shape = np.zeros((10, 20), bool)
    shape[3:7, 4:9] = True
    packed = coco_mask.encode(np.asfortranarray(shape.astype(np.uint8)))
    packed["counts"] = packed["counts"].decode()
    two = [*box(3, 7, 4, 6), *box(3, 7, 6, 9)]
    for outline in (rle(shape), packed, box(3, 7, 4, 9), two, rle(np.ones((10, 20), bool))):
        write(root, [annotation(6, 90, outline, 20)])
        expected = np.ones((10, 20), bool) if outline == rle(np.ones((10, 20), bool)) else shape
        np.testing.assert_array_equal(open_dataset("coco", root).mask(0), expected * 3)


def test_outlines_of_another_size(root):
    write(root, [annotation(6, 90, rle(np.ones((9, 20), bool)), 20)])
    with pytest.raises(InputError, match=r"COCO_train2014_6.*9 x 20"):
        open_dataset("coco", root).mask(0)


def test_missing_pycocotools(root, monkeypatch):
    write(root, [annotation(6, 90, box(0, 2, 0, 2), 4)])
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    data = open_dataset("coco", root)
    with pytest.raises(MissingExtraError, match=r"pycocotools.*\.\[data\]"):
        data.mask(0)


def test_masks_are_not_needed_for_labels(root):
    write(root, [{"image_id": 5, "category_id": 1}])
    data = open_dataset("coco", root)
    assert data.labels.tolist() == [[1, 0, 0]]
    with pytest.raises(InputError, match="COCO_train2014_5"):
        data.mask(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected COCO instances"),
        ('{"images": [], "categories": []}', "expected COCO instances"),
        ('{"images": [{}], "categories": [], "annotations": []}', "expected COCO instances"),
        ('{"images": [], "categories": [], "annotations": []}', "list is empty"),
        (
            '{"images": [], "categories": [], "annotations": [{"image_id": 1, "category_id": 2}]}',
            "category 2",
        ),
    ],
)
def test_bad_annotations(root, content, message):
    (root / "annotations" / "instances_train2014.json").write_text(content)
    with pytest.raises(InputError, match=message):
        open_dataset("coco", root)


def test_bad_layouts(root, tmp_path):
    with pytest.raises(InputError, match="instances_val2014"):
        open_dataset("coco", root, "val")
    write(root, [annotation(5, 1, box(0, 2, 0, 2), 4)])
    (root / "train2014" / "COCO_train2014_5.jpg").unlink()
    with pytest.raises(InputError, match=r"have no file.*_5.jpg"):
        open_dataset("coco", root)
    (root / "train2014").rename(root / "elsewhere")
    with pytest.raises(InputError, match="expected images in train2014"):
        open_dataset("coco", root)


def test_images_below_a_common_folder(root):
    write(root, [annotation(5, 1, box(0, 2, 0, 2), 4)])
    (root / "images").mkdir()
    (root / "train2014").rename(root / "images" / "train2014")
    assert open_dataset("coco", root).image(0).size == (20, 10)


@pytest.mark.parametrize(("split", "count"), [("train", 81), ("val", 114)])
def test_coco_mini(shared_data, split, count):
    """Its PNGs were painted at full size and then scaled, so outlines differ by a pixel."""
    root = shared_data / "coco-mini"
    data, stored = open_dataset("coco", root, split), open_dataset("voc", root, split)
    assert len(data) == count
    assert data.ids == stored.ids
    assert data.classes == stored.classes
    assert len(data.classes) == 80
    np.testing.assert_array_equal(data.labels, stored.labels)
    agreement = [(data.mask(i) == stored.mask(i)).mean() for i in range(count)]
    assert np.min(agreement) > 0.985  # measured 0.990 (train), 0.992 (val)
    assert np.mean(agreement) > 0.996  # measured 0.9971, 0.9972
