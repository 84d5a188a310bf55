"""Runs trained to localize, on a small tree of wsolevaluation's layout: training to figures."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.reference.score_boxes import opencv_boxes
from tests.wsol_tree import write_wsol_tree
from wsis.commands.evaluate_wsol import evaluate_wsol
from wsis.config import DataConfig, ModelConfig, OptimConfig, PseudoConfig, TrainConfig
from wsis.data.augment import normalize
from wsis.data.dataset import open_dataset
from wsis.data.localization import Localization, read_metadata, read_truth
from wsis.engine.checkpoint import CheckpointStore
from wsis.engine.meters import accuracy, average_precision, mean_average_precision, ranks
from wsis.engine.trainer import Trainer
from wsis.errors import InputError
from wsis.evaluate.localization import normalize_scores, resize_scores, scale_boxes
from wsis.evaluate.localize import evaluate_run_localization, evaluate_scoremaps
from wsis.evaluate.localize_report import COLUMNS
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.run import evaluate_run
from wsis.evaluate.run_masks import predict_files
from wsis.evaluate.score_maps import localization_maps
from wsis.evaluate.scorer import Scorer
from wsis.evaluate.trained import load_model, page_of
from wsis.losses.rtc import RtcWeights

STEP, FIXED = 0.05, 0.4
SIDE = 48


def make_config(root):
    return TrainConfig(
        data=DataConfig(
            dataset="cub", root=str(root), resize_long=(56, 56), square=True, crop=SIDE, view2=32,
            jitter=(0.1, 0.1, 0.1, 0.0), workers=0, loader="torch",
        ),
        model=ModelConfig(
            backbone="small", decoder="object", feature_dim=16, dropout=0.0, freeze_stem=False,
            freeze_bn=False, crr_dims=(8, 8, 8, 8), decoder_dims=(8, 8, 8, 8),
        ),
        loss=replace(RtcWeights.reconstructed(), classification="single"),
        pseudo=PseudoConfig(start=0.5, high=1.1, low=0.8, relative=True, dilations=(1, 2)),
        optim=OptimConfig(name="adamw", lr=0.004, new_lr_scale=1.0, epochs=6, batch_size=8),
        threads=1, device="cpu", validate_every=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("wsol")
    return write_wsol_tree(root, {"train": 24, "val": 6, "test": 35})


@pytest.fixture(scope="module")
def run(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert Trainer(make_config(tree), folder, resume=False).run().finished
    return folder


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    """The command's figures on the test split, and the maps that it kept."""
    out = tmp_path_factory.mktemp("out")
    arguments = [str(run), "--split", "test", "--step", str(STEP), "--out", str(out)]
    arguments += ["--threshold", str(FIXED)]
    assert evaluate_wsol([*arguments, "--save_scoremaps", str(out / "maps")]) == 0
    return json.loads((out / "localization.json").read_text()), out / "maps"


# ---- the slow reference, written from the definitions ------------------------------------------


def overlap(a, b):
    """Intersection over union with both corners inside."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    both = max(width, 0) * max(height, 0)
    areas = [(x1 - x0 + 1) * (y1 - y0 + 1) for x0, y0, x1, y1 in (a, b)]
    return both / (sum(areas) - both)


def best_overlap(scores, true, threshold, *, largest):
    levels = (255 * scores).astype(np.uint8)
    found = opencv_boxes(levels, int(threshold * levels.max()), largest)
    return max(overlap(a, b) for a in found for b in true)


def reference(maps, boxes, positions, fixed):
    """All figures of a list of maps, one image and threshold at a time."""
    cuts, count = np.arange(0, 1, STEP), len(maps)
    pairs = list(zip(maps, boxes, strict=True))
    one = [[best_overlap(m, b, t, largest=True) for t in cuts] for m, b in pairs]
    every = [[best_overlap(m, b, t, largest=False) for t in cuts] for m, b in pairs]
    known = [best_overlap(m, b, fixed, largest=True) for m, b in pairs]
    result = {
        "MaxBoxAcc": 100 * (np.array(one) >= 0.5).mean(axis=0).max(),
        "MaxBoxAccV2": np.mean(
            [100 * (np.array(every) >= d).mean(axis=0).max() for d in (0.3, 0.5, 0.7)]
        ),
        "GT-known": 100 * sum(x >= 0.5 for x in known) / count,
    }
    for top in (1, 5):
        right = [x > 0.5 and p < top for x, p in zip(known, positions, strict=True)]
        result[f"Top-{top} Loc"] = 100 * sum(right) / count
    return result, cuts[(np.array(one) >= 0.5).mean(axis=0).argmax()]


def true_boxes(truth):
    scaled = scale_boxes(truth.boxes, truth.sizes[truth.owner])
    return [scaled[truth.owner == n].tolist() for n in range(len(truth.ids))]


def positions_of(model, dataset):
    """How many classes beat the true one, image by image."""
    found = []
    for i, own in enumerate(dataset.class_ids.tolist()):
        image = dataset.image(i).resize((SIDE, SIDE), 3)
        x = normalize(image, model.backbone.mean, model.backbone.std)
        with torch.no_grad():
            logits = model(x[None]).class_logits[0].tolist()
        found.append(sum(value > logits[own] for value in logits))
    return found


# ---- figures -----------------------------------------------------------------------------------


def test_figures_equal_the_definitions(run, tree, scored):
    result, maps = scored
    model = load_model(make_config(tree), run, 3)
    dataset = open_dataset("cub", tree, "test")
    truth, positions = read_truth(dataset)[0], positions_of(model, dataset)
    for kind in ("cam", "refined", "localization"):
        stored = [np.load(maps / kind / f"{name}.npy") for name in truth.ids]
        assert {(m.dtype, m.shape) for m in stored} == {(np.dtype(float), (224, 224))}
        expected, _ = reference(stored, true_boxes(truth), positions, FIXED)
        for name, value in expected.items():
            assert result[kind][name] == pytest.approx(value, rel=1e-12), (kind, name)
    top1 = 100 * sum(p == 0 for p in positions) / len(positions)
    assert result["classification"] == pytest.approx({"Top-1 Cls": top1, "Top-5 Cls": 100})
    assert "35 images" in result["protocol"]["line"]
    assert "fixed beforehand" in result["protocol"]["line"]
    # The run learnt something, or these comparisons would mean little.
    assert (
        top1 > 50 and result["localization"]["MaxBoxAccV2"] > 20 and result["cam"]["GT-known"] > 0
    )


def test_ranks_and_overlaps_against_the_definitions():
    """Maps of hills with ranks that differ, and an overlap of exactly one half."""
    rng, count = np.random.default_rng(0), 40
    y, x = np.mgrid[:224, :224]
    maps, corners = [], []
    for _ in range(count):
        (cy, cx), (h, w) = rng.integers(60, 160, 2), rng.integers(30, 60, 2)
        maps.append(np.exp(-(((y - cy) / h) ** 2) - ((x - cx) / w) ** 2))
        shift = rng.integers(-30, 30, 2)
        corners.append([cx - w + shift[0], cy - h + shift[1], cx + w, cy + h])
    maps[0] = np.zeros((224, 224))
    maps[0][:10, :20] = 1
    corners[0] = [0, 0, 20, 21]  # found: 21 x 11 of 21 x 22
    boxes = np.clip(corners, 0, 223).astype(float)
    positions = rng.integers(0, 9, count).tolist()
    positions[0] = 0
    sizes, ids = np.full((count, 2), 224), tuple(map(str, range(count)))
    truth = Localization("", ids, sizes, boxes, np.arange(count))
    scorer = Scorer(truth, {"cam": FIXED}, step=STEP)
    for scores, position in zip(maps, positions, strict=True):
        scorer.add({"cam": scores}, position)
    result = scorer.scores()["cam"]
    expected, _ = reference(maps, true_boxes(truth), positions, FIXED)
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-12), name
    assert 0 < result["Top-1 Loc"] < result["Top-5 Loc"] < result["GT-known"] < 100
    top = [100 * sum(p < n for p in positions) / count for n in (1, 5)]
    assert list(scorer.classification().values()) == pytest.approx(top)
    alone = Localization("", ("0",), sizes[:1], boxes[:1], np.zeros(1, int))
    half = Scorer(alone, {"cam": FIXED}, step=STEP)
    half.add({"cam": maps[0]}, 0)
    half = half.scores()["cam"]
    assert half["GT-known"] == 100 and half["Top-1 Loc"] == 0  # not less, against more than 0.5


def test_kept_maps_score_the_same_as_stored_ones(scored, tree):
    result, maps = scored
    truth = read_metadata(tree / "metadata/CUB/test")
    for kind in ("cam", "refined", "localization"):
        again = evaluate_scoremaps(maps / kind, truth, step=STEP, fixed=FIXED)
        for name in ("MaxBoxAcc", "MaxBoxAccV2", "GT-known", "MaxBoxAccV2 by overlap"):
            assert again[name] == result[kind][name]


def test_maps_are_of_the_true_class(run, tree, scored):
    """Written out for one image: the channel, the norm, the object's probability."""
    model = load_model(make_config(tree), run, 3)
    dataset = open_dataset("cub", tree, "test")
    x = normalize(dataset.image(4).resize((SIDE, SIDE), 3), model.backbone.mean, model.backbone.std)
    with torch.no_grad():
        maps = model(x[None])
    own = int(dataset.class_ids[4])

    def up(tensor):
        return F.interpolate(tensor, (SIDE, SIDE), mode="bilinear", align_corners=True)[0]

    refined = up(maps.refined[:, own + 1 : own + 2])[0].relu()
    low, high = refined.min(), refined.max()
    scores = (refined - low - 1e-5).relu() / (high - low + 1e-5)
    scores = (scores + up(maps.logits).softmax(dim=0)[1]) / 2
    name = f"{dataset.paths[4]}.npy"
    expected = {"cam": maps.cams[0, own], "refined": maps.refined[0, own + 1]}
    for kind, plane in (expected | {"localization": scores}).items():
        plane = normalize_scores(resize_scores(plane.numpy()))
        np.testing.assert_allclose(np.load(scored[1] / kind / name), plane, atol=2e-5)
    same = localization_maps(maps.refined[:, own + 1], maps.logits, SIDE)[0]
    torch.testing.assert_close(same, scores, atol=1e-6, rtol=0)


def test_the_page_of_a_localizer(run, tree, scored, tmp_path):
    """The run's own, and the command's: the table's figures, and pictures with boxes."""
    text = evaluate_run(make_config(tree), run, out=tmp_path / "own")
    assert text.endswith(f"report: {tmp_path / 'own' / 'report.html'}")
    own = json.loads((tmp_path / "own" / "localization.json").read_text())
    for result, folder, split in ((own, tmp_path / "own", "val"), (*scored, "test")):
        page = (folder.parent if split == "test" else folder) / "report.html"
        text = page.read_text()
        for kind, name in (("cam", "CAM"), ("localization", "localization map")):
            row = re.search(rf"<tr><th>{name}</th>(.*?)</tr>", text)[1]
            cells = re.findall(r">([^<]+)</td>", row)
            assert cells[:5] == [f"{result[kind][c]:.2f}" for c in COLUMNS[:5]]
            assert cells[5] == "-"  # no masks
        main = f"<dt>MaxBoxAccV2, localization map</dt><dd>{cells[0]}</dd>"
        assert main in text and "Top-1 Cls" in text
        assert f"cub {split}, {own['protocol']['images'] if split == 'val' else 35} images" in text
        assert "IoU per class" not in text and "undecided" not in text
        assert "red." in text and text.count("<figcaption>localization map</figcaption>") == 6
        assert 'alt="Validation scores over epochs"' in text
        assert "http://" not in text.replace("http://www.w3.org", "")


def test_a_threshold_is_chosen_on_another_split(run, tree, tmp_path):
    arguments = [str(run), "--split", "test", "--step", str(STEP), "--out", str(tmp_path)]
    assert evaluate_wsol([*arguments, "--threshold", "val"]) == 0
    result = json.loads((tmp_path / "localization.json").read_text())
    val = tmp_path / "val"
    assert evaluate_wsol([str(run), "--save_scoremaps", str(val), "--out", str(val)]) == 0
    truth = read_metadata(tree / "metadata/CUB/val")
    line = result["protocol"]["line"]
    assert "chosen with the boxes of val, 6 images" in line
    for kind in ("cam", "refined", "localization"):
        stored = [np.load(val / kind / f"{name}.npy") for name in truth.ids]
        _, best = reference(stored, true_boxes(truth), [0] * 6, 0.2)
        assert result[kind]["GT-known threshold"] == best
        assert f"{kind} {best:g}" in line
    with pytest.raises(InputError, match="shares images with 'test'"):
        evaluate_wsol([*arguments, "--threshold", "test"])


def test_masks_give_pxap_alone(run, tree, tmp_path):
    root = write_wsol_tree(tmp_path, {"test": 4}, folder="OpenImages", masks=True)
    model = load_model(make_config(tree), run, 3)
    dataset = open_dataset("openimages", root, "test")
    options = {"protocol": Protocol(), "out": tmp_path, "side": SIDE, "step": 0.01}
    with pytest.raises(InputError, match="mask_root"):
        evaluate_run_localization(model, dataset, **options)
    keep = {"save": tmp_path / "maps", "mask_root": root / "masks"}
    page = page_of(make_config(tree), run, dataset)
    result = evaluate_run_localization(model, dataset, **options, **keep, page=page)
    text = (tmp_path / "report.html").read_text()
    assert f"<dt>PxAP, localization map</dt><dd>{result['localization']['PxAP']:.2f}</dd>" in text
    assert "MaxBoxAccV2," not in text and "no box" in text
    stored = evaluate_scoremaps(
        tmp_path / "maps/cam", read_metadata(dataset.metadata, root / "masks"), step=0.01
    )
    assert stored["PxAP"] == result["cam"]["PxAP"] > 0
    assert "MaxBoxAcc" not in result["cam"] and "GT-known" not in result["protocol"]["line"]
    tuning = open_dataset("cub", tree, "val")
    with pytest.raises(InputError, match="PxAP, which has no threshold"):
        evaluate_run_localization(model, dataset, tuning=tuning, **options, **keep)


def test_memory_does_not_grow_with_the_images():
    count, plane = 150, 224 * 224 * 8
    box = np.array([[10, 10, 100, 100]] * count, float)
    sizes, ids = np.full((count, 2), 224), tuple(map(str, range(count)))
    scorer = Scorer(Localization("", ids, sizes, box, np.arange(count)), {"cam": 0.2}, step=STEP)
    tracemalloc.start()
    for n in range(count):
        scorer.add({"cam": np.full((224, 224), n / count)}, 0)
    result = scorer.scores()["cam"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result["images"] == count
    assert peak < 110 * plane  # a chunk of 32 maps, twice, and its levels; not 150


def test_too_few_maps_are_refused(tree):
    truth = read_metadata(tree / "metadata/CUB/val")
    scorer = Scorer(truth, {"cam": 0.2}, step=STEP)
    scorer.add({"cam": np.zeros((224, 224))})
    with pytest.raises(InputError, match="6 images are to be scored, got 1"):
        scorer.scores()
    with pytest.raises(InputError, match=r"\[0, 1\), got 1.5"):
        Scorer(truth, {"cam": 1.5}, step=STEP)


# ---- training ----------------------------------------------------------------------------------


def test_accuracy_steers_the_best_checkpoint(run):
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_top1")]
    assert len(rows) == 2 and all(row["val_map"] and row["val_top5"] for row in rows)
    store = CheckpointStore(run / "ckpt")
    best = max(rows, key=lambda row: float(row["val_top1"]))
    _, state = store.load(store.pinned("best"))
    assert state["step"] == int(best["step"])
    assert state["best_map"] == pytest.approx(float(best["val_top1"]))


def test_accuracy_and_precision_against_plain_loops():
    torch.manual_seed(0)
    scores, class_ids = torch.randn(40, 9), torch.randint(0, 7, (40,))
    dense = F.one_hot(class_ids, 9)
    assert average_precision(scores, class_ids) == pytest.approx(
        mean_average_precision(scores, dense)[0]
    )
    for count in (1, 5):
        best = scores.topk(count, dim=1).indices
        expected = (best == class_ids[:, None]).any(dim=1).double().mean()
        assert accuracy(scores, class_ids, count) == pytest.approx(float(expected))
    tied = torch.zeros(3, 4)
    assert ranks(tied, torch.tensor([0, 2, 3])).tolist() == [0, 2, 3]  # no class wins by its tie


BAD = {
    "decoder alone": ({"model.decoder": "object", "loss.classification": "multilabel"}, "together"),
    "loss alone": ({"model.decoder": "classes"}, "together"),
    "masks": ({"supervision": "masks"}, "learns from labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_switches_that_do_not_fit_are_refused(name, tree, tmp_path):
    changes, message = BAD[name]
    config = make_config(tree)
    for key, value in changes.items():
        part, _, field = key.rpartition(".")
        if part == "loss":
            config.loss = replace(config.loss, **{field: value})
        else:
            setattr(getattr(config, part) if part else config, field, value)
    with pytest.raises(InputError, match=message):
        Trainer(config, tmp_path / "run", resume=False)


def test_a_localizer_has_no_masks_to_predict(run, tree, tmp_path):
    image = tree / "dataset/CUB/val/000.kind/000.png"
    with pytest.raises(InputError, match="wsis evaluate wsol"):
        predict_files(make_config(tree), run, image, tmp_path, weights="last", overlay=False)


def test_stored_maps_take_no_split_as_threshold(scored, tree):
    with pytest.raises(InputError, match="--threshold is a number"):
        evaluate_wsol(
            ["--scoremaps", str(scored[1] / "cam"), "--threshold", "val",
             "--metadata", str(tree / "metadata/CUB/test")]
        )  # fmt: skip
