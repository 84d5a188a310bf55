"""The dense CRF against pydensecrf2 in the same process, one thread each, 10 iterations.

Labels are compared first: all presets must agree on at least 99.99 % of the pixels. CPU time, from
the energies to Q: building the lattices, inference, and the result as an array.

    python -m pytest benchmarks/bench_dense_crf.py --root FOLDER

adds the first 20 photographs of a folder in VOC's layout (``JPEGImages``, ``SegmentationClass``):
per preset the median ratio and the number of differing labels.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.pairs import paired_ratio
from wsis.ops.dense_crf import PRESETS, Gaussian, dense_crf

densecrf = pytest.importorskip("pydensecrf.densecrf", reason="needs pydensecrf2")

ITERATIONS = 10
CASES = {
    "psa, 21 labels, 375 x 500": ("psa", 21, 375, 500),
    "irn-label, 21 labels, 375 x 500": ("irn-label", 21, 375, 500),
    "toco, 21 labels, 375 x 500": ("toco", 21, 375, 500),
    "deeplab, 21 labels, 375 x 500": ("deeplab", 21, 375, 500),
    "psa, 4 labels, 375 x 500": ("psa", 4, 375, 500),
    "psa, 81 labels, 480 x 640": ("psa", 81, 480, 640),
}
PHOTOGRAPHS = 20


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_case(labels, height, width):
    """A picture of smooth regions with noise ``[H, W, 3]``, and energies ``[C, H, W]``."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 40, width // 40, generator=g)
    image = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255
    image = image + 6 * torch.randn(image.shape, generator=g)
    image = image.clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()
    coarse = 4 * torch.randn(1, labels, height // 16, width // 16, generator=g)
    probs = F.interpolate(coarse, (height, width), mode="bilinear").softmax(dim=1)[0]
    return image, -probs.clamp(1e-5, 1).log().contiguous().numpy()


def ours(preset, image, energy):
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    unary = torch.from_numpy(energy)[None]
    options = {"preset": preset, "iterations": ITERATIONS, "unary_kind": "energy"}
    return dense_crf(pixels, unary, **options)[0].numpy()


def theirs(preset, image, energy):
    labels, height, width = energy.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(energy.reshape(labels, -1))
    for term in PRESETS[preset]:
        if isinstance(term, Gaussian):
            crf.addPairwiseGaussian(sxy=term.sxy, compat=term.compat)
        else:
            crf.addPairwiseBilateral(sxy=term.sxy, srgb=term.srgb, rgbim=image, compat=term.compat)
    return np.array(crf.inference(ITERATIONS)).reshape(energy.shape)


WAYS = {"pydensecrf2": theirs, "wsis": ours}


def seconds(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def peak_mib(name, way):
    """Memory of one call above its arguments, result included, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), name, way]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(name, way):
    preset, *shape = CASES[name]
    torch.set_num_threads(1)
    WAYS[way](preset, *make_case(2, 64, 80))  # what is loaded at the first call
    case = make_case(*shape)
    # What making the case needed for a while must not hide the call's own peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_of_process()
    WAYS[way](preset, *case)
    print((peak_of_process() - before) / 1024)


def peak_of_process():
    """KiB, since the last reset where the system can reset it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", ["wsis", "pydensecrf2"])
@pytest.mark.parametrize("name", CASES)
def test_crf(benchmark, name, way):
    preset, *shape = CASES[name]
    case = make_case(*shape)
    if way == "wsis":
        differing = int((ours(preset, *case).argmax(0) != theirs(preset, *case).argmax(0)).sum())
        assert differing <= 1e-4 * case[1][0].size
        benchmark.extra_info["differing_labels"] = differing
    benchmark.group = f"{name}, {ITERATIONS} iterations"
    benchmark.extra_info["baseline"] = way == "pydensecrf2"
    benchmark.extra_info["peak_mib"] = round(peak_mib(name, way))
    benchmark.pedantic(WAYS[way], args=(preset, *case), rounds=5, warmup_rounds=1)
    if way != "wsis":
        benchmark.extra_info["paired_ratio"] = paired_ratio(
            lambda: WAYS[way](preset, *case), lambda: ours(preset, *case)
        )


# ---- photographs -------------------------------------------------------------------------------


def blurred(mask, labels=21, sigma=8.0):
    """0.7 for the mask's label, the rest shared, blurred, made to sum to 1; as energies."""
    hot = F.one_hot(torch.from_numpy(mask.astype(np.int64)), labels).permute(2, 0, 1).float()
    probs = hot * 0.7 + (1 - hot) * (0.3 / (labels - 1))
    radius = int(4 * sigma)
    kernel = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for shape, padding in (((1, 1, 1, -1), (radius, radius, 0, 0)),
                           ((1, 1, -1, 1), (0, 0, radius, radius))):  # fmt: skip
        padded = F.pad(probs[:, None], padding, mode="replicate")
        probs = F.conv2d(padded, kernel.view(shape))[:, 0]
    probs = probs / probs.sum(dim=0)
    return -probs.clamp(1e-5, 1).log().contiguous().numpy()


def photographs(root):
    from PIL import Image

    for path in sorted((root / "SegmentationClass").glob("*.png"))[:PHOTOGRAPHS]:
        mask = np.array(Image.open(path))
        image = Image.open(root / "JPEGImages" / f"{path.stem}.jpg").convert("RGB")
        yield np.array(image), np.where(mask > 20, 0, mask)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("preset", ["psa", "irn-label", "toco", "deeplab"])
def test_photographs(benchmark, request, preset):
    root = request.config.getoption("--root", default=None)
    if not root:
        pytest.skip("needs --root FOLDER")
    ratios, differing, pixels = [], 0, 0
    for image, mask in photographs(Path(root)):
        energy = blurred(mask)
        mine, q = seconds(lambda case=(preset, image, energy): ours(*case))
        other, expected = seconds(lambda case=(preset, image, energy): theirs(*case))
        ratios.append(other / mine)
        differing += int((q.argmax(0) != expected.argmax(0)).sum())
        pixels += mask.size
    assert differing <= 1e-4 * pixels
    benchmark.group = f"{preset}, {len(ratios)} photographs, 21 labels"
    benchmark.extra_info["median_ratio"] = round(statistics.median(ratios), 2)
    benchmark.extra_info["differing_labels"] = differing
    benchmark.extra_info["pixels"] = pixels
    benchmark.pedantic(ours, args=(preset, image, energy), rounds=3, warmup_rounds=0)


if __name__ == "__main__":
    print_peak(*sys.argv[1:])
