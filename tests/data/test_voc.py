from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsis.data import open_dataset
from wsis.data.scan import scan
from wsis.data.voc import VOC_CLASSES
from wsis.errors import InputError


def write_image(path: Path, size=(12, 9), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write_mask(path: Path, values: np.ndarray, *, palette: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(values.astype(np.uint8))
    if palette:
        mask.putpalette(list(range(256)) * 3)
    mask.save(path)


def write_list(root: Path, split: str, lines: list[str]) -> None:
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def write_annotation(root: Path, name: str, objects: list[tuple[str, int]]) -> None:
    things = "".join(
        f"<object><name>{c}</name><difficult>{d}</difficult></object>" for c, d in objects
    )
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{things}</annotation>")


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("2007_000001", "2008_000002"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
    write_annotation(root, "2007_000001", [("dog", 0), ("person", 1)])
    write_annotation(root, "2008_000002", [("aeroplane", 0), ("tvmonitor", 0), ("aeroplane", 0)])
    write_list(root, "train", ["2007_000001"])
    write_list(
        root,
        "train_aug",
        [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in
         ("2007_000001", "2008_000002")],
    )  # fmt: skip
    own, aug = np.full((9, 12), 12), np.full((9, 12), 1)
    own[0, 0] = 255
    write_mask(root / "SegmentationClass" / "2007_000001.png", own)
    write_mask(root / "SegmentationClassAug" / "2007_000001.png", aug, palette=False)
    write_mask(root / "SegmentationClassAug" / "2008_000002.png", aug, palette=False)
    return tmp_path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg")
    write_list(tmp_path, "train", ["a", "b"])
    labels = {"classes": {"15": "person", "8": "cat"}, "labels": {"a": [15], "b": [8, 15]}}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    values = np.zeros((9, 12))
    values[2:4], values[5:7], values[8] = 8, 15, 255
    write_mask(tmp_path / "SegmentationClass" / "a.png", values)
    return tmp_path


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_devkit_is_found_in_or_below_the_root(devkit, below):
    if below == "VOCdevkit":
        assert len(open_dataset("voc", devkit / below)) == 1
    data = open_dataset("voc", devkit / below, "trainaug")
    assert data.ids == ("2007_000001", "2008_000002")
    assert data.classes == VOC_CLASSES
    assert data.mask_ids == tuple(range(1, 21))
    assert [np.flatnonzero(row).tolist() for row in data.labels] == [[11, 14], [0, 19]]
    assert data.image(0).mode == "RGB"
    assert data.image(0).size == (12, 9)
    assert not data.labels.flags.writeable


def test_devkit_prefers_voc_masks_over_sbd(devkit):
    data = open_dataset("voc", devkit, "train_aug")
    assert data.mask(0)[0, 0] == 255
    assert data.mask(0)[1, 1] == 12
    assert (data.mask(1) == 1).all()
    assert data.mask_path(0).parent.name == "SegmentationClass"
    assert data.mask_path(1).parent.name == "SegmentationClassAug"
    assert data.mask_source == "SegmentationClass+SegmentationClassAug"


def test_difficult_objects_can_be_left_out(devkit):
    data = open_dataset("voc", devkit, difficult=False)
    assert np.flatnonzero(data.labels[0]).tolist() == [11]


def test_test_split_needs_no_labels(devkit):
    write_list(devkit / "VOCdevkit/VOC2012", "test", ["2008_000002"])
    assert not open_dataset("voc", devkit, "test").labels.any()


def test_labels_from_files_agree(devkit, tmp_path):
    table = np.zeros((2, 20), np.float32)
    table[0, 3] = table[1, 5] = table[1, 6] = 1
    names = ["2008_000002", "2007_000001"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    np.save(tmp_path / "l.npy", table)
    np.savez(tmp_path / "l.npz", ids=np.array(names), labels=table)
    rows = dict(zip(names, table.tolist(), strict=True))
    (tmp_path / "l.json").write_text(json.dumps(rows))
    expected = table[::-1]
    for suffix, options in (
        ("npy", {"label_ids": tmp_path / "names.txt"}), ("npz", {}), ("json", {})
    ):  # fmt: skip
        data = open_dataset("voc", devkit, "trainaug", labels=tmp_path / f"l.{suffix}", **options)
        np.testing.assert_array_equal(data.labels, expected)
    data = open_dataset("voc", devkit, "trainaug", labels=tmp_path / "l.npy")
    np.testing.assert_array_equal(data.labels, table)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_labels_are_refused_unread(devkit, tmp_path):
    payload = np.empty((), object)
    payload[()] = {"2007_000001": Canary(tmp_path / "ran")}
    np.save(tmp_path / "cls_labels.npy", payload, allow_pickle=True)
    np.savez(tmp_path / "cls_labels.npz", ids=np.array(["a"]), labels=payload)
    for suffix in ("npy", "npz"):
        with pytest.raises(InputError, match=rf"cls_labels.{suffix}.*pickled.*JSON"):
            open_dataset("voc", devkit, labels=tmp_path / f"cls_labels.{suffix}")
    (tmp_path / "raw.npy").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(InputError, match="refused"):
        open_dataset("voc", devkit, labels=tmp_path / "raw.npy")
    assert not (tmp_path / "ran").exists()


def test_label_files_are_checked(devkit, tmp_path):
    np.save(tmp_path / "shape.npy", np.zeros((1, 21)))
    np.save(tmp_path / "value.npy", np.full((1, 20), 2))
    (tmp_path / "absent.json").write_text(json.dumps({"other": [0] * 20}))
    (tmp_path / "ragged.json").write_text(json.dumps({"2007_000001": [0], "b": [1, 1]}))
    for name, message in (
        ("shape.npy", r"expected labels \[1, 20\], got \[1, 21\]"),
        ("value.npy", "0 or 1"),
        ("absent.json", "no labels for image '2007_000001'"),
        ("ragged.json", "expected labels"),
        ("none.npy", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            open_dataset("voc", devkit, labels=tmp_path / name)


def test_flat_layout(flat):
    data = open_dataset("voc", flat)
    assert data.classes == ("cat", "person")
    assert data.mask_ids == (8, 15)
    assert data.labels.tolist() == [[0, 1], [1, 1]]
    mask = data.mask(0)
    assert mask.dtype == np.uint8
    assert [int(mask[r, 0]) for r in (0, 2, 5, 8)] == [0, 1, 2, 255]
    with pytest.raises(InputError, match=r"no mask 'b.png'"):
        data.mask(1)


def test_nothing_but_lists_and_labels_is_read_at_opening(flat):
    for path in [*flat.glob("JPEGImages/*"), *flat.glob("SegmentationClass/*")]:
        path.write_bytes(b"")
    data = open_dataset("voc", flat)
    before = data.fingerprint()
    for path in flat.glob("SegmentationClass/*"):
        path.unlink()
    (flat / "SegmentationClass").rmdir()
    data = open_dataset("voc", flat)
    assert data.fingerprint() == before
    assert not data.has_masks
    with pytest.raises(InputError, match="it has no masks"):
        data.mask(0)


def test_fingerprint_follows_ids_labels_and_classes(flat):
    seen = {open_dataset("voc", flat).fingerprint()}
    original = (flat / "labels.json").read_text()
    for old, new in (('"cat"', '"Cat"'), ('"a": [15]', '"a": [8]')):
        assert old in original
        (flat / "labels.json").write_text(original.replace(old, new))
        seen.add(open_dataset("voc", flat).fingerprint())
    (flat / "labels.json").write_text(original)
    write_list(flat, "train", ["b", "a"])
    seen.add(open_dataset("voc", flat).fingerprint())
    assert len(seen) == 4
    assert len(seen.pop()) == 64


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file is empty"),
        (["a", "zz"], r"1 of 2 listed images have no file.*zz.jpg"),
        (["a", "a"], "listed twice"),
        (["../a"], "expected an image id or /JPEGImages/ID.jpg"),
        (["/etc/passwd"], "expected an image id"),
        (["/JPEGImages/../../a.jpg"], "no image id"),
        ([".."], "no image id"),
    ],
)
def test_bad_lists(flat, lines, message):
    write_list(flat, "train", lines)
    labels = {"classes": {"8": "cat"}, "labels": {"a": [8], "zz": [8]}}
    (flat / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(InputError, match=message):
        open_dataset("voc", flat)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": {"8": "cat"}, "labels": {"a": [8], "b": [9]}}, "'b' has label 9"),
        ({"classes": {"8": "cat"}, "labels": {"a": [8]}}, "no labels for image 'b'"),
        ({"classes": {"x": "cat"}, "labels": {}}, "expected"),
        ({"classes": {"255": "cat"}, "labels": {}}, r"1\.\.254"),
        ({"labels": {}}, "expected"),
        ([], "expected"),
    ],
)
def test_bad_labels_json(flat, content, message):
    (flat / "labels.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        open_dataset("voc", flat)


def test_bad_roots_and_splits(flat, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_dataset("voc", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="JPEGImages"):
        open_dataset("voc", tmp_path / "empty")
    with pytest.raises(InputError, match=r"no list val.txt; found train"):
        open_dataset("voc", flat, "val")
    with pytest.raises(InputError, match="no image id"):
        open_dataset("voc", flat, "../train")
    with pytest.raises(InputError, match="give root"):
        open_dataset("voc")
    with pytest.raises(InputError, match="unknown data set 'vox'"):
        open_dataset("vox", flat)


def test_bad_annotations(devkit):
    folder = devkit / "VOCdevkit/VOC2012/Annotations"
    for content, message in (("<a>", "XML"), ("<a><object/></a>", "none of VOC's 20 classes")):
        (folder / "2007_000001.xml").write_text(content)
        with pytest.raises(InputError, match=message):
            open_dataset("voc", devkit)
    (folder / "2007_000001.xml").unlink()
    with pytest.raises(InputError, match=r"2007_000001.xml: no such file"):
        open_dataset("voc", devkit)


def test_bad_masks(flat):
    data = open_dataset("voc", flat)
    path = flat / "SegmentationClass" / "a.png"
    write_mask(path, np.full((9, 12), 7))
    with pytest.raises(InputError, match=r"a.png: value 7 is no class; expected one of 0, 8, 15"):
        data.mask(0)
    write_mask(path, np.zeros((12, 9)))
    with pytest.raises(InputError, match=r"a.png: expected the size of its image.*\(9, 12\)"):
        data.mask(0)
    write_image(path)
    with pytest.raises(InputError, match="got mode RGB"):
        data.mask(0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"a.png"):
        data.mask(0)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (7, 5)])
def test_odd_image_sizes(flat, size):
    write_image(flat / "JPEGImages" / "a.jpg", size)
    write_mask(flat / "SegmentationClass" / "a.png", np.full(size[::-1], 15))
    data = open_dataset("voc", flat)
    assert data.image(0).size == size
    assert (data.mask(0) == 2).all()
    assert data.mask(0).shape == size[::-1]


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "LA"])
def test_other_modes_become_rgb(flat, mode):
    image = Image.new("RGB", (12, 9), (200, 30, 90)).convert(mode)
    path = flat / "JPEGImages" / "a.jpg"
    image.save(path, format="JPEG" if mode in ("L", "CMYK") else "PNG")
    assert open_dataset("voc", flat).image(0).mode == "RGB"


def test_exif_orientation_is_not_applied_but_reported(flat):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(flat / "JPEGImages" / "a.jpg", exif=exif)
    data = open_dataset("voc", flat)
    assert data.image(0).size == (12, 9)
    problems = [p for p in scan(data, masks=False) if p.image == "a"]
    assert len(problems) == 1
    assert "EXIF orientation 6" in problems[0].message
    assert not problems[0].fatal


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("<html>404</html>")
    elif kind == "truncated png":
        write_image(path, (60, 40), format="PNG")
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "16 bit":
        Image.fromarray(np.zeros((9, 12), np.uint16)).save(path, format="PNG")
    elif kind == "bomb":
        Image.new("1", (20000, 20000)).save(path, format="PNG")


@pytest.mark.parametrize("kind", ["truncated", "empty", "html", "truncated png", "16 bit", "bomb"])
def test_bad_images_name_the_file(flat, kind):
    damage(flat / "JPEGImages" / "a.jpg", kind)
    data = open_dataset("voc", flat)
    with pytest.raises(InputError, match=r"JPEGImages/a\.jpg: "):
        data.image(0)
    problems = scan(data, masks=False)
    assert [(p.image, p.fatal) for p in problems] == [("a", True)]


def test_scan_lists_mask_problems(flat):
    data = open_dataset("voc", flat)
    messages = [(p.image, p.fatal, p.message) for p in scan(data, masks=True)]
    assert [(image, fatal) for image, fatal, _ in messages] == [("a", False), ("b", True)]
    assert "the mask has cat" in messages[0][2]
    assert "no mask 'b.png'" in messages[1][2]


def test_voc_animals(shared_data):
    root = shared_data / "voc-animals"
    train, val = open_dataset("voc", root), open_dataset("voc", root, "val")
    assert train.classes == ("cat", "cow", "dog", "horse", "person", "sheep")
    assert train.mask_ids == (8, 10, 12, 13, 15, 17)
    assert train.labels.sum(0).tolist() == [174, 150, 253, 182, 266, 166]
    assert val.labels.sum(0).tolist() == [48, 34, 55, 39, 38, 28]
    assert (len(train), len(val)) == (905, 201)
    assert scan(val, masks=True) == []
    raw = np.array(Image.open(val.mask_path(3)))
    mask = val.mask(3)
    for internal, stored in enumerate((0, *val.mask_ids)):
        np.testing.assert_array_equal(mask == internal, raw == stored)
    np.testing.assert_array_equal(mask == 255, raw == 255)
