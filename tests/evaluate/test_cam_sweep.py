"""`wsis evaluate cam --sweep`: every candidate against a mask made for it alone, and the report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.offline.fakes import painted
from wsis.cli import main
from wsis.errors import InputError
from wsis.evaluate import cam_sweep as module
from wsis.evaluate.cam_candidates import ALPHAS, BETAS, make_sweep
from wsis.evaluate.cam_report import at_ends, evaluate_cams_folder, format_sweep
from wsis.evaluate.cam_sweep import StoredCams, sweep_cams
from wsis.evaluate.conventions import scores
from wsis.evaluate.segmentation import THRESHOLDS, WITH_TRUTH
from wsis.offline.refine import Refinement, refine_maps
from wsis.offline.refine_folder import Guides
from wsis.offline.spread import read_guide
from wsis.offline.stored import StoredMaps, read_maps

SIZES = ((40, 56), (33, 25), (61, 37))


@pytest.fixture
def folders(tmp_path):
    """Painted images with noisy CAMs, boundary maps and features; the last image has no class."""
    data = painted(tmp_path / "data", sizes=SIZES)
    data.labels.setflags(write=True)
    data.labels[2] = 0
    rng = np.random.default_rng(0)
    for name in ("cams", "edges", "features"):
        (tmp_path / name).mkdir()
    for index, name in enumerate(data.ids):
        truth = data.mask(index)
        height, width = truth.shape
        planes = torch.from_numpy(np.stack([truth == 1, truth == 2]).astype(np.float32))
        grids = [[-(-height // stride), -(-width // stride)] for stride in (4, 8)]
        low = F.adaptive_avg_pool2d(planes, grids[0]).numpy()
        cams = (0.7 * low + 0.3 * rng.random(low.shape)).astype(np.float32)
        np.save(tmp_path / "cams" / f"{name}.npy", dict(enumerate(cams)))
        np.save(tmp_path / "edges" / f"{name}.npy", rng.random(grids[0]).astype(np.float32) ** 4)
        features = F.adaptive_avg_pool2d(planes, grids[1]).numpy() * 2
        np.save(tmp_path / "features" / f"{name}.npy", features)
    return tmp_path, data


def guides_of(folder, kind):
    return None if kind is None else Guides(kind, folder / kind)


def expected_miou(folders, kind, beta, value, log_steps=3):
    """Of the masks that `wsis refine` makes of one candidate, image by image."""
    folder, data = folders
    counts = np.zeros((3, 3), int)
    how = Refinement("none" if beta is None else "walk", beta=beta, log_steps=log_steps)
    how = replace(how, **({"alpha": value} if kind == "features" else {"background": value}))
    for index, name in enumerate(data.ids):
        stored = read_maps(folder / "cams" / f"{name}.npy")
        kept = [k for k in stored.keys if data.labels[index][k]]
        stored = StoredMaps(tuple(kept), stored.maps[kept])
        guide = None if beta is None else read_guide(folder / kind / f"{name}.npy", kind)
        mask = refine_maps(np.asarray(data.image(index)), stored, how, "cpu", guide)
        truth = data.mask(index)
        np.add.at(counts, (truth[truth != 255], mask[truth != 255]), 1)
    return scores(counts).miou


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "edges", "features"])
def test_every_candidate_is_its_own_refinement(kind, folders):
    folder, data = folders
    candidates = {"alphas": [1.0, 3.0, 9.0]} if kind == "features" else {"backgrounds": [0.1, 0.45]}
    betas = None if kind is None else [3.0, 10.0]
    how = make_sweep(guides_of(folder, kind), betas=betas, log_steps=3, **candidates)
    result = sweep_cams(StoredCams(folder / "cams", data, how))
    assert [row["beta"] for row in result["rows"]] == [None, *(betas or [])]
    values = next(iter(candidates.values()))
    assert result["candidates"] == values
    seen = []
    for row in result["rows"]:
        for value, miou in zip(values, row["miou"], strict=True):
            assert miou == pytest.approx(expected_miou(folders, kind, row["beta"], value), abs=0.02)
            seen.append((row["beta"], value, miou))
        assert row["best_miou"] == max(row["miou"])
        assert row["best"] == values[row["miou"].index(row["best_miou"])]
    walked = [x for x in seen if x[0] is not None] or seen
    best = max(walked, key=lambda x: x[2])
    found = result["best"]
    assert (found["beta"], found["value"], found["miou"]) == best
    assert found["chosen"] == WITH_TRUTH
    assert result["scores"]["miou"] == found["miou"]
    assert scores(np.array(result["confusion"])).miou == found["miou"]
    assert len({miou for _, _, miou in seen}) >= 2  # the candidates do differ


def test_a_case_makes_the_mask_of_its_candidate(folders):
    folder, data = folders
    how = make_sweep(guides_of(folder, "features"), betas=[8.0], alphas=[2.0, 8.0])
    cams = StoredCams(folder / "cams", data, how)
    counts = np.zeros((2, 3, 3), int)
    for index in cams.indices:
        truth = data.mask(index)
        for place, alpha in enumerate(how.alphas):
            mask = cams.read(index).mask(8.0, alpha)
            np.add.at(counts[place], (truth[truth != 255], mask[truth != 255]), 1)
    result = sweep_cams(cams)
    assert result["rows"][1]["miou"] == [scores(c).miou for c in counts]


def test_one_walk_per_power_and_one_pass_per_curve(folders, monkeypatch):
    folder, data = folders
    walks, passes = [], []
    walk, add = module.Walker.walk, module.Curve.add
    monkeypatch.setattr(
        module.Walker, "walk", lambda self, *a, **k: walks.append(k["beta"]) or walk(self, *a, **k)
    )
    monkeypatch.setattr(module.Curve, "add", lambda self, *a: passes.append(1) or add(self, *a))
    for kind in ("edges", "features"):
        walks.clear(), passes.clear()
        how = make_sweep(guides_of(folder, kind))
        sweep_cams(StoredCams(folder / "cams", data, how))
        assert walks == 3 * list(BETAS)
        assert len(passes) == 3 * (len(BETAS) + 1)


def test_classes_outside_the_label_are_left_out(folders):
    """The last image has no class: all its pixels are background, whatever its CAMs say."""
    folder, data = folders
    cams = StoredCams(folder / "cams", data, make_sweep(backgrounds=[0.0]))
    assert cams.read(2).ids == []
    assert not cams.read(2).mask(None, 0.0).any()
    only_first = sorted(k + 1 for k in range(2) if data.labels[1][k])
    assert cams.read(1).ids == only_first


def test_coarse_maps_walk_over_edges_only(folders):
    folder, data = folders
    for path in (folder / "cams").iterdir():
        maps = read_maps(path).maps
        high = np.zeros((2, 80, 80), np.float32)
        np.save(path, {"keys": np.arange(2), "cam": maps, "high_res": high})
    for kind, coarse in ((None, False), ("edges", True), ("features", False)):
        case = StoredCams(folder / "cams", data, make_sweep(guides_of(folder, kind))).read(0)
        assert bool(case.maps.any()) == coarse


def test_limit_and_convention(folders):
    folder, data = folders
    cams = StoredCams(folder / "cams", data, make_sweep(), limit=2)
    assert cams.indices == [0, 2]
    assert sweep_cams(cams, convention="rtc")["scores"]["convention"] == "rtc"
    with pytest.raises(InputError, match="convention"):
        sweep_cams(cams, convention="none")


# -- candidates ----------------------------------------------------------------------------------


def test_standard_candidates(tmp_path):
    edges, features = Guides("edges", tmp_path), Guides("features", tmp_path)
    assert make_sweep().candidates == tuple(THRESHOLDS.tolist()) and make_sweep().betas == ()
    assert make_sweep(edges).betas == BETAS and len(make_sweep(edges).candidates) == 60
    assert make_sweep(features).candidates == ALPHAS
    assert make_sweep(features).by_alpha and not make_sweep(edges).by_alpha
    for guides, betas, candidates in (
        (None, (), (0.2,)),
        (edges, (10.0,), (0.25,)),
        (features, (8.0,), (16.0,)),
    ):
        how = make_sweep(guides, sweep=False)
        assert (how.betas, how.candidates) == (betas, candidates)
        assert how.chosen == "the method's constants"
    assert make_sweep(edges, sweep=False, betas=[4.0]).chosen == "given by the user"
    assert make_sweep(edges, sweep=False, betas=[4.0, 5.0]).chosen == WITH_TRUTH
    assert make_sweep(sweep=False, backgrounds=[0.1, 0.2]).chosen == WITH_TRUTH


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (None, {"betas": [3.0]}, "betas go with"),
        (None, {"alphas": [3.0]}, "alphas go with"),
        ("edges", {"alphas": [3.0]}, "alphas go with"),
        ("features", {"backgrounds": [0.3]}, "backgrounds go with"),
        ("edges", {"betas": []}, "betas go with|at least one"),
        ("edges", {"betas": [3.0, 2.0]}, "betas must ascend"),
        ("edges", {"betas": [0.0]}, "beta must be positive"),
        ("edges", {"backgrounds": [0.3, 0.3]}, "backgrounds must ascend"),
        ("edges", {"backgrounds": [0.3, 1.3]}, r"backgrounds must be in \[0, 1\]"),
        ("features", {"alphas": []}, "alphas must be one or more"),
        (None, {"backgrounds": []}, "backgrounds must be one or more"),
        ("features", {"alphas": [-1.0]}, "alphas must be positive"),
        ("edges", {"radius": 0}, "radius"),
        ("edges", {"log_steps": 99}, "log_steps"),
    ],
)
def test_candidates_that_mean_nothing(kind, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make_sweep(guides_of(tmp_path, kind), **options)


# -- files ---------------------------------------------------------------------------------------


def test_files_that_are_missing_or_wrong(folders):
    folder, data = folders
    how = make_sweep(guides_of(folder, "edges"), betas=[3.0], log_steps=1)
    name = data.ids[1]
    (folder / "edges" / f"{name}.npy").unlink()
    with pytest.raises(InputError, match=f"edges: no edges for 1 of 3 images.*'{name}'"):
        StoredCams(folder / "cams", data, how)
    np.save(folder / "edges" / f"{name}.npy", np.full((4, 4), 3.0))
    with pytest.raises(InputError, match=f"{name}.npy: edges must be in"):
        sweep_cams(StoredCams(folder / "cams", data, how))
    for content, message in (
        ({7: np.zeros((4, 4))}, r"class ids must be 1\.\.2, got \[8\]"),
        (np.zeros((9, 9), np.uint8), "expected CAMs, got labels"),
        ({0: np.full((4, 4), 3.0)}, r"must be in \[0, 1\]"),
    ):
        np.save(folder / "cams" / f"{name}.npy", content)
        with pytest.raises(InputError, match=f"{name}.npy: .*{message}"):
            sweep_cams(StoredCams(folder / "cams", data, make_sweep()))
    (folder / "cams" / f"{name}.npy").unlink()
    with pytest.raises(InputError, match="cams: no CAMs for 1 of 3 images"):
        StoredCams(folder / "cams", data, make_sweep())


# -- report and command --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "edges", "features"])
def test_report(kind, folders):
    folder, data = folders
    how = make_sweep(guides_of(folder, kind), log_steps=2)
    text = evaluate_cams_folder(folder / "cams", data, how, folder / "out", device="cpu")
    result = json.loads((folder / "out" / "metrics.json").read_text())
    best = result["best"]
    assert f"{best['miou']:.2f}" in text and WITH_TRUTH in text
    assert WITH_TRUTH in result["protocol"]["line"]
    assert "report.html" in text and text.count("beta ") >= 1
    page = (folder / "out" / "report.html").read_text()
    for words in ("Candidates", "no walk", WITH_TRUTH, "ground truth", data.ids[0]):
        assert words in page
    assert page.count("<tr") >= len(result["rows"])
    if kind:
        assert "after the walk" in page and f"beta {BETAS[0]:g}" in page
        assert text.count("CAMs without the walk") == 1
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_table():
    rows = [
        {"beta": None, "best": 0.2, "best_miou": 40.0},
        {"beta": 10.0, "best": 0.25, "best_miou": None},
    ]
    table = format_sweep({"candidate": "background", "rows": rows}).splitlines()
    assert [len(line) for line in table] == [len(table[0])] * 3 or table[1].endswith("40.00")
    assert table[1].split() == ["no", "walk", "0.2", "40.00"]
    assert table[2].split() == ["10", "0.25", "-"]


@pytest.mark.parametrize(
    ("betas", "best", "expected"),
    [
        ([2.0, 4.0, 8.0], (4.0, 0.3), []),
        ([2.0, 4.0, 8.0], (8.0, 0.3), ["beta 8"]),
        ([2.0, 4.0, 8.0], (2.0, 0.1), ["beta 2", "background 0.1"]),
        ([2.0], (2.0, 0.5), ["background 0.5"]),
        ([], (None, 0.3), []),
    ],
)
def test_the_best_may_lie_beyond(betas, best, expected):
    rows = [{"beta": beta} for beta in (None, *betas)]
    result = {
        "candidate": "background",
        "candidates": [0.1, 0.3, 0.5],
        "rows": rows,
        "best": {"beta": best[0], "value": best[1]},
    }
    assert at_ends(result) == expected


def test_the_command(tmp_path, capsys, monkeypatch):
    from tests.run.conftest import write_tree

    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "tree", train=3, val=1)
    (tmp_path / "cams").mkdir()
    (tmp_path / "edges").mkdir()
    for index in range(3):
        name = f"train_{index:03d}"
        np.save(f"cams/{name}.npy", np.random.default_rng(index).random((6, 16, 16)))
        np.save(f"edges/{name}.npy", np.zeros((16, 16), np.float32))
    line = ["evaluate", "cam", "cams", "--root", "tree", "--device", "cpu", "--pictures", "1"]
    assert main([*line, "--sweep"]) == 0
    out = capsys.readouterr().out
    assert WITH_TRUTH in out and "cams-sweep-1/report.html" in out
    assert main([*line, "--edges", "edges", "--sweep", "--betas", "[2,10]"]) == 0
    out = capsys.readouterr().out
    assert "cams-sweep-2/report.html" in out and "\n10 " in out
    assert main([*line, "--edges", "edges", "--out", "fixed"]) == 0
    assert "the method's constants" in capsys.readouterr().out
    result = json.loads((tmp_path / "fixed" / "metrics.json").read_text())
    assert result["best"]["beta"] == 10 and result["candidates"] == [0.25]
    for extra, message in (
        (["--edges", "absent"], "absent: no such folder"),
        (["--alphas", "[3]"], "alphas go with --features"),
        (["--edges", "edges", "--features", "edges"], "not both"),
        (["--bettas", "[3]"], "did you mean 'betas'"),
    ):
        assert main([*line, *extra]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
