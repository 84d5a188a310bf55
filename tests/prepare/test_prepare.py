"""`wsis data prepare`: what it builds is what the data sets open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.prepare.archives import (
    CUB_ROWS,
    VOC,
    coco_archives,
    cub_archive,
    half,
    jpeg,
    mat,
    pack_tar,
    sbd_files,
    voc_archives,
    voc_files,
)
from wsis.cli import main
from wsis.data import open_dataset
from wsis.data.check import check
from wsis.data.coco import MASK_MAKER, maker_hash
from wsis.data.dataset import read_mask
from wsis.data.localization import read_metadata
from wsis.errors import InputError, MissingExtraError
from wsis.prepare.coco import prepare_coco
from wsis.prepare.cub import prepare_cub
from wsis.prepare.sbd import prepare_sbd, read_sbd
from wsis.prepare.voc import KNOWN, prepare_voc


def tree(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def record(root: Path, kind: str) -> dict:
    return json.loads((root / f"prepare-{kind}.json").read_text())


def test_voc_from_archives(tmp_path):
    source, out = voc_archives(tmp_path / "downloads"), tmp_path / "data"
    made = prepare_voc(source, out, partial=True)
    assert made.root == out / VOC
    assert not list(out.rglob("SegmentationObject")) and not list(out.rglob("Main"))
    files = voc_files()
    for name, data in tree(out).items():
        if name in files:
            assert data == files[name]
    train = open_dataset("voc", out)
    assert train.ids == ("2007_000001", "2007_000002")
    assert [train.classes[row.argmax()] for row in train.labels] == ["dog", "cat"]
    np.testing.assert_array_equal(train.mask(0), half(12))
    assert len(open_dataset("voc", out, "test")) == 2
    labels = open_dataset("voc", out, "val", labels=out / VOC / "cls_labels.npz").labels
    np.testing.assert_array_equal(labels, open_dataset("voc", out, "val").labels)
    assert check(out).errors == 0
    kept = record(made.root, "voc")
    assert kept["counts"] == {
        "VOC list train": 2, "VOC list val": 1, "VOC list trainval": 3, "VOC list test": 2
    }  # fmt: skip
    assert len(kept["warnings"]) == 4 and "expected 1464 images, got 2" in kept["warnings"][0]
    assert kept["lists"].keys() == KNOWN.keys()


def test_voc_in_place_equals_from_archives(tmp_path):
    source = voc_archives(tmp_path / "a", test=False)
    prepare_voc(source, partial=True)
    unpacked = tmp_path / "b"
    for name, data in voc_files().items():
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(data)
    assert prepare_voc(unpacked, partial=True).root == unpacked / VOC
    assert prepare_voc(unpacked / VOC, partial=True).root == unpacked / VOC
    first, second = tree(source / VOC), tree(unpacked / VOC)
    assert first.items() <= second.items()
    with pytest.raises(InputError, match="in place; drop --out"):
        prepare_voc(unpacked, tmp_path / "c", partial=True)


def test_known_counts_are_demanded(tmp_path, capsys):
    source = voc_archives(tmp_path / "downloads")
    assert main(["data", "prepare", "voc", str(source)]) == 2
    captured = capsys.readouterr()
    assert "VOC list train: expected 1464 images, got 2" in captured.err
    assert "--partial true" in captured.err
    assert not (source / VOC / "prepare-voc.json").exists()
    assert main(["data", "prepare", "voc", str(source), "--partial", "true"]) == 0
    captured = capsys.readouterr()
    assert "warning: VOC list val: expected 1449 images, got 1" in captured.out
    assert "ready: " in captured.out


def test_an_interrupted_preparation_goes_on(tmp_path):
    source, out = voc_archives(tmp_path / "downloads"), tmp_path / "data"
    prepare_voc(source, out, partial=True)
    whole, images = tree(out / VOC), out / VOC / "JPEGImages"
    times = {path: path.stat().st_mtime_ns for path in images.iterdir()}
    (images / "2007_000001.jpg").unlink()
    (images / "2007_000003.jpg").write_bytes(b"half")
    (images / ".2007_000002.jpg.part").write_bytes(b"half")
    prepare_voc(source, out, partial=True)
    (images / ".2007_000002.jpg.part").unlink(missing_ok=True)
    assert tree(out / VOC) == whole
    kept = images / "2008_000004.jpg"
    assert kept.stat().st_mtime_ns == times[kept]


def test_listed_images_need_their_files(tmp_path):
    files = voc_files()
    del files[f"{VOC}/SegmentationClass/2007_000002.png"]
    pack_tar(tmp_path / "VOCtrainval_11-May-2012.tar", files)
    with pytest.raises(InputError, match=r"1 of 2 images of list train .*2007_000002\.png"):
        prepare_voc(tmp_path, partial=True)


def test_sbd(tmp_path):
    source = voc_archives(tmp_path, test=False)
    pack_tar(source / "benchmark.tgz", sbd_files())
    made = prepare_sbd(source, partial=True)
    data = open_dataset("voc", source, "trainaug")
    assert data.ids == ("2007_000001", "2007_000002", "2008_000004", "2008_000005")
    masks = sorted(path.name for path in (made.root / "SegmentationClassAug").iterdir())
    assert masks == ["2008_000004.png", "2008_000005.png"]
    np.testing.assert_array_equal(data.mask(0), half(12))  # VOC's own, where both have one
    np.testing.assert_array_equal(data.mask(2), half(12))
    np.testing.assert_array_equal(data.mask(3), half(17))
    assert [data.classes[row.argmax()] for row in data.labels] == ["dog", "cat", "dog", "sheep"]
    kept = record(made.root, "sbd")
    assert kept["counts"] == {"SBD masks": 4, "list trainaug": 4}
    assert "expected 10582 images, got 4" in " ".join(kept["warnings"])
    with Image.open(made.root / "SegmentationClassAug" / masks[0]) as mask:
        assert mask.mode == "P"
    assert check(source).errors == 0


def test_sbd_unpacked_equals_archive_and_replaces_other_masks(tmp_path):
    source = voc_archives(tmp_path, test=False)
    for name, data in sbd_files().items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    made = prepare_sbd(source, partial=True)
    first = tree(made.root / "SegmentationClassAug")
    Image.fromarray(half(3)).save(made.root / "SegmentationClassAug" / "2008_000004.png")
    pack_tar(source / "benchmark.tgz", sbd_files())
    again = prepare_sbd(source, partial=True)
    assert tree(made.root / "SegmentationClassAug") == first
    assert "SegmentationClassAug: 1 other masks were replaced" in again.warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark_RELEASE/dataset/cls/2008_000005.mat": None}, "no cls/.*2008_000005"),
        ({"benchmark_RELEASE/dataset/cls/2008_000005.mat": mat(half(21))}, "mask .* of 0..20"),
        ({"benchmark_RELEASE/dataset/cls/2008_000005.mat": b"MATLAB"}, "expected GTcls"),
        (
            {"benchmark_RELEASE/dataset/cls/2008_000005.mat": mat(half(3, (10, 10)))},
            "expected the size",
        ),
    ],
)
def test_bad_sbd(tmp_path, change, message):
    source = voc_archives(tmp_path, test=False)
    files = sbd_files() | change
    pack_tar(source / "benchmark.tgz", {n: data for n, data in files.items() if data is not None})
    with pytest.raises(InputError, match=message):
        prepare_sbd(source, partial=True)


def test_a_mat_bomb_is_refused():
    bomb = mat(np.zeros((4200, 4200), np.uint8))
    assert len(bomb) < 200_000
    with pytest.raises(InputError, match="unpacks to more than"):
        read_sbd(bomb, "cls/x.mat")
    with pytest.raises(InputError):
        read_sbd(mat(half(1))[:-20], "cls/x.mat")
    # The parts of a file together; and one whose mark scipy takes for the other byte order.
    head, part = bomb[:128], mat(np.zeros((2100, 2100), np.uint8))[128:]
    with pytest.raises(InputError, match="unpacks to more than"):
        read_sbd(head + 4 * part, "cls/x.mat")
    size = len(bomb) - 136
    other = head[:124] + b"\1\0XX" + (15).to_bytes(4, "big") + size.to_bytes(4, "big") + bomb[136:]
    with pytest.raises(InputError, match="unpacks to more than"):
        read_sbd(other, "cls/x.mat")


def test_sbd_needs_scipy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(MissingExtraError, match=r"scipy.*\.\[data\]"):
        read_sbd(b"", "x.mat")


def test_coco(tmp_path):
    source, out = coco_archives(tmp_path / "downloads"), tmp_path / "data"
    made = prepare_coco(source, out, partial=True, processes=1)
    train, val = open_dataset("coco", out), open_dataset("coco", out, "val")
    assert len(train) == 4 and len(val) == 3  # the image without annotations is dropped
    assert train.classes == ("person", "car", "brush")
    assert open_dataset("coco", out, "val_part").ids == val.ids
    lists = out / "ImageSets" / "Segmentation"
    assert open_dataset("coco", out, "train_fit").ids == train.ids
    assert not (lists / "train_tune.txt").exists()  # 4 images: not one of 41
    assert (lists / "train.txt").read_text().split() == list(train.ids)
    for data in (train, val):
        for i, name in enumerate(data.ids):
            stored = read_mask(out / "SegmentationClass" / f"{name}.png")
            np.testing.assert_array_equal(stored, data.mask(i))
    assert set(np.unique(train.mask(0))) == {0, 1, 255}
    kept = record(out, "coco")
    assert kept["mask_maker"] == {"name": MASK_MAKER, "hash": maker_hash()}
    assert kept["counts"]["COCO train, all"] == 5
    assert kept["counts"]["COCO train, with labels"] == 4
    assert maker_hash() in train.mask_source and kept["annotations"]["train"][:12] in (
        train.mask_source
    )
    assert made.root == out and check(out).errors == 0
    assert not list(out.rglob("captions*"))


def test_coco_masks_of_another_maker_stay(tmp_path):
    source = coco_archives(tmp_path)
    prepare_coco(source, partial=True, processes=1)
    folder = source / "SegmentationClass"
    one = folder / "COCO_train2014_000000000001.png"
    before = one.read_bytes()
    one.unlink()
    prepare_coco(source, partial=True, processes=1)
    assert one.read_bytes() == before
    (folder / "maker.json").write_text('{"name": "another"}')
    with pytest.raises(InputError, match="another rule"):
        prepare_coco(source, partial=True, processes=1)
    (folder / "maker.json").unlink()
    with pytest.raises(InputError, match=r"unknown maker.*--masks false"):
        prepare_coco(source, partial=True, processes=1)
    prepare_coco(source, partial=True, masks=False)


def test_coco_painted_by_two_processes(tmp_path, shared_data):
    """`coco-mini` in COCO's own layout, painted in parallel, equals what is painted on demand."""
    mini = shared_data / "coco-mini"
    content = json.loads((mini / "instances.json").read_text())
    for split in ("train", "val"):
        (tmp_path / f"{split}2014").mkdir(parents=True)
        chosen = [i for i in content["images"] if f"_{split}2014_" in i["file_name"]]
        chosen = chosen[: 9 if split == "val" else None]
        for image in chosen:
            file = image["file_name"]
            (tmp_path / f"{split}2014" / file).symlink_to(mini / "JPEGImages" / file)
        ids = {image["id"] for image in chosen}
        part = content | {
            "images": chosen,
            "annotations": [a for a in content["annotations"] if a["image_id"] in ids],
        }
        path = tmp_path / "annotations" / f"instances_{split}2014.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(part))
    made = prepare_coco(tmp_path, partial=True, processes=2)
    assert made.counts["COCO train, with labels"] == 81
    assert made.counts["COCO val, with labels"] == 9
    tune = open_dataset("coco", tmp_path, "train_tune").ids
    fit = open_dataset("coco", tmp_path, "train_fit").ids
    assert len(tune) == 1 and len(fit) == 80 and not {*tune} & {*fit}
    data, flat = open_dataset("coco", tmp_path), open_dataset("coco", mini)
    assert data.ids == flat.ids
    for i in range(0, len(data), 10):
        stored = read_mask(tmp_path / "SegmentationClass" / f"{data.ids[i]}.png")
        np.testing.assert_array_equal(stored, flat.mask(i))


def test_cub(tmp_path):
    source, out = cub_archive(tmp_path / "downloads"), tmp_path / "data"
    prepare_cub(source, out, partial=True)
    for split, flag in (("train", 1), ("test", 0)):
        folder = out / "metadata" / "CUB" / split
        rows = [(n, row) for n, row in enumerate(CUB_ROWS, 1) if row[2] == flag]
        truth = read_metadata(folder)
        assert truth.ids == tuple(row[0] for _, row in rows)
        assert truth.sizes.tolist() == [[50 + n, 40] for n, _ in rows]
        boxes = [[int(x), int(y), int(x + w), int(y + h)] for _, (_, _, _, (x, y, w, h)) in rows]
        assert truth.boxes.tolist() == boxes
        labels = (folder / "class_labels.txt").read_text().splitlines()
        assert labels == [f"{row[0]},{row[1] - 1}" for _, row in rows]
        assert all((out / "CUB_200_2011" / "images" / name).is_file() for name in truth.ids)
    first = (out / "metadata/CUB/train/localization.txt").read_text().splitlines()[0]
    # as wsolevaluation's own file has it
    assert first.endswith("Black_Footed_Albatross_0009_34.jpg,139,30,292,294")
    assert not list(out.rglob("parts*"))
    data = open_dataset("cub", out)
    assert [data.classes[k] for k in data.labels[[0, 1]].argmax(1)] == [
        "001.Black_footed_Albatross", "002.Laysan_Albatross"
    ]  # fmt: skip
    assert data.image(0).size == (52, 40)
    checked = check(out)
    assert (checked.kind, list(checked.splits), checked.errors) == ("cub", ["train", "test"], 0)
    again = prepare_cub(out / "CUB_200_2011", partial=True)
    assert again.root == out


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("images.txt", "1 ../../x/y.jpg\n", "list other images"),
        ("images.txt", "1 a/b.jpg 7\n", "expected a number and 1 values"),
        ("image_class_labels.txt", "1 1\n2 1\n3 9\n4 2\n", "no class of 1..2"),
        ("classes.txt", "1 a\n3 b\n", "numbered from 1"),
        ("bounding_boxes.txt", "1 0 0 x 1\n2 0 0 1 1\n3 0 0 1 1\n4 0 0 1 1\n", "is no box"),
        (
            "images.txt",
            "1 ../x/y.jpg\n2 a/b.jpg\n3 a/c.jpg\n4 a/d.jpg\n",
            "no path CLASS/IMAGE.jpg",
        ),
    ],
)
def test_bad_cub(tmp_path, file, text, message):
    prepare_cub(cub_archive(tmp_path), partial=True)
    (tmp_path / "CUB_200_2011.tgz").unlink()
    (tmp_path / "CUB_200_2011" / file).write_text(text)
    with pytest.raises(InputError, match=message):
        prepare_cub(tmp_path, partial=True)


@pytest.mark.parametrize("kind", ["voc", "sbd", "coco", "cub"])
def test_nothing_there(kind, tmp_path, capsys):
    for path, message in ((tmp_path, "expected "), (tmp_path / "absent", "no such folder")):
        assert main(["data", "prepare", kind, str(path)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1


def test_an_archive_may_be_named_itself(tmp_path):
    source = voc_archives(tmp_path, test=False)
    made = prepare_voc(source / "VOCtrainval_11-May-2012.tar", partial=True)
    assert made.root == source / VOC
    assert "no list test" in made.warnings[-1]
    assert (made.root / "JPEGImages/2007_000001.jpg").read_bytes() == jpeg("2007_000001")
