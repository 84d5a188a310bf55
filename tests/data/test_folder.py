from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsis.data import open_dataset
from wsis.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("pics/a.png", "pics/b.webp", "c.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (9, 80, 200)).save(path)
    (tmp_path / "train.csv").write_text(
        "image,labels\npics/a.png,dog cat\npics/b.webp,cat\nc.jpg,\n"
    )
    return tmp_path


def test_labels_and_classes(root):
    data = open_dataset("folder", root)
    assert data.ids == ("a", "b", "c")
    assert data.classes == ("cat", "dog")
    assert data.mask_ids == (1, 2)
    assert data.labels.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert data.image(1).size == (6, 4)
    assert not data.has_masks


def test_other_splits_take_the_numbering_of_train(root):
    (root / "val.csv").write_text("image,labels\r\nc.jpg,dog\r\n")
    assert open_dataset("folder", root, "val").labels.tolist() == [[0, 1]]
    (root / "val.csv").write_text("image,labels\nc.jpg,horse\n")
    with pytest.raises(InputError, match=r"val.csv: 'c.jpg' has label 'horse', expected one of"):
        open_dataset("folder", root, "val")


def test_classes_file_and_semicolons(root):
    (root / "classes.txt").write_text("polar bear\ncat\n")
    (root / "train.csv").write_text("image,labels\nc.jpg,cat; polar bear\n")
    data = open_dataset("folder", root)
    assert data.classes == ("polar bear", "cat")
    assert data.labels.tolist() == [[1, 1]]
    (root / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(InputError, match="twice"):
        open_dataset("folder", root)


def test_byte_order_mark_and_quotes(root):
    (root / "train.csv").write_bytes('\ufeffimage,labels\n"c.jpg","cat dog"\n'.encode())
    assert open_dataset("folder", root).labels.tolist() == [[1, 1]]


def test_masks(root):
    (root / "masks").mkdir()
    values = np.array([[0, 1, 2, 255, 0, 0]] * 4, np.uint8)
    Image.fromarray(values).save(root / "masks" / "a.png")
    data = open_dataset("folder", root)
    assert data.has_masks
    np.testing.assert_array_equal(data.mask(0), values)
    with pytest.raises(InputError, match=r"b\.png"):
        data.mask(1)
    Image.fromarray(values + 3).save(root / "masks" / "a.png")
    with pytest.raises(InputError, match="value 3 is no class"):
        data.mask(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected the columns image,labels"),
        ("file,labels\nc.jpg,cat\n", "expected the columns"),
        ("image,labels\n", "list is empty"),
        ("image,labels\nc.jpg\n", "line 2"),
        ("image,labels\nc.jpg,cat,dog\n", "line 2"),
        ("image,labels\n../c.jpg,cat\n", "stay in the folder"),
        ("image,labels\npics/../../c.jpg,cat\n", "stay in the folder"),
        ("image,labels\n/c.jpg,cat\n", "stay in the folder"),
        ("image,labels\nC:\\c.jpg,cat\n", "stay in the folder"),
        ("image,labels\nd.jpg,cat\n", r"1 of 1 listed images have no file.*d.jpg"),
        ("image,labels\nc.jpg,cat\npics/c.jpg,cat\n", "share the name 'c'"),
        ("image,labels\nc.jpg,\n", "no image has a label"),
    ],
)
def test_bad_lists(root, content, message):
    (root / "train.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        open_dataset("folder", root)


def test_missing_list(root):
    with pytest.raises(InputError, match=r"val.csv: cannot be read"):
        open_dataset("folder", root, "val")
    (root / "train.csv").write_bytes(b"image,labels\n\xff\xfe,cat\n")
    with pytest.raises(InputError, match="UTF-8"):
        open_dataset("folder", root)


def test_more_classes_than_a_mask_can_hold(root):
    (root / "classes.txt").write_text("\n".join(f"n{i}" for i in range(300)))
    (root / "train.csv").write_text("image,labels\nc.jpg,n299\n")
    (root / "masks").mkdir()
    Image.new("L", (6, 4)).save(root / "masks" / "c.png")
    data = open_dataset("folder", root)
    assert data.labels.shape == (1, 300)
    with pytest.raises(InputError, match="253 classes"):
        data.mask(0)
