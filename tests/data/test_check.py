"""`wsis data check`: what it finds, what it advises, how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsis.cli import main
from wsis.data.check import CURES, check, find_splits, format_check, guess_kind
from wsis.errors import InputError


def photograph(path: Path, seed: int, size=(40, 36), mode: str = "RGB", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training and two val images of two classes with masks, all in order."""
    base = tmp_path / "set"
    lists = {"train": ["a", "b", "c"], "val": ["d", "e"]}
    labels = {"a": [1], "b": [2], "c": [1, 2], "d": [1], "e": [2]}
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    (base / "SegmentationClass").mkdir()
    for split, names in lists.items():
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            photograph(base / "JPEGImages" / f"{name}.jpg", ord(name))
            mask = np.zeros((36, 40), np.uint8)
            for row, kind in enumerate(labels[name]):
                mask[row * 9 : row * 9 + 9] = kind
            Image.fromarray(mask).save(base / "SegmentationClass" / f"{name}.png")
    content = {"classes": {"1": "cat", "2": "dog"}, "labels": labels}
    (base / "labels.json").write_text(json.dumps(content))
    return base


def kinds(root: Path) -> dict[str, tuple[str, str, bool]]:
    return {p.kind: (split, p.image, p.fatal) for split, p in check(root).problems}


def test_all_is_well(root):
    result = check(root)
    rare = [p.kind for _, p in result.problems]
    assert rare == ["rare class"]
    train = result.splits["train"]
    assert (train.images, train.without_labels, train.masks) == (3, 0, 3)
    assert train.label_counts == {"cat": 2, "dog": 2}
    assert train.smallest == train.largest == (36, 40) and train.modes == {"RGB": 3}
    assert train.pixel_shares == {
        "background": pytest.approx(1 - 4 * 9 / (3 * 36)),
        "cat": pytest.approx(2 * 9 / (3 * 36)),
        "dog": pytest.approx(2 * 9 / (3 * 36)),
    }


def truncate(root: Path) -> None:
    path = root / "JPEGImages" / "b.jpg"
    path.write_bytes(path.read_bytes()[:-300])


def stray_mask_value(root: Path) -> None:
    Image.fromarray(np.full((36, 40), 9, np.uint8)).save(root / "SegmentationClass" / "e.png")


def wrong_mask_size(root: Path) -> None:
    Image.new("L", (40, 35)).save(root / "SegmentationClass" / "d.png")


def remove_mask(root: Path) -> None:
    (root / "SegmentationClass" / "e.png").unlink()


def remove_training_mask(root: Path) -> None:
    (root / "SegmentationClass" / "a.png").unlink()


def rotate(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    photograph(root / "JPEGImages" / "a.jpg", 1, exif=exif)


def print_colours(root: Path) -> None:
    photograph(root / "JPEGImages" / "a.jpg", 1, mode="CMYK")


def rename_gif(root: Path) -> None:
    photograph(root / "JPEGImages" / "a.jpg", 1, mode="P", format="GIF")


def shrink(root: Path) -> None:
    photograph(root / "JPEGImages" / "e.jpg", 5, (8, 30))
    Image.fromarray(np.full((30, 8), 2, np.uint8)).save(root / "SegmentationClass" / "e.png")


def forget_label(root: Path) -> None:
    content = json.loads((root / "labels.json").read_text())
    content["labels"] |= {"c": [1], "e": [1, 2]}
    (root / "labels.json").write_text(json.dumps(content))


def drop_labels(root: Path) -> None:
    content = json.loads((root / "labels.json").read_text())
    content["labels"] |= {"b": [], "c": [1]}
    (root / "labels.json").write_text(json.dumps(content))


def list_twice(root: Path) -> None:
    (root / "ImageSets/Segmentation/val.txt").write_text("d\ne\na\n")


def copy_across(root: Path) -> None:
    shutil.copy(root / "JPEGImages/a.jpg", root / "JPEGImages/d.jpg")


def copy_within(root: Path) -> None:
    shutil.copy(root / "JPEGImages/a.jpg", root / "JPEGImages/b.jpg")


def list_absent(root: Path) -> None:
    (root / "ImageSets/Segmentation/val.txt").write_text("d\nnone\n")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (truncate, {"unreadable image": ("train", "b", True)}),
        (stray_mask_value, {"bad mask": ("val", "e", True)}),
        (wrong_mask_size, {"bad mask": ("val", "d", True)}),
        (remove_mask, {"missing mask": ("val", "e", True)}),
        (remove_training_mask, {"missing mask": ("train", "a", False)}),
        (rotate, {"EXIF orientation": ("train", "a", False)}),
        (print_colours, {"image mode": ("train", "a", False)}),
        (rename_gif, {"image format": ("train", "a", False), "image mode": ("train", "a", False)}),
        (shrink, {"small image": ("val", "", False)}),
        (
            forget_label,
            {
                "class in mask, not in labels": ("train", "c", False),
                "class in labels, not in mask": ("val", "e", False),
            },
        ),
        (
            drop_labels,
            {
                "class in mask, not in labels": ("train", "c", False),
                "image without labels": ("train", "", False),
                "class without images": ("train", "", False),
            },
        ),
        (list_twice, {"image in two splits": ("val", "a", True)}),
        (copy_across, {"same file in two splits": ("val", "a", True)}),
        (copy_within, {"same file twice": ("train", "a", False)}),
        (list_absent, {"unreadable split": ("val", "", True)}),
    ],
)
def test_every_finding_has_its_cure(root, spoil, expected, capsys):
    spoil(root)
    found = kinds(root)
    assert found.pop("rare class") == ("train", "", False)
    assert found == expected
    fatal = any(entry[2] for entry in expected.values())
    assert main(["data", "check", str(root)]) == (1 if fatal else 0)
    printed = capsys.readouterr().out
    for kind in expected:
        assert f"{'error' if expected[kind][2] else 'note'}: {kind}: " in printed
        assert f"cure: {CURES[kind]}" in printed


def test_damaged_exif_is_a_note(root):
    path = root / "JPEGImages" / "a.jpg"
    data = path.read_bytes()
    tags = b"Exif\0\0" + b"XX*\0" + bytes(20)
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(tags) + 2).to_bytes(2, "big") + tags + data[2:])
    assert not any(found[2] for found in kinds(root).values())


def test_overlap_by_design_is_none(root):
    (root / "ImageSets/Segmentation/trainval.txt").write_text("a\nb\nc\nd\ne\n")
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("a\nb\nc\n")
    result = check(root)
    assert list(result.splits) == ["train", "val", "trainaug", "trainval"]
    assert result.errors == 0
    assert result.splits["trainval"].masks == 5


def test_report_names_unreadable_files(root, tmp_path, capsys):
    truncate(root)
    out = tmp_path / "report.json"
    flags = ["--dataset", "voc", "--root", str(root), "--split", "train", "--threads", "1"]
    assert main(["data", "check", *flags, "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["unreadable"] == [str(root / "JPEGImages" / "b.jpg")]
    assert report["errors"] == 1 and list(report["splits"]) == ["train"]
    assert report["problems"][0]["kind"] == "unreadable image"
    assert report["cures"].keys() == {"unreadable image", "rare class"}
    assert "1 errors, 1 notes" in capsys.readouterr().out


def test_threads_do_not_change_the_result(root):
    truncate(root)
    forget_label(root)
    assert check(root, threads=1).as_dict() == check(root, threads=4).as_dict()


def test_mistakes(root, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "absent")], "no such folder"),
        ([str(tmp_path)], "no data set found"),
        ([str(root), "--root", str(root)], "give the folder once"),
        ([], "give the folder"),
        ([str(root), "--split", "tset"], "no list tset.txt"),
        ([str(root), "--out", str(tmp_path / "no" / "r.json")], "does not exist"),
    ):
        assert main(["data", "check", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1


def test_a_folder_with_csv(root):
    shutil.rmtree(root / "ImageSets")
    (root / "JPEGImages").rename(root / "images")
    (root / "train.csv").write_text("image,labels\nimages/a.jpg,cat\nimages/b.jpg,dog\n")
    assert guess_kind(root) == "folder" and find_splits(root, "folder") == ["train"]
    assert check(root).splits["train"].label_counts == {"cat": 1, "dog": 1}


def test_many_findings_are_shortened(root):
    for name in "abc":
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(b"")
    text = format_check(check(root), shown=2)
    assert "error: unreadable image: 3" in text and "and 1 more" in text
    assert "/b.jpg: " in text and "c.jpg" not in text and "3 errors" in text


def test_no_folder_is_known(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        guess_kind(tmp_path / "absent")


def test_coco_mini(shared_data):
    root = shared_data / "coco-mini"
    assert guess_kind(root) == "coco"
    result = check(root, splits=["train"])
    assert result.errors == 0
    assert result.splits["train"].masks == 81
    assert len(result.splits["train"].pixel_shares) == 81
    assert "rarest of 80 classes" in format_check(result)
