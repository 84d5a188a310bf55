"""A training step's affinity loss, forward and backward, on one thread: wsis against the form that
the repositories have, with their index tables made beforehand.

IRN: boundaries and displacements of two crops of 512, grid 128 x 128, radius 10. PSA: features of
four crops of 448, grid 56 x 56, 448 channels, radius 5. AFA: attention of eight crops of 320, 400
tokens, window 8. Labels of pairs are part of the step: IRN's and PSA's repositories make them in
their data loaders, AFA's in the step. Values are compared first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.memory import peak_so_far
from wsis.compat import afa, irn, psa
from wsis.losses import afa_affinity_loss, irn_losses, psa_losses


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(batch, side):
    """Leaves of the networks and masks of blocks, a quarter of them unknown."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 4, (batch, -(-side // 8), -(-side // 8)), generator=g)
    masks = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :side, :side]
    return g, masks.masked_fill(masks == 3, 255)


def mean(loss, label, factor=1):
    weight = label if loss.dim() == 3 else label[:, None]
    return (loss * weight).sum() / (factor * label.sum() + 1e-5)


def by_image(extract, masks):
    planes = zip(*(extract(mask) for mask in masks.numpy()), strict=True)
    return [torch.stack([torch.as_tensor(p) for p in group]) for group in planes]


def irn_step(way, small=False):
    side = 24 if small else 128
    g, masks = draw(2, side)
    edge = torch.randn(2, 1, side, side, generator=g).requires_grad_()
    field = torch.randn(2, 2, side, side, generator=g).requires_grad_()
    if way == "wsis":
        return lambda: irn_losses(edge.sigmoid(), field, masks).total, (edge, field)
    paths = irn.PathIndex(10, (side, side))
    extract = irn.GetAffinityLabelFromIndices(paths.src_indices, paths.dst_indices)
    assert paths.path_indices  # made here, not in the step

    def total():
        background, foreground, negative = by_image(extract, masks)
        pos, neg, dp_fg, dp_bg = irn.affinity_displacement_loss(edge, field, paths)
        positive = mean(pos, background) / 2 + mean(pos, foreground) / 2
        displacement = mean(dp_fg, foreground, 2) + mean(dp_bg, background, 2)
        return (positive + mean(neg, negative)) / 2 + displacement / 2

    return total, (edge, field)


def psa_step(way, small=False):
    side, channels = (16, 8) if small else (56, 448)
    g, masks = draw(4, side)
    features = torch.randn(4, channels, side, side, generator=g).requires_grad_()
    if way == "wsis":
        return lambda: psa_losses(features, masks).total, (features,)
    ind_from, ind_to = (torch.from_numpy(x) for x in psa.get_indices_of_pairs(5, (side, side)))
    extract = psa.ExtractAffinityLabelInRadius(side)

    def total():
        flat = features.flatten(2)
        first = flat.index_select(2, ind_from)[:, :, None]
        second = flat.index_select(2, ind_to).view(4, channels, -1, len(ind_from))
        aff = torch.exp(-(second - first).abs().mean(dim=1))
        background, foreground, negative = by_image(extract, masks)
        positive, other = -torch.log(aff + 1e-5), -torch.log(1 + 1e-5 - aff)
        means = mean(positive, background), mean(positive, foreground), mean(other, negative)
        return means[0] / 4 + means[1] / 4 + means[2] / 2

    return total, (features,)


def afa_step(way, small=False):
    side = 8 if small else 20
    g, masks = draw(8, side)
    attention = torch.rand(8, side**2, side**2, generator=g).requires_grad_()
    if way == "wsis":
        return lambda: afa_affinity_loss(attention, masks, radius=8).loss, (attention,)
    window = torch.from_numpy(afa.get_mask_by_radius(side, side, 8))
    full = masks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return (
        lambda: afa.get_aff_loss(attention, afa.cams_to_affinity_label(full, window))[0],
        (attention,),
    )


CASES = {
    "IRN loss, 2 x 128 x 128, radius 10": irn_step,
    "PSA loss, 4 x 448 x 56 x 56, radius 5": psa_step,
    "AFA affinity loss, 8 x 400 tokens, window 8": afa_step,
}


def step(total, leaves):
    value = total()
    return value.detach(), torch.autograd.grad(value, leaves)


def peak_mib(way, name):
    """Memory of one step above its inputs and tables, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), way, name]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(way, name):
    torch.set_num_threads(1)
    step(*CASES[name](way, small=True))  # what is loaded at the first call
    case = CASES[name](way)
    before = peak_so_far()
    step(*case)
    print(peak_so_far() - before)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("way", ["wsis", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_step(benchmark, name, way):
    total, leaves = CASES[name](way)
    if way == "wsis":  # correctness first
        value, grads = step(total, leaves)
        expected, expected_grads = step(*CASES[name]("torch"))
        assert abs(value - expected) <= 1e-5 * expected.abs()
        for grad, other in zip(grads, expected_grads, strict=True):
            assert (grad - other).abs().max() <= 1e-4 * other.abs().max()
    benchmark.group = f"{name}, forward and backward"
    benchmark.extra_info["baseline"] = way == "torch"
    benchmark.extra_info["peak_mib"] = round(peak_mib(way, name))
    benchmark.pedantic(partial(step, total, leaves), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    print_peak(sys.argv[1], sys.argv[2])
