"""Training batches per processor second: the field's loop, the torch loader, DALI on the CPU.

The loop is `wsis.bench.loop`: what 1-stage-wseg and ToCo do, from their description.

`wsis_cached` is the torch loader with `data.cache`. All in one process with one thread of work and
freed memory kept, as in a worker of ours, measured in processor time of all its threads, so that a
busy machine changes little. `--root` names a data set in VOC's layout; without one JPEGs of
smooth noise are made.
"""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from PIL import Image

from wsis.bench.loop import Loop
from wsis.data import open_dataset
from wsis.data.cache import CachedDataset
from wsis.data.loader import make_loader
from wsis.data.memory import keep_freed_memory

IMAGES, BATCH, CROP, RANGE = 64, 8, 448, (448, 768)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.3, 0.3, 0.3, 0.1)


@pytest.fixture(scope="module")
def photographs(request, tmp_path_factory):
    """A data set of IMAGES files, and what they are."""
    root = request.config.getoption("--root", default=None)
    if root is not None:
        data = open_dataset("voc", root, "train")
        # The loaders take a whole data set; a stride takes all sorts of it.
        keep = range(0, len(data), max(1, len(data) // IMAGES))[:IMAGES]
        paths = [data.image_path(i) for i in keep]
        title = "photographs"
    else:
        paths = [None] * IMAGES
        title = "generated JPEGs"
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k, path in enumerate(paths):
        if path is not None:
            (folder / f"{k}.jpg").write_bytes(path.read_bytes())
            continue
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{k}.jpg", quality=90)
    rows = "".join(f"{k}.jpg,thing\n" for k in range(IMAGES))
    (folder / "train.csv").write_text(f"image,labels\n{rows}")
    return open_dataset("folder", folder), title


def batches(way, dataset, folder):
    """A function that runs through one epoch."""
    if way == "loop":
        paths = [dataset.image_path(i) for i in range(len(dataset))]
        loader = torch.utils.data.DataLoader(
            Loop(
                lambda i: Image.open(paths[i]),
                torch.from_numpy(dataset.labels.copy()),
                crop=CROP,
                resize_long=RANGE,
                jitter=JITTER,
                mean=MEAN,
                std=STD,
            ),
            BATCH,
            shuffle=True,
        )
        return lambda: sum(len(images) for images, _ in loader)
    if way == "wsis_cached":
        dataset = CachedDataset(dataset, folder, limit_gb=1, progress=False)
    loader = make_loader(
        "dali" if way == "wsis_by_dali_cpu" else "torch", dataset, batch_size=BATCH, crop=CROP,
        resize_long=RANGE, flip=0.5, jitter=JITTER, mean=MEAN, std=STD, seed=1,
    )  # fmt: skip
    return lambda: sum(len(batch.image) for batch in loader.epoch(0))


@pytest.mark.parametrize("way", ["wsis", "loop", "wsis_cached", "wsis_by_dali_cpu"])
@pytest.mark.benchmark(timer=time.process_time)
def test_loader(benchmark, photographs, way, tmp_path):
    if way == "wsis_by_dali_cpu":
        pytest.importorskip("nvidia.dali")
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset, title = photographs
    random.seed(0)
    torch.manual_seed(0)
    run = batches(way, dataset, tmp_path)
    assert run() == IMAGES
    benchmark.group = f"{IMAGES} {title} to {CROP} px"
    benchmark.extra_info["baseline"] = way == "loop"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    per_second = IMAGES / benchmark.stats.stats.median
    benchmark.extra_info["images_per_s"] = round(per_second, 1)
