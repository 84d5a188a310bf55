"""A folder of maps to a folder of masks: by every method, in workers, resumed, in shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsis.cli import main
from wsis.errors import InputError
from wsis.offline.crf import crf_of_labels, crf_of_scores
from wsis.offline.masks import write_mask
from wsis.offline.refine import Refinement, refine_maps
from wsis.offline.refine_folder import SETTINGS, _plan, _run_on_gpu, refine_folder
from wsis.offline.stored import StoredMaps

ROOT = Path(__file__).parents[2]
COLOURS = np.array([[90, 90, 90], [220, 30, 30], [30, 220, 30]], np.uint8)
IDS = (15, 3)  # internal numbers of the classes 16 and 4


def scene(seed, size=(48, 60)):
    """An image of two rectangles on grey, its mask of class ids, and noisy maps of them."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(size, np.uint8)
    y, x = rng.integers(4, 16, 2)
    truth[y : y + 18, x : x + 14] = 1
    truth[y + 4 : y + 26, x + 20 : x + 36] = 2
    noise = rng.integers(-12, 13, (*size, 3))
    image = np.clip(COLOURS[truth].astype(int) + noise, 0, 255).astype(np.uint8)
    planes = np.stack([truth == 1, truth == 2]).astype(np.float32)
    coarse = torch.nn.functional.avg_pool2d(torch.from_numpy(planes)[None], 4)[0].numpy()
    maps = np.clip(coarse + rng.normal(0, 0.15, coarse.shape), 0, 1).astype(np.float32)
    return image, np.array([0, IDS[0] + 1, IDS[1] + 1], np.uint8)[truth], maps


def enlarge(maps, image):
    size = image.shape[:2]
    return torch.nn.functional.interpolate(torch.from_numpy(maps)[None], size, mode="bilinear")[0]


@pytest.fixture
def folders(tmp_path):
    """Five images with the dictionaries of PSA, one of IRN, one plain array, one label image."""
    (tmp_path / "images").mkdir()
    (tmp_path / "maps").mkdir()
    for seed in range(8):
        image, truth, maps = scene(seed)
        Image.fromarray(image).save(tmp_path / "images" / f"im{seed}.png")
        path = tmp_path / "maps" / f"im{seed}.npy"
        if seed < 5:
            np.save(path, dict(zip(IDS, maps, strict=True)))
        elif seed == 5:
            np.save(path, {"keys": torch.tensor(IDS), "cam": torch.from_numpy(maps)})
        elif seed == 6:
            full = np.zeros((20, *maps.shape[1:]), np.float32)
            full[list(IDS)] = maps
            np.save(path, full)
        else:
            write_mask(path.with_suffix(".png"), truth, range(1, 255))
    Image.fromarray(scene(99)[0]).save(tmp_path / "images" / "without_maps.jpg")
    return tmp_path


def masks_of(folder):
    return {p.stem: np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))}


def run(folders, out="out", how=None, workers=0, **options):
    return refine_folder(
        folders / "images",
        folders / "maps",
        folders / out,
        how or Refinement("pamr"),
        device="cpu",
        workers=workers,
        **options,
    )


def accuracy(masks):
    share = [np.mean(mask == scene(int(name[2:]))[1]) for name, mask in masks.items()]
    return float(np.mean(share))


# -- one image -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["crf", "pamr", "par", "varm"])
def test_methods_mend_noisy_maps(method):
    plain, mended = [], []
    for seed in range(3):
        image, truth, maps = scene(seed)
        stored = StoredMaps(IDS, maps)
        for how, list_ in ((Refinement("none"), plain), (Refinement(method), mended)):
            mask = refine_maps(image, stored, how, "cpu")
            assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 4, 16}
            list_.append(np.mean(mask == truth))
    assert np.mean(mended) > np.mean(plain) + 0.01
    assert np.mean(mended) > 0.93


def test_kinds_agree():
    image, _, maps = scene(1)
    cams = refine_maps(image, StoredMaps(IDS, maps), Refinement("none"), "cpu")
    fine = enlarge(maps, image)
    planes = torch.cat([(1 - fine.amax(0, keepdim=True)) ** 4, fine])
    probs = refine_maps(
        image,
        StoredMaps((16, 0, 4), planes[[1, 0, 2]].numpy()),  # in any order
        Refinement("none", kind="probs"),
        "cpu",
    )
    np.testing.assert_array_equal(cams, probs)
    logits = refine_maps(
        image,
        StoredMaps((0, 16, 4), (planes.log() + 7).clamp(min=-50).numpy()),
        Refinement("none", kind="logits"),
        "cpu",
    )
    np.testing.assert_array_equal(cams, logits)


def test_background_constant():
    image, _, maps = scene(2)
    stored = StoredMaps(IDS, maps)
    everything = refine_maps(image, stored, Refinement("none", background=1.0), "cpu")
    assert not everything.any()
    nothing = refine_maps(image, stored, Refinement("none", background=0.0), "cpu")
    assert np.mean(nothing > 0) > 0.9


def test_crf_takes_what_its_preset_takes():
    image, _, maps = scene(3)
    fine = enlarge(maps, image)
    planes = torch.cat([torch.full((1, *image.shape[:2]), 0.3), fine])
    ids = np.array([0, 16, 4], np.uint8)
    for preset in ("psa", "irn-label", "toco"):
        how = Refinement("crf", preset, background=0.3, iterations=4)
        found = refine_maps(image, StoredMaps(IDS, maps), how, "cpu")
        by_hand = (
            crf_of_labels(image, planes.argmax(0), 3, preset, iterations=4)
            if preset == "irn-label"
            else crf_of_scores(image, planes, preset, iterations=4)
        )
        np.testing.assert_array_equal(found, ids[by_hand.numpy()])


def test_crf_of_an_image_is_the_drop_ins():
    from wsis.compat import crf_inference, crf_inference_label

    image, _, maps = scene(4)
    planes = np.concatenate([np.full((1, 12, 15), 0.3, np.float32), maps]).repeat(4, 1).repeat(4, 2)
    found = crf_of_scores(image, torch.from_numpy(planes), "psa").numpy()
    assert np.mean(found == crf_inference(image, planes, labels=3).argmax(0)) > 0.999
    found = crf_of_scores(image, torch.from_numpy(planes), "irn-label").numpy()
    assert np.mean(found == crf_inference_label(image, planes.argmax(0), n_labels=3)) > 0.999


def test_labels_with_unknown_pixels():
    image, truth, _ = scene(5)
    labels = truth.copy()
    labels[np.random.default_rng(0).random(labels.shape) < 0.5] = 255
    for method in ("crf", "pamr"):
        mask = refine_maps(image, StoredMaps(labels=labels), Refinement(method, "irn-label"), "cpu")
        assert 255 not in mask
        assert np.mean(mask == truth) > 0.97
    nothing = refine_maps(image, StoredMaps(labels=np.zeros_like(labels)), Refinement(), "cpu")
    assert not nothing.any()


@pytest.mark.parametrize("method", ["crf", "par", "none"])
@pytest.mark.parametrize("size", [(1, 1), (3, 70)])
def test_odd_sizes_and_no_class(method, size):
    image = np.zeros((*size, 3), np.uint8)
    one = StoredMaps((7,), np.ones((1, 2, 2), np.float32))
    assert (refine_maps(image, one, Refinement(method), "cpu") == 8).all()
    none = StoredMaps((), np.zeros((0, 2, 2), np.float32))
    assert not refine_maps(image, none, Refinement(method), "cpu").any()


@pytest.mark.parametrize(
    ("stored", "how", "message"),
    [
        (StoredMaps((0,), np.full((1, 4, 4), 7.0, np.float32)), Refinement(), "--kind logits"),
        (StoredMaps((1,), np.ones((1, 4, 4), np.float32)), Refinement(kind="probs"), "background"),
        (StoredMaps((254,), np.ones((1, 4, 4), np.float32)), Refinement(), r"1\.\.254"),
        (StoredMaps((-2,), np.ones((1, 4, 4), np.float32)), Refinement(), r"1\.\.254"),
        (StoredMaps((1, 1), np.ones((2, 4, 4), np.float32)), Refinement(), "different"),
        (StoredMaps(labels=np.zeros((3, 4), np.uint8)), Refinement(), "size of their image"),
    ],
)
def test_maps_that_do_not_fit(stored, how, message):
    with pytest.raises(InputError, match=message):
        refine_maps(np.zeros((4, 4, 3), np.uint8), stored, how, "cpu")


# -- folders -------------------------------------------------------------------------------------


def test_a_folder(folders):
    assert run(folders) == (8, 0)
    masks = masks_of(folders / "out")
    assert sorted(masks) == [f"im{k}" for k in range(8)]
    assert accuracy(masks) > 0.93
    assert Image.open(folders / "out" / "im0.png").mode == "P"
    assert not list((folders / "out").glob("*.tmp"))


def test_workers_make_the_same_masks(folders):
    run(folders, "here")
    assert run(folders, "there", workers=2) == (8, 0)
    here, there = masks_of(folders / "here"), masks_of(folders / "there")
    assert here.keys() == there.keys()
    for name, mask in here.items():
        np.testing.assert_array_equal(mask, there[name])


def test_the_loop_of_a_gpu_makes_the_same_masks(folders):
    """On the CPU: threads read and write around the same computation."""
    run(folders, "here")
    (folders / "maps" / "bad.npy").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(folders / "images" / "bad.jpg")
    how = Refinement("pamr")
    jobs, done = _plan(
        folders / "images", folders / "maps", folders / "there", how, None, overwrite=False
    )
    problems = list(_run_on_gpu(jobs, how, torch.device("cpu")))
    assert done == 0 and len(problems) == 9
    assert [p for p in problems if p] == [p for p in problems if p and "bad.npy" in p]
    here, there = masks_of(folders / "here"), masks_of(folders / "there")
    assert here.keys() == there.keys()
    for name, mask in here.items():
        np.testing.assert_array_equal(mask, there[name])


def test_goes_on_where_it_was(folders):
    run(folders)
    before = masks_of(folders / "out")
    kept = folders / "out" / "im2.png"
    write_mask(kept, np.full((48, 60), 9), range(1, 255))
    (folders / "out" / "im4.png").unlink()
    assert run(folders) == (1, 7)
    after = masks_of(folders / "out")
    np.testing.assert_array_equal(after["im4"], before["im4"])
    assert (after["im2"] == 9).all()  # not made again
    assert run(folders) == (0, 8)
    assert run(folders, overwrite=True) == (8, 0)
    np.testing.assert_array_equal(masks_of(folders / "out")["im2"], before["im2"])


def test_other_settings_do_not_mix(folders):
    run(folders)
    with pytest.raises(InputError, match=r"other settings \(iterations\)"):
        run(folders, how=Refinement("pamr", iterations=3))
    assert run(folders, how=Refinement("pamr", preset="toco")) == (0, 8)  # not of PAMR
    assert run(folders, how=Refinement("par"), overwrite=True) == (8, 0)
    assert json.loads((folders / "out" / SETTINGS).read_text())["method"] == "par"


def test_bad_files_do_not_stop_the_others(folders):
    (folders / "maps" / "im1.npy").write_bytes(b"no array")
    np.save(folders / "maps" / "im3.npy", {3: np.full((4, 4), 9.0)})
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"2 of \d images could not be refined.*im1\.npy"):
            run(folders, workers=workers)
    assert len(masks_of(folders / "out")) == 6


def test_shards_share_the_work(folders, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    counts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        counts.append(run(folders)[0])
    assert counts == [3, 3, 2]
    assert len(masks_of(folders / "out")) == 8
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InputError, match="RANK"):
        run(folders)


def test_names(folders):
    (folders / "list.txt").write_text("im3\nim0\nim3\n")
    assert run(folders, names=folders / "list.txt") == (2, 0)
    (folders / "list.txt").write_text("im3\nimX\n")
    with pytest.raises(InputError, match="no maps for 1 of 2 names, the first is 'imX'"):
        run(folders, names=folders / "list.txt")


def test_missing_things(folders):
    (folders / "images" / "im2.png").unlink()
    with pytest.raises(InputError, match="no image for 1 of 8 names, the first is 'im2'"):
        run(folders)
    np.save(folders / "maps" / "im7.npy", np.zeros((1, 4, 4)))
    with pytest.raises(InputError, match="the same name"):
        run(folders)
    with pytest.raises(InputError, match="no such folder"):
        refine_folder(folders / "images", folders / "absent", folders / "out")
    with pytest.raises(InputError, match="holds the inputs"):
        refine_folder(folders / "images", folders / "images", folders / "images")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Refinement(preset="psaa"), "unknown CRF preset"),
        (Refinement(background=2), "background"),
        (Refinement(alpha=0), "alpha"),
        (Refinement(gt_prob=1), "gt_prob"),
        (Refinement(iterations=-1), "iterations"),
    ],
)
def test_bad_settings(how, message, folders):
    with pytest.raises(InputError, match=message):
        run(folders, how=how)
    assert not (folders / "out").exists()


# -- the command ---------------------------------------------------------------------------------


def test_the_command(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    line = ["refine", "images", "maps", "--out", "m", "--method", "crf", "--preset", "toco"]
    line += ["--workers", "0", "--device", "cpu", "--iterations", "2"]
    assert main(line) == 0
    assert capsys.readouterr().out == "8 masks written to m, 0 were there\n"
    assert main(line) == 0
    assert capsys.readouterr().out == "0 masks written to m, 8 were there\n"
    assert json.loads((folders / "m" / SETTINGS).read_text())["preset"] == "toco"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "crff"], "method"),
        (["--preset", "psaa"], "expected one of"),
        (["--itertions", "3"], "did you mean 'iterations'"),
        (["--device", "gpu"], "device"),
        (["--workers", "-1"], "workers"),
    ],
)
def test_mistakes_are_one_line(extra, message, folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert main(["refine", "images", "maps", "--out", "m", *extra]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_killed_and_started_again(folders):
    """A process that dies in the middle leaves whole masks, and the next run makes the rest."""
    program = (
        "import os, sys\n"
        "import wsis.offline.refine_folder as r\n"
        "real = r.refine_maps\n"
        "count = [0]\n"
        "def dying(*arguments):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4:\n"
        "        os._exit(9)\n"
        "    return real(*arguments)\n"
        "r.refine_maps = dying\n"
        "r.refine_folder('images', 'maps', 'out', r.Refinement('pamr'), device='cpu', workers=0)\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folders,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert died.returncode == 9
    assert len(masks_of(folders / "out")) == 3
    assert run(folders) == (5, 3)
    run(folders, "fresh")
    for name, mask in masks_of(folders / "fresh").items():
        np.testing.assert_array_equal(mask, masks_of(folders / "out")[name])
