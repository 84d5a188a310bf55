"""Training batches per processor second: the field's loop, the torch loader, DALI on the CPU.

The loop is what 1-stage-wseg and ToCo do: a `Dataset` of Pillow and torchvision steps on whole
images, normalisation and padded crop in numpy, a plain `DataLoader`. Its steps in order, from
their description: open and convert to RGB, resize the long side (bicubic), mirror, ColorJitter,
numpy, (x / 255 - mean) / std per channel, crop into zeros, HWC to CHW.

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
from torchvision import transforms

from wsis.data import open_dataset
from wsis.data.cache import CachedDataset
from wsis.data.loader import make_loader
from wsis.data.memory import keep_freed_memory

IMAGES, BATCH, CROP, RANGE = 64, 8, 448, (448, 768)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.3, 0.3, 0.3, 0.1)


class Loop(torch.utils.data.Dataset):
    """One image after the other, as the repositories write it."""

    def __init__(self, paths, labels):
        self.paths, self.labels = paths, labels
        self.jitter = transforms.ColorJitter(*JITTER)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = Image.open(self.paths[i]).convert("RGB")
        long_side = random.randint(*RANGE)
        width, height = image.size
        if width < height:
            size = (round(width * long_side / height), long_side)
        else:
            size = (long_side, round(height * long_side / width))
        image = image.resize(size, resample=Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(self.jitter(image))
        normal = np.empty_like(pixels, np.float32)
        for c in range(3):
            normal[..., c] = (pixels[..., c] / 255.0 - MEAN[c]) / STD[c]
        height, width = normal.shape[:2]
        kept_height, kept_width = min(CROP, height), min(CROP, width)
        top, left = random.randint(0, height - kept_height), random.randint(0, width - kept_width)
        y, x = random.randint(0, CROP - kept_height), random.randint(0, CROP - kept_width)
        crop = np.zeros((CROP, CROP, 3), np.float32)
        crop[y : y + kept_height, x : x + kept_width] = normal[
            top : top + kept_height, left : left + kept_width
        ]
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), self.labels[i]


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
            Loop(paths, torch.from_numpy(dataset.labels.copy())), BATCH, shuffle=True
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
