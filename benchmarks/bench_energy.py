"""The dense energy loss against rloss's and against one class at a time; and the windowed Gated
CRF loss against plain torch.

DenseEnergyLoss, forward and backward, 4 images with 21 classes on a lattice of 224 x 224: from 224
x 224 at scale 1, and from 448 x 448 at scale 0.5, where resizing the probabilities and their
gradient takes most of the time. All ways must give the same loss and gradient, which is asserted
first. The peers:

* ``rloss``: the module ``bilateralfilter`` of meng-tang/rloss (MIT), which filters one class a
  pass; around it the gated loss as its users write it, with arrays of numpy, but without the copies
  of crop and gate for every class that those make. One image a call, which takes one thread. To
  build it, in pytorch/wrapper/bilateralfilter of a clone, with numpy.i from numpy's tools/swig
  beside it: ``pip install swig==4.0.2``, ``swig -python -c++ bilateralfilter.i``,
  ``LDFLAGS=-fopenmp python setup.py build``; then put build/lib* on PYTHONPATH. Without it this
  peer is skipped.
* ``wsis_by_class``: this package's own filter, one class a pass: the same lattice, built once, and
  all else shared.

Lattice and filter are also measured alone, as the whole of what replaces rloss's module; there the
densecrf library (pydensecrf2), with the same lattice code, takes part too. A pass there includes
the softmax of its one class, and does not give the filtered class away; that the values are the
same is a golden test (`filter_item0`).

Gated CRF: the published form takes all neighbours apart (gigabytes); the good baseline sums over
shifted views.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.pairs import paired_ratio
from tests.reference import gated_crf as reference
from wsis.compat import DenseEnergyLoss
from wsis.ops import energy
from wsis.ops.gated_crf import KERNELS, RADIUS, gated_crf_loss

BATCH, CLASSES, SCALED = 4, 21, 224
LAYERS = {  # by the size of the image
    224: DenseEnergyLoss(weight=1e-7, sigma_rgb=15, sigma_xy=50, scale_factor=1),
    448: DenseEnergyLoss(weight=1e-7, sigma_rgb=15, sigma_xy=100, scale_factor=0.5),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photographs(batch, size, patches):
    """Smooth patches with a little noise, 0 to 255."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, patches, patches, generator=g)
    image = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (image + 0.01 * torch.rand(image.shape, generator=g)).clamp(0, 1) * 255


def energy_case(batch=BATCH, classes=CLASSES, size=448):
    g = torch.Generator().manual_seed(1)
    probs = torch.randn(batch, classes, size, size, generator=g).softmax(dim=1).requires_grad_()
    roi = torch.ones(batch, size, size)
    labels = torch.randint(classes, (batch, 1, size, size), generator=g, dtype=torch.uint8)
    labels[..., ::5] = 255
    return photographs(batch, size, 5), probs, roi, labels


FILTER, LATTICE = energy._filter, energy.bilateral_lattice


def by_class(values, lattice, before=None, after=None):
    """Crop and gate for all classes together, not once a pass."""
    seen = values if before is None else values * before
    field = torch.cat([FILTER(one.contiguous(), lattice) for one in seen.split(1, dim=1)], dim=1)
    return field if after is None else field.mul_(after)


def rloss_filter(values, points):
    """``points``: image, sigma_xy, sigma_rgb. The module makes a lattice, then filters by class."""
    peer = pytest.importorskip("bilateralfilter", reason="needs rloss's module, see above")
    image, sigma_xy, widths = points
    out = np.zeros(values.shape, np.float32)
    for one, maps, field in zip(image.numpy(), values.numpy(), out, strict=True):
        flat = one.ravel(), maps.ravel(), field.reshape(-1)
        peer.bilateralfilter(*flat, *values.shape[-2:], widths[0], sigma_xy)
    return torch.from_numpy(out)


class RlossEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probs, image, roi, unlabelled, sigma_rgb, sigma_xy):
        gate = (roi - probs.amax(dim=1, keepdim=True)).clamp(min=0).masked_fill(unlabelled, 1)
        seen = (probs * roi).contiguous()
        field = rloss_filter(seen, (image, sigma_xy, [sigma_rgb])).mul_(gate)
        ctx.field, ctx.roi = field, roi
        return seen.new_tensor(-np.dot(seen.numpy().ravel(), field.numpy().ravel()) / len(probs))

    @staticmethod
    def backward(ctx, upstream):
        return -2 * upstream / len(ctx.roi) * ctx.field * ctx.roi, *[None] * 5


def rloss_loss(layer, image, probs, roi, labels):
    def scaled(maps, **how):
        factor = layer.scale_factor
        return maps if factor == 1 else F.interpolate(maps, scale_factor=factor, **how)

    sigmas = float(layer.sigma_rgb), layer.sigma_xy * float(layer.scale_factor)
    small = scaled(probs, mode="bilinear", align_corners=False)
    crop, unlabelled = scaled(roi[:, None]), scaled(labels) == 255
    return layer.weight * RlossEnergy.apply(small, scaled(image), crop, unlabelled, *sigmas)


def densecrf_lattice(image, sigma_xy, widths):
    """A CRF of one label for each image: a step of its inference filters the label once."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    crfs = []
    for one in image:
        height, width = one.shape[1:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = torch.stack([x, y]) / sigma_xy
        features = torch.cat([place, one / torch.tensor(widths)[:, None, None]]).flatten(1)
        crf = densecrf.DenseCRF(height * width, 1)
        crf.setUnaryEnergy(np.zeros((1, height * width), np.float32))
        crf.addPairwiseEnergy(
            np.ascontiguousarray(features.numpy()),
            compat=1,
            kernel=densecrf.CONST_KERNEL,
            normalization=densecrf.NO_NORMALIZATION,
        )
        crfs.append(crf)
    return crfs


def densecrf_by_class(values, crfs):
    for crf, planes in zip(crfs, values.flatten(2).numpy(), strict=True):
        label, logits, filtered = crf.startInference()
        for plane in planes:
            np.asarray(label)[0] = plane
            crf.stepInference(label, logits, filtered)


# How -> (the lattice of a batch of images, the filter on it).
WAYS = {
    "wsis": (LATTICE, FILTER),
    "wsis_by_class": (LATTICE, by_class),
    "rloss": (lambda *points: points, rloss_filter),
}
FILTERS = {**WAYS, "densecrf_by_class": (densecrf_lattice, densecrf_by_class)}
RLOSS = find_spec("bilateralfilter") is not None


def gradient(loss, probs, *arguments):
    probs.grad = None
    value = loss(*arguments)
    value.backward()
    return value.detach(), probs.grad


def energy_step(way, image, probs, roi, labels):
    layer = LAYERS[image.shape[-1]]
    if way == "rloss":
        return gradient(rloss_loss, probs, layer, image, probs, roi, labels)
    lattice, apply = WAYS[way]
    with mock.patch.multiple(energy, bilateral_lattice=lattice, _filter=apply):
        return gradient(layer, probs, image, probs, roi, labels)


def window_case(batch, classes=CLASSES, size=112):
    g = torch.Generator().manual_seed(1)
    probs = torch.randn(batch, classes, size, size, generator=g).softmax(dim=1).requires_grad_()
    return photographs(batch, size, size // 4) / 255, probs


WINDOWS = {
    "wsis": gated_crf_loss,
    "torch_shifted": reference.shifted_loss,
    "torch_unfold": reference.unfold_loss,
}


def window_step(way, image, probs):
    return gradient(WINDOWS[way], probs, probs, {"rgb": image}, KERNELS, RADIUS)


STEPS = {"energy": (energy_step, energy_case), "window": (window_step, window_case)}


def peak_mib(step, way, batch, size):
    """Memory of one call above its arguments, gradient included, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), step, way, str(batch), str(size)]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return round(float(done.stdout))


def print_peak(step, way, batch, size):
    torch.set_num_threads(1)
    call, make = STEPS[step]
    LAYERS[32] = LAYERS[224]
    call(way, *make(1, 2, 32))  # what is loaded at the first call
    case = make(int(batch), CLASSES, int(size))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here, not from `make`
    before = status("VmRSS")
    call(way, *case)
    print((status("VmHWM") - before) / 1024)


def status(name):
    """A line of /proc/self/status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def same(one, other, relative):
    for got, expected in zip(one, other, strict=True):
        assert (got - expected).abs().max() <= relative * expected.abs().max()


def test_lattice_has_the_size_of_a_photograph():
    """12 of the VOC photographs at this size and width have 1,900 to 10,700 vertices."""
    vertices = LATTICE(photographs(BATCH, SCALED, 5), 50.0, [15.0] * 3).vertices
    assert all(1_900 <= number <= 10_700 for number in vertices), vertices


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", LAYERS)
def test_energy(benchmark, size, way):
    case = energy_case(size=size)
    expected = [x.clone() for x in energy_step("wsis_by_class", *case)]
    same(energy_step(way, *case), expected, 1e-4)
    benchmark.group = f"DenseEnergyLoss {BATCH} x {CLASSES} x {size} x {size} with gradient"
    benchmark.extra_info["baseline"] = way == ("rloss" if RLOSS else "wsis_by_class")
    benchmark.extra_info["peak_mib"] = peak_mib("energy", way, BATCH, size)
    benchmark.pedantic(energy_step, args=(way, *case), rounds=9, warmup_rounds=1)
    if way != "wsis":
        benchmark.extra_info["paired_ratio"] = paired_ratio(
            lambda: energy_step(way, *case), lambda: energy_step("wsis", *case)
        )


@pytest.mark.parametrize("way", FILTERS)
def test_filter(benchmark, way):
    """The lattice included: the whole of what replaces rloss's module."""
    image, probs, *_ = energy_case(size=SCALED)
    (lattice, apply), probs = FILTERS[way], probs.detach()
    if way not in ("wsis", "densecrf_by_class"):
        expected = FILTER(probs, LATTICE(image, 50.0, [15.0] * 3))
        same([apply(probs, lattice(image, 50.0, [15.0] * 3))], [expected], 1e-4)
    benchmark.group = f"lattice and filter, {BATCH} x {CLASSES} x {SCALED} x {SCALED}"
    benchmark.extra_info["baseline"] = way == ("rloss" if RLOSS else "densecrf_by_class")
    benchmark.pedantic(
        lambda: apply(probs, lattice(image, 50.0, [15.0] * 3)), rounds=9, warmup_rounds=1
    )
    if way != "wsis":
        benchmark.extra_info["paired_ratio"] = paired_ratio(
            lambda: apply(probs, lattice(image, 50.0, [15.0] * 3)),
            lambda: FILTER(probs, LATTICE(image, 50.0, [15.0] * 3)),
        )


@pytest.mark.parametrize("way", ["wsis", "torch_shifted", "torch_unfold"])
def test_window(benchmark, way):
    batch = 2
    case = window_case(batch)
    got = window_step(way, *case)[1].clone()
    same([got], [window_step("torch_shifted", *case)[1]], 1e-4)
    benchmark.group = f"Gated CRF {batch} x {CLASSES} x 112 x 112, radius {RADIUS}, with gradient"
    benchmark.extra_info["baseline"] = way == "torch_shifted"
    benchmark.extra_info["peak_mib"] = peak_mib("window", way, batch, 112)
    rounds = {"wsis": 7, "torch_shifted": 5, "torch_unfold": 3}[way]
    benchmark.pedantic(window_step, args=(way, *case), rounds=rounds, warmup_rounds=0)


if __name__ == "__main__":
    print_peak(*sys.argv[1:])
