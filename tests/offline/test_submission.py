from __future__ import annotations

import hashlib
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from wsis.cli import main
from wsis.data.dataset import open_dataset
from wsis.errors import InputError
from wsis.offline.masks import voc_palette, write_mask
from wsis.offline.submission import remaining, write_submission


@pytest.fixture
def dataset(tmp_path):
    """A devkit with two test images; the test list has no labels."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, size in {"2008_000006": (7, 5), "2008_000011": (4, 6)}.items():
        Image.new("RGB", size).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets/Segmentation/test.txt").write_text("2008_000006\n2008_000011\n")
    return open_dataset("voc", root, "test")


def mask_of(index):
    mask = np.zeros([(5, 7), (6, 4)][index], np.uint8)
    mask[0, :3] = (1, 15, 20)
    return mask


def masks():
    return map(mask_of, range(2))


@pytest.mark.parametrize("competition", [5, 6])
def test_what_the_server_wants(dataset, tmp_path, competition):
    archive = write_submission(dataset, masks(), tmp_path / "out", competition=competition)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "server", filter="data")
    folder = f"results/VOC2012/Segmentation/comp{competition}_test_cls"
    files = sorted((tmp_path / "server").rglob("*.png"))
    names = [file.relative_to(tmp_path / "server").as_posix() for file in files]
    assert names == [f"{folder}/{name}.png" for name in dataset.ids]
    for index, file in enumerate(files):
        with Image.open(file) as picture:
            assert picture.mode == "P"
            assert picture.size == dataset.image(index).size
            assert np.array_equal(np.array(picture), mask_of(index))
            assert picture.getpalette() == voc_palette().ravel().tolist()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    for name, file in zip(names, files, strict=True):
        assert manifest["files"][name] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_archive_depends_on_the_masks_alone(dataset, tmp_path):
    first, second = (write_submission(dataset, masks(), tmp_path / x) for x in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((5, 4), np.uint8), "5 x 7"),
        (np.full((5, 7), 255, np.uint8), "255"),
        (np.full((5, 7), 21, np.uint8), "21"),
    ],
)
def test_a_mask_the_server_would_refuse_is_named(dataset, tmp_path, mask, message):
    with pytest.raises(InputError, match=message) as caught:
        write_submission(dataset, iter([mask, mask]), tmp_path)
    assert "2008_000006" in str(caught.value)
    assert not (tmp_path / "results.tgz").exists()


def test_a_stopped_submission_goes_on(dataset, tmp_path):
    about = {"run": "a", "protocol": {"scales": (1.0,)}}

    def stopped():
        yield mask_of(0)
        raise KeyboardInterrupt

    assert remaining(dataset, tmp_path, about=about) == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        write_submission(dataset, stopped(), tmp_path, about=about)
    assert not (tmp_path / "results.tgz").exists()
    todo = remaining(dataset, tmp_path, about=about)
    assert todo == [1]
    resumed = write_submission(dataset, [mask_of(1)], tmp_path, todo=todo, about=about)
    straight = write_submission(dataset, masks(), tmp_path / "straight", about=about)
    assert resumed.read_bytes() == straight.read_bytes()
    assert remaining(dataset, tmp_path, about=about) == []
    again = write_submission(dataset, [], tmp_path, todo=[], about=about)
    assert again.read_bytes() == straight.read_bytes()


def test_masks_of_two_origins_never_meet(dataset, tmp_path):
    for change in ({"run": "b"}, {"run": "a", "weights": "other"}, {"competition": 5}):
        remaining(dataset, tmp_path, about={"run": "a"})
        write_submission(dataset, masks(), tmp_path, about={"run": "a"})
        options = {"competition": change.get("competition", 6)}
        about = {"run": "a"} | {k: v for k, v in change.items() if k != "competition"}
        assert remaining(dataset, tmp_path, about=about, **options) == [0, 1]
        assert not (tmp_path / "results.tgz").exists()
        assert not (tmp_path / "manifest.json").exists()
        assert remaining(dataset, tmp_path, about={"run": "a"}) == [0, 1]
    remaining(dataset, tmp_path, about={"run": "a"})
    write_submission(dataset, masks(), tmp_path, about={"run": "a"})
    assert remaining(dataset, tmp_path, about={"run": "a"}, anew=True) == [0, 1]


def test_masks_that_lay_there_are_checked_too(dataset, tmp_path):
    path = tmp_path / "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"
    write_mask(path, np.full((5, 7), 255, np.uint8), dataset.mask_ids)
    with pytest.raises(InputError, match=r"2008_000006.*255 is none"):
        write_submission(dataset, [mask_of(1)], tmp_path, todo=[1])
    write_mask(path, np.zeros((5, 6), np.uint8), dataset.mask_ids)
    with pytest.raises(InputError, match=r"2008_000006.*must be 5 x 7"):
        write_submission(dataset, [mask_of(1)], tmp_path, todo=[1])
    path.unlink()
    with pytest.raises(InputError, match=r"2008_000006\.png"):
        write_submission(dataset, [mask_of(1)], tmp_path, todo=[1])
    assert not (tmp_path / "results.tgz").exists()


def test_other_data_and_competitions_are_refused(dataset, tmp_path):
    with pytest.raises(InputError, match="competition"):
        write_submission(dataset, masks(), tmp_path, competition=4)
    with pytest.raises(InputError, match="scenes"):
        write_submission(open_dataset("scenes", split="val", n_val=2), masks(), tmp_path)


def test_command_with_stored_masks(dataset, tmp_path, capsys):
    folder, out = tmp_path / "masks", tmp_path / "out"
    for index, name in enumerate(dataset.ids):
        write_mask(folder / f"{name}.png", mask_of(index), dataset.mask_ids)
    arguments = ["submit", "--masks", str(folder), "--root", dataset.root, "--out", str(out)]
    assert main(arguments) == 0
    assert "1456 images" in capsys.readouterr().out
    assert (out / "results.tgz").exists()
    there = out / "results/VOC2012/Segmentation/comp6_test_cls"
    assert main(["submit", "--masks", str(there), "--root", dataset.root, "--out", str(out)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert len(list(there.glob("*.png"))) == 2  # its own input is not removed
    assert main([*arguments, "--protocol", "voc-toco"]) == 2
    assert "packed as they are" in capsys.readouterr().err
    assert main([*arguments, "--crf", "psa"]) == 2
    assert "wsis refine" in capsys.readouterr().err
    assert main(["submit", "run", "--crf", "psaa"]) == 2
    assert "psaa" in capsys.readouterr().err
    (folder / "2008_000011.png").unlink()
    assert main(arguments) == 2
    assert "1 of 2 masks are missing, the first is 2008_000011.png" in capsys.readouterr().err
    assert main(["submit"]) == 2
