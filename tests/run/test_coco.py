"""COCO from training to report: 81 classes, masks painted by a named maker, constant memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.run.conftest import TINY
from wsis.cli import main
from wsis.data.coco import MASK_MAKER, maker_hash
from wsis.engine.build import build_model
from wsis.recipes import get_recipe


def mini(root: Path, source: Path, *, train: int, val: int, times: int = 1) -> Path:
    """The first images of `coco-mini`, each listed `times` times under other names."""
    content = json.loads((source / "instances.json").read_text())
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    images, annotations = [], []
    for split, count in (("train", train), ("val", val)):
        listed = (source / "ImageSets/Segmentation" / f"{split}.txt").read_text().split()[:count]
        names = []
        for image in (i for i in content["images"] if Path(i["file_name"]).stem in listed):
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            for time in range(times):
                name, number = f"{Path(image['file_name']).stem}_{time}", len(images) + 1
                (root / "JPEGImages" / f"{name}.jpg").symlink_to(
                    source / "JPEGImages" / image["file_name"]
                )
                images.append(image | {"id": number, "file_name": f"{name}.jpg"})
                annotations += [a | {"image_id": number} for a in own]
                names.append(name)
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names))
    parts = {"images": images, "annotations": annotations, "categories": content["categories"]}
    (root / "instances.json").write_text(json.dumps(parts))
    return root


def config(path: Path, root: Path, **changes) -> Path:
    data = {**TINY["data"], "dataset": "coco", "root": str(root)}
    model = {**TINY["model"], "cam_direct": True}
    optim = {**TINY["optim"], "epochs": 2, "batch_size": 8}
    values = {
        **TINY,
        "data": data,
        "model": model,
        "optim": optim,
        "quality_images": 2,
        "report_images": 1,
    }
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def test_coco_mini_to_the_report(shared_data, tmp_path, capsys):
    root = mini(tmp_path / "mini", shared_data / "coco-mini", train=8, val=3)
    out = tmp_path / "run"
    path = config(tmp_path / "run.yaml", root)
    assert main(["train", "--config", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    for text in (printed, metrics["protocol"]["line"], (out / "report.html").read_text()):
        assert f"painted by {MASK_MAKER} (hash {maker_hash()})" in text
        assert "instances.json (sha256 " in text
    assert len(metrics["scores"]["iou"]) == 81
    assert metrics["cams"]["refined"] is not None
    about = json.loads((out / "about.json").read_text())
    assert about["train"]["images"] == 8 and len(about["train"]["mask_ids"]) == 80
    assert "seg" in json.loads((out / "log.jsonl").read_text().splitlines()[-1])


def test_the_recipe_is_what_it_says():
    """method.md G5, built without memory for its weights."""
    recipe = get_recipe("rtc_coco_wr38")
    assert (recipe.data.crop, recipe.data.view2, recipe.optim.batch_size) == (448, 128, 8)
    assert (recipe.optim.epochs, recipe.optim.lr, recipe.pseudo.start) == (10, 0.01, 0.3)
    assert (recipe.pseudo.high, recipe.pseudo.low, recipe.pseudo.refine) == (0.55, 0.2, "varm")
    assert recipe.model.dropout == 0.3 and recipe.model.cam_direct
    recipe.model.weights = "none"
    with torch.device("meta"):
        model = build_model(recipe.model, 80)
    assert model.head.classifier.weight.shape == (81, 4096, 1, 1)
    assert model.decoder.classifier.weight.shape[0] == 81


PEAK = """
import resource, sys
from wsis.cli import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_data(shared_data, tmp_path):
    """The whole run, evaluation included, with every image once and five times; each a process."""
    peaks = {}
    for times in (1, 5):
        source, root = shared_data / "coco-mini", tmp_path / f"mini{times}"
        mini(root, source, train=16, val=6, times=times)
        path = config(tmp_path / f"{times}.yaml", root, report_images=2, quality_images=-1)
        line = ["train", "--config", str(path), "--out", str(tmp_path / f"out{times}")]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *line], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[times] = int(done.stdout.split("peak ")[1])
    print(f"peak of memory, MB: {peaks}")
    assert peaks[5] - peaks[1] < 40  # measured 1163 and 1172
