"""Folders of stored maps that walk over folders of guides."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.offline.test_refine import IDS, masks_of, scene
from tests.offline.test_spread import WALK, edges_of, features_of
from wsis.cli import main
from wsis.errors import InputError
from wsis.offline.refine import Refinement, refine_maps
from wsis.offline.refine_folder import SETTINGS, refine_folder
from wsis.offline.spread import read_guide
from wsis.offline.stored import read_maps


@pytest.fixture
def folders(tmp_path):
    """Three images with CAMs, boundary maps and features."""
    for name in ("images", "maps", "edges", "features"):
        (tmp_path / name).mkdir()
    for seed in range(3):
        image, truth, maps = scene(seed)
        Image.fromarray(image).save(tmp_path / "images" / f"im{seed}.png")
        np.save(tmp_path / "maps" / f"im{seed}.npy", dict(zip(IDS, maps, strict=True)))
        np.save(tmp_path / "edges" / f"im{seed}.npy", edges_of(truth))
        np.save(tmp_path / "features" / f"im{seed}.npy", features_of(image))
    return tmp_path


def run(folders, how=WALK, out="out", workers=0, **options):
    options = {k: folders / v if k in ("edges", "features") else v for k, v in options.items()}
    return refine_folder(
        folders / "images",
        folders / "maps",
        folders / out,
        how,
        device="cpu",
        workers=workers,
        **options,
    )


@pytest.mark.parametrize("kind", ["edges", "features"])
def test_a_folder(kind, folders):
    assert run(folders, **{kind: kind}) == (3, 0)
    for name, mask in masks_of(folders / "out").items():
        image = np.asarray(Image.open(folders / "images" / f"{name}.png"))
        guide = read_guide(folders / kind / f"{name}.npy", kind)
        expected = refine_maps(
            image, read_maps(folders / "maps" / f"{name}.npy"), WALK, "cpu", guide
        )
        np.testing.assert_array_equal(mask, expected)
    settings = json.loads((folders / "out" / SETTINGS).read_text())
    assert settings["guide"] == kind and settings["beta"] == (10 if kind == "edges" else 8)
    assert "preset" not in settings and "iterations" not in settings
    assert run(folders, **{kind: kind}) == (0, 3)


def test_a_folder_of_irn_walks_from_the_coarse_maps(folders):
    """``cam`` is at the grid of the walk, ``high_res`` for looking at: make_sem_seg_labels.py."""
    run(folders, out="expected", edges="edges")
    for path in (folders / "maps").iterdir():
        maps = read_maps(path).maps
        high = np.zeros((len(maps), 48, 60), np.float32)
        np.save(path, {"keys": np.array(IDS), "cam": maps, "high_res": high})
    run(folders, edges="edges")
    for name, mask in masks_of(folders / "out").items():
        np.testing.assert_array_equal(mask, masks_of(folders / "expected")[name])
    run(folders, Refinement("pcm"), out="pcm", features="features")
    assert not any(mask.any() for mask in masks_of(folders / "pcm").values())  # of high_res


def test_other_guides_and_constants_do_not_mix(folders):
    run(folders, edges="edges")
    with pytest.raises(InputError, match=r"other settings \(.*guide\)"):
        run(folders, features="features")
    with pytest.raises(InputError, match=r"other settings \(beta\)"):
        run(folders, replace(WALK, beta=9), edges="edges")
    assert run(folders, replace(WALK, beta=10, preset="toco"), edges="edges") == (0, 3)


def test_workers_and_the_loop_of_a_gpu(folders):
    from wsis.offline.refine_folder import _plan, _run_on_gpu, find_guides

    run(folders, out="here", edges="edges")
    assert run(folders, out="there", workers=2, edges="edges") == (3, 0)
    guides = find_guides("walk", folders / "edges", None)
    jobs, _ = _plan(
        folders / "images", folders / "maps", folders / "gpu", WALK, None, False, guides
    )
    assert list(_run_on_gpu(jobs, WALK, torch.device("cpu"))) == [None] * 3
    for out in ("there", "gpu"):
        for name, mask in masks_of(folders / out).items():
            np.testing.assert_array_equal(mask, masks_of(folders / "here")[name])


def test_auto_is_a_device_that_the_build_knows(monkeypatch):
    from wsis.offline import refine_folder as module

    asked = []
    monkeypatch.setattr(module, "pick_device", lambda name: asked.append(name) or name)
    for built in ({}, {"cuda_archs": "90"}):
        monkeypatch.setattr(module._C, "build_info", lambda built=built: built)
        for name in ("auto", "cuda", "cpu"):
            module.operator_device(name)
    assert asked == ["cpu", "cuda", "cpu", "auto", "cuda", "cpu"]


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        (WALK, {}, r"boundary map \(--edges FOLDER\) or features"),
        (WALK, {"edges": "edges", "features": "features"}, "not both"),
        (WALK, {"edges": "absent"}, "absent: no such folder; expected edges"),
        (Refinement("crf"), {"edges": "edges"}, "walk only, got crf"),
        (Refinement("pcm"), {"edges": "edges"}, "walk only, got pcm"),
        (Refinement("par"), {"features": "features"}, "walk and pcm only, got par"),
        (replace(WALK, beta=0), {"edges": "edges"}, "beta"),
        (replace(WALK, radius=0), {"edges": "edges"}, "radius"),
        (replace(WALK, log_steps=-1), {"edges": "edges"}, "log_steps"),
    ],
)
def test_settings_that_do_not_fit(how, options, message, folders):
    with pytest.raises(InputError, match=message):
        run(folders, how, **options)
    assert not (folders / "out").exists()


def test_a_missing_and_a_bad_guide_are_named(folders):
    (folders / "edges" / "im1.npy").unlink()
    with pytest.raises(InputError, match="edges: no edges for 1 of 3 names, the first is 'im1'"):
        run(folders, edges="edges")
    np.save(folders / "edges" / "im1.npy", np.full((12, 15), 7.0))
    with pytest.raises(InputError, match=r"1 of 3 images could not.*edges/im1\.npy: edges must"):
        run(folders, edges="edges")
    assert sorted(masks_of(folders / "out")) == ["im0", "im2"]


def test_the_command(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    common = ["refine", "images", "maps", "--workers", "0", "--device", "cpu"]
    assert main([*common, "--op", "walk", "--edges", "edges", "--out", "w"]) == 0
    assert main([*common, "--op", "pcm", "--out", "p"]) == 0
    assert main([*common, "--method", "pcm", "--features", "features", "--out", "q"]) == 0
    assert capsys.readouterr().out.count("3 masks written") == 3
    assert json.loads((folders / "p" / SETTINGS).read_text())["guide"] is None
    for line, message in (
        (["--op", "walk", "--out", "x"], "--edges FOLDER"),
        (["--op", "wlak", "--out", "x"], "op"),
        (["--op", "walk", "--edges", "edges", "--logsteps", "3"], "did you mean 'log_steps'"),
    ):
        assert main([*common, *line]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
