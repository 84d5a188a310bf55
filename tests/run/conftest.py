"""A tiny data set on disk and a run small enough to train many times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from wsis.cli import main
from wsis.data.dataset import open_dataset
from wsis.offline.masks import write_mask

TINY = {
    "data": {
        "dataset": "voc",
        "resize_long": [48, 64],
        "crop": 48,
        "view2": 32,
        "workers": 0,
    },
    "model": {
        "backbone": "small",
        "feature_dim": 8,
        "crr_dims": [8, 8, 8, 8],
        "decoder_dims": [8, 8, 8, 8],
        "freeze_stem": False,
        "freeze_bn": False,
    },
    "loss": {"contrast_start": 0.0},
    "pseudo": {"start": 0.3, "iterations": 2, "dilations": [1, 2]},
    "optim": {"lr": 0.01, "momentum": 0.9, "epochs": 3, "batch_size": 4, "ema": 0.5},
    "predict": {"scales": [1.0], "background": 0.17},
    "threads": 1,
    "device": "cpu",
    "report_images": 2,
}


def write_tree(root: Path, *, train: int = 12, val: int = 4, masks: bool = True) -> Path:
    """Scenes as a flat VOC tree: JPEGImages, labels.json, lists, optionally SegmentationClass."""
    labels, lists = {}, {}
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        scenes = open_dataset("scenes", split=split)
        lists[split] = [f"{split}_{i:03d}" for i in range(count)]
        for i, name in enumerate(lists[split]):
            image = scenes.image(i).resize((64, 64), Image.Resampling.BOX)
            image.save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            labels[name] = [int(k) + 1 for k in np.flatnonzero(scenes.labels[i])]
            if masks:
                mask = Image.fromarray(scenes.mask(i)).resize((64, 64), Image.Resampling.NEAREST)
                path = root / "SegmentationClass" / f"{name}.png"
                path.parent.mkdir(exist_ok=True)
                write_mask(path, np.asarray(mask), scenes.mask_ids)
        text = "".join(f"{name}\n" for name in lists[split])
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)
    classes = {str(k + 1): name for k, name in enumerate(scenes.classes)}
    (root / "labels.json").write_text(json.dumps({"classes": classes, "labels": labels}))
    return root


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """The tiny data set."""
    return write_tree(tmp_path_factory.mktemp("data") / "tree")


@pytest.fixture
def tiny(tree, tmp_path) -> Path:
    """A YAML file with the tiny run."""
    path = tmp_path / "tiny.yaml"
    data = {**TINY, "data": {**TINY["data"], "root": str(tree)}}
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="session")
def trained(tree, tmp_path_factory):
    """A finished tiny run, in process; a test that changes its files copies it first."""
    base = tmp_path_factory.mktemp("trained")
    path = base / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "root": str(tree)}}))
    assert main(["train", "--config", str(path), "--out", str(base / "run")]) == 0
    return base / "run"


def command(*arguments: object) -> list[str]:
    """The command line of a subprocess."""
    return [sys.executable, "-m", "wsis", *map(str, arguments)]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `wsis` in a process of its own."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=240, check=False, **options
    )


def run_twice_at_once(port: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `wsis` in two processes of one torchrun; it must succeed."""
    line = command(*arguments)
    launch = [line[0], "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [*launch, *line[1:]],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
