"""Evaluation of photographs: the stream of wsis against its own plain loop, Pillow against DALI.

Everything that `wsis evaluate` does with an image: reading, EfficientNet-Lite0 at the three sizes
of the recipe `lite0` and mirrored, fusing, the CRF (or none), confusion matrix, the curve over
background scores, mask PNG. `wsis` is the stream with two threads before the network and two after
it, `loop` works on one image after the other. Weights are random: they do not change what an image
costs.

Measured in processor time of all threads, so that a busy machine changes little, with one thread
of torch. Beside it stands the part of the thread that runs the network: on cores that are free an
evaluation takes no less than its busiest thread, which is this one in the stream and all there is
in the loop.

`--root` names a data set in VOC's layout; without one JPEGs of smooth noise are made.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from wsis.data import open_dataset
from wsis.engine.build import build_model
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.segmentation import evaluate_segmentation
from wsis.recipes import get_recipe

IMAGES, ROUNDS = 5, 2
WAYS = {
    "wsis": {"workers": 2},
    "loop": {"workers": 0},
    "wsis_by_dali_cpu": {"workers": 2, "loader": "dali"},
}


@pytest.fixture(scope="module")
def photographs(request, tmp_path_factory):
    """A data set of images and masks, and what they are."""
    root = request.config.getoption("--root", default=None)
    if root is not None:
        return open_dataset("voc", root, "val"), "photographs"
    folder = tmp_path_factory.mktemp("images")
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    for k in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{k}.jpg", quality=90)
        mask = Image.fromarray(rng.integers(0, 7, (12, 16), np.uint8))
        mask.resize((500, 375), Image.Resampling.NEAREST).save(folder / "masks" / f"{k}.png")
    rows = "".join(f"{k}.jpg,{'abcdef'[k % 6]}\n" for k in range(IMAGES))
    (folder / "val.csv").write_text(f"image,labels\n{rows}")
    return open_dataset("folder", folder, "val"), "generated JPEGs"


@pytest.fixture(scope="module")
def network(photographs):
    torch.manual_seed(0)
    config = get_recipe("lite0")
    config.model.weights = "none"
    model = build_model(config.model, len(photographs[0].classes))
    return model.to(memory_format=torch.channels_last).eval(), config.predict


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("crf", ["none", "psa"])
@pytest.mark.benchmark(timer=time.process_time)
def test_evaluation(benchmark, photographs, network, tmp_path, crf, way):
    if "dali" in way:
        pytest.importorskip("nvidia.dali")
    (data, title), (model, predict) = photographs, network
    torch.set_num_threads(1)
    protocol = Protocol(**{**asdict(predict), "crf": crf})
    found, busiest = [], []

    def run():
        start = time.thread_time()
        options = {"protocol": protocol, "limit": IMAGES, "out": tmp_path, **WAYS[way]}
        found.append(evaluate_segmentation(model, data, **options))
        busiest.append(time.thread_time() - start)

    benchmark.group = f"{IMAGES} {title}, {'no CRF' if crf == 'none' else f'CRF {crf}'}"
    benchmark.extra_info["baseline"] = way == "loop"
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    assert all(result == found[0] for result in found)
    if way == "wsis":
        alone = evaluate_segmentation(model, data, protocol=protocol, limit=IMAGES, workers=0)
        assert alone == found[0]
    own = statistics.median(busiest[1:])
    benchmark.extra_info["network_thread_ms"] = round(1e3 * own, 1)
    benchmark.extra_info["images_per_s_at_best"] = round(IMAGES / own, 2)
