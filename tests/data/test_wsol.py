from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest

from tests.wsol_tree import CLASSES, write_wsol_tree
from wsis.data.check import check
from wsis.data.compact import Lines, OneHotRows
from wsis.data.dataset import open_dataset
from wsis.data.loader import TrainLoader
from wsis.data.scan import scan
from wsis.data.subset import Subset, one_label
from wsis.errors import InputError


@pytest.fixture
def tree(tmp_path):
    return write_wsol_tree(tmp_path, {"train": 7, "test": 3})


def test_images_labels_and_names(tree):
    data = open_dataset("cub", tree, "train")
    assert len(data) == 7 and data.classes == CLASSES
    assert data.ids[4] == "train+001.kind+004.png"
    assert data.image_path(4) == tree / "dataset/CUB/train/001.kind/004.png"
    assert data.image(4).size == (48, 40) and data.image_size(4) == (40, 48)
    assert data.class_ids.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert not data.has_masks and data.mask_path(0) is None
    assert scan(data, masks=False) == []


def test_labels_are_rows_of_a_dense_table(tree):
    labels = open_dataset("cub", tree, "train").labels
    dense = np.eye(3, dtype=np.uint8)[[0, 1, 2, 0, 1, 2, 0]]
    assert labels.shape == dense.shape and len(labels) == 7 and labels.dtype == dense.dtype
    for rows in (3, -1, [2, 5], np.array([1, 0]), slice(1, 4), []):
        assert labels[rows].tolist() == dense[rows].tolist()
        assert labels[rows].shape == dense[rows].shape and labels[rows].dtype == np.uint8
    assert labels.sum(0).tolist() == dense.sum(0).tolist()
    assert labels.sum(1).tolist() == dense.sum(1).tolist()


@pytest.mark.parametrize("place", ["dataset/CUB", "CUB", "."])
def test_places_of_images(tree, place):
    (tree / "dataset/CUB").rename(tree / "moved")
    (tree / "dataset").rmdir()
    if place == ".":
        (tree / "moved/train").rename(tree / "train")
    else:
        (tree / place).parent.mkdir(exist_ok=True)
        (tree / "moved").rename(tree / place)
    assert open_dataset("cub", tree, "train").image(0).size == (48, 40)


def test_classes_without_names_and_proxy_lists(tree):
    (tree / "metadata/CUB/classes.txt").unlink()
    (tree / "metadata/CUB").rename(tree / "metadata/ILSVRC")
    (tree / "dataset/CUB").rename(tree / "dataset/ILSVRC")
    ids = (tree / "metadata/ILSVRC/train/image_ids.txt").read_text().splitlines()
    (tree / "metadata/ILSVRC/train/image_ids_proxy.txt").write_text(f"{ids[5]}\n{ids[1]}\n")
    data = open_dataset("ilsvrc", tree, "train-proxy")
    assert len(data.classes) == 1000 and data.classes[7] == "7"
    assert [data.paths[i] for i in (0, 1)] == [ids[5], ids[1]]
    assert data.class_ids.tolist() == [2, 1]


def test_check_finds_the_kind_and_its_splits(tree):
    (tree / "dataset/CUB/test/002.kind/002.png").write_bytes(b"no image")
    result = check(tree)
    assert result.splits["train"].images == 7 and result.splits["test"].label_counts == {
        name: 1 for name in CLASSES
    }
    assert [p.image for _, p in result.problems if p.fatal] == ["test+002.kind+002.png"]


def test_loader_makes_the_same_batches_as_from_dense_labels(tree):
    data = open_dataset("cub", tree, "train")
    options = dict(
        batch_size=3, crop=32, resize_long=(32, 40), flip=0.5, jitter=(0.1,) * 4,
        mean=(0.5,) * 3, std=(0.2,) * 3, seed=1,
    )  # fmt: skip
    for batch in TrainLoader(pickle.loads(pickle.dumps(data)), **options).epoch(0):
        assert batch.label.argmax(1).tolist() == data.class_ids[batch.index].tolist()
        assert batch.label.sum(1).tolist() == [1] * 3


def test_fingerprint_follows_content(tree):
    first = open_dataset("cub", tree, "train").fingerprint()
    path = tree / "metadata/CUB/train/class_labels.txt"
    path.write_text(path.read_text().replace(".png,2", ".png,1", 1))
    assert open_dataset("cub", tree, "train").fingerprint() != first


BAD = {
    "list": ("image_ids.txt", None, "image_ids.txt"),
    "outside": ("image_ids.txt", "../x.png\n", "no path"),
    "absolute": ("image_ids.txt", "/x.png\n", "no path"),
    "hidden": ("image_ids.txt", "train/.x.png\n", "no path"),
    "plus": ("image_ids.txt", "train+x.png\n", "no path"),
    "twice": ("image_ids.txt", "train/000.kind/000.png\n" * 2, "listed twice"),
    "no file": ("image_ids.txt", "train/000.kind/9.png\n", r"9\.png"),
    "class": ("class_labels.txt", "train/000.kind/000.png,3\n", "line 1 .* 0..2"),
    "text": ("class_labels.txt", "train/000.kind/000.png,x\n", "line 1"),
    "no comma": ("class_labels.txt", "train/000.kind/000.png\n", "line 1"),
    "stranger": ("class_labels.txt", "a.png,0\n", "line 1"),
    "bare": ("class_labels.txt", "train/000.kind/000.png,0\n", "no label for image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata_is_named(tree, name):
    file, text, message = BAD[name]
    path = tree / "metadata/CUB/train" / file
    path.unlink()
    if text is not None:
        path.write_text(text)
        if file == "image_ids.txt":
            labels = "".join(f"{line},0\n" for line in text.splitlines())
            (path.parent / "class_labels.txt").write_text(labels)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset("cub", tree, "train")
    assert name == "no file" or file in str(caught.value)


def test_some_missing_images_are_counted(tree):
    (tree / "dataset/CUB/train/001.kind/001.png").unlink()
    with pytest.raises(InputError, match=r"1 have no file, the first is train/001\.kind/001\.png"):
        open_dataset("cub", tree, "train")


def test_names_that_slashes_alone_would_confuse():
    lines = Lines(["a/b c", "é/x", ""])
    assert list(lines) == ["a/b c", "é/x", ""] and lines[-2] == "é/x" and lines[:2] == lines[0:2]
    assert list(lines.showing("+")) == ["a+b c", "é+x", ""]
    with pytest.raises(IndexError):
        lines[3]


def test_memory_does_not_grow_with_images_times_classes():
    tracemalloc.start()
    labels = OneHotRows(np.zeros(200_000, np.int32), 1000)
    rows = labels[np.arange(32)]
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.shape == (32, 1000) and held < 2e6  # dense: 200 MB


def test_part_of_a_list_keeps_names_and_the_compact_form(tree):
    data = open_dataset("cub", tree, "train")
    part = Subset(data, [4, 0])
    assert list(part.ids) == [data.ids[4], data.ids[0]]
    assert isinstance(part.labels, OneHotRows) and part.class_ids.tolist() == [1, 0]
    assert part.image(0) == data.image(4)


def test_images_with_one_label_of_any_data_set():
    every = open_dataset("scenes", split="train", n_train=40)
    part = one_label(every)
    kept = [i for i in range(40) if every.labels[i].sum() == 1]
    assert 0 < len(kept) < 40 and [every.ids[i] for i in kept] == list(part.ids)
    assert (part.labels[:] == every.labels[kept]).all()
    assert (part.class_ids == every.labels[kept].argmax(1)).all()
    assert part.image(2) == every.image(kept[2])
    assert one_label(part) is part
    assert Subset(part, [3, 0]).class_ids.tolist() == part.class_ids[[3, 0]].tolist()
