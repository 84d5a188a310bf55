"""Random walks: values against the dense formulas, gradients to the maps, edges, golden files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import random_walk as reference
from wsis.ops import _random_walk as native
from wsis.ops.random_walk import (
    attention_propagate,
    disc_offsets,
    path_affinity,
    propagate_to_edge,
    random_walk,
    window_mask,
)


def draw(batch, classes, height, width, radius=5, symmetric=True, dtype=torch.float64, seed=0):
    """Maps, and affinities of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    channels = len(disc_offsets(radius)) * (1 if symmetric else 2)
    shapes = [(batch, n, height, width) for n in (classes, channels)]
    maps, affinity = (torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes)
    affinity[affinity < 0.1] = 0
    return maps.to(dtype), affinity.to(dtype)


def rows(radius, symmetric):
    half = reference.half_disc(radius)
    return half if symmetric else half + [(-y, -x) for y, x in half]


def dense_operator(affinity, offsets, beta, log_steps, symmetric):
    """T^n of every image, [B, N, N], float64 torch."""
    matrices = []
    for one in affinity:
        full = reference.dense_affinity(one, offsets, symmetric)
        matrix = reference.transition(full, beta)
        for _ in range(log_steps):
            matrix = matrix @ matrix
        matrices.append(torch.from_numpy(matrix))
    return torch.stack(matrices)


def check(batch, classes, size, radius, beta, log_steps, symmetric, dtype, seed=0):
    """Result and gradient to the maps."""
    maps, affinity = draw(batch, classes, *size, radius, symmetric, dtype, seed)
    offsets = rows(radius, symmetric)
    maps.requires_grad_()
    out = random_walk(maps, affinity, radius, beta=beta, log_steps=log_steps, symmetric=symmetric)
    assert out.dtype == dtype
    matrix = dense_operator(affinity.double(), offsets, beta, log_steps, symmetric)
    expected = torch.matmul(maps.detach().double().flatten(2), matrix)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(out, maps, upstream.to(dtype))
    expected_gradient = torch.matmul(upstream.double().flatten(2), matrix.mT)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for got, wanted in ((out, expected), (gradient, expected_gradient)):
        scale = max(1.0, float(wanted.abs().max()))
        assert (got.detach().flatten(2) - wanted).abs().max() <= tolerance * scale


ANYTHING = {
    "batch": st.integers(1, 3),
    "classes": st.integers(1, 9),
    "size": st.tuples(st.integers(1, 14), st.integers(1, 19)),
    "radius": st.integers(1, 7),
    "beta": st.sampled_from([1, 2, 8, 10, 0.5, 3.7, 100]),
    "log_steps": st.integers(0, 9),
    "symmetric": st.booleans(),
    "seed": st.integers(0, 999),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**ANYTHING)
def test_anything_in_double(batch, classes, size, radius, beta, log_steps, symmetric, seed):
    check(batch, classes, size, radius, beta, log_steps, symmetric, torch.float64, seed)


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(**ANYTHING)
def test_anything_in_double_at_length(
    batch, classes, size, radius, beta, log_steps, symmetric, seed
):
    size = (size[0] + 5, size[1] + 12)
    check(batch, classes, size, radius, beta, log_steps, symmetric, torch.float64, seed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 21])
def test_single_precision(classes, symmetric):
    check(2, classes, (13, 17), 5, 8, 8, symmetric, torch.float32)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 520])
def test_rows_of_any_width(width):
    """Around whole lines, and beyond the columns whose weights are made together."""
    check(1, 2, (4, width), 4, 8, 3, True, torch.float64)


def test_real_size_in_single_precision():
    """94 x 125, edges as a network gives them: float32 against float64."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 3, 94, 125, generator=generator)
    for sharpness in (1, 4):
        edge = torch.rand(1, 94, 125, generator=generator) ** sharpness
        single = propagate_to_edge(maps, edge)
        double = propagate_to_edge(maps.double(), edge.double())
        assert (single - double).abs().max() <= 2e-5


# ---- the expansion -----------------------------------------------------------------------------


@pytest.mark.parametrize("log_steps", [6, 8, 10, 12])
@pytest.mark.parametrize("tail", [1e-9, 1e-17])
def test_coefficients_give_the_power(log_steps, tail):
    steps = 1 << log_steps
    found = native.coefficients(steps, tail)
    if not found:
        assert (log_steps, tail) == (6, 1e-17)
        return
    # Sachdeva and Vishnoi: the tail beyond d is at most 2 exp(-d^2 / 2 n).
    assert len(found) <= 1 + math.sqrt(2 * steps * math.log(2 / tail))
    z = np.cos(np.linspace(0, np.pi, 999))
    error = np.polynomial.chebyshev.chebval(z, found) - z**steps
    assert np.abs(error).max() <= 2 * tail + 1e-13
    assert math.isclose(sum(found), 1, abs_tol=1e-15)


def test_few_products():
    """98 for the 256 steps of both methods, 195 for 1024; small powers are taken as they are."""
    assert len(native.coefficients(256, 1e-9)) - 1 <= 98
    assert len(native.coefficients(1024, 1e-9)) - 1 <= 195
    assert native.coefficients(16, 1e-9) == ()
    assert native.coefficients(1, 1e-9) == ()


def test_expansion_and_plain_products_agree(monkeypatch):
    maps, affinity = draw(2, 3, 13, 17)
    expanded = random_walk(maps, affinity)
    monkeypatch.setattr(native, "coefficients", lambda steps, tail: ())
    plain = random_walk(maps, affinity)
    assert not torch.equal(expanded, plain)
    torch.testing.assert_close(expanded, plain, rtol=0, atol=1e-13)


def test_very_long_walks_end_in_the_stationary_mean():
    """2^20 steps: on a connected grid every column is s / sum s."""
    maps, affinity = draw(1, 2, 9, 11)
    out = random_walk(maps, affinity.clamp(min=0.2), beta=1, log_steps=20)
    full = reference.dense_affinity(affinity[0].clamp(min=0.2), reference.half_disc(5))
    weights = torch.from_numpy(full.sum(0)).reshape(9, 11)
    assert float((out - out.flatten(2).mean(2)[..., None, None]).abs().max()) <= 1e-9
    kept = (maps * weights).sum((2, 3))  # pi of the reversible chain
    torch.testing.assert_close((out * weights).sum((2, 3)), kept)


# ---- properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_maps_stay_and_results_are_means(dtype, symmetric):
    maps, affinity = draw(2, 3, 11, 14, symmetric=symmetric, dtype=dtype)
    rounding = 64 * torch.finfo(dtype).eps  # of 97 products
    ones = random_walk(torch.ones_like(maps), affinity, symmetric=symmetric)
    assert (ones - 1).abs().max() <= rounding
    out = random_walk(maps, affinity, symmetric=symmetric)
    assert out.min() >= maps.min() - rounding
    assert out.max() <= maps.max() + rounding


def test_without_affinity_nothing_moves():
    """A zero matrix has columns of 1, the diagonal."""
    maps, affinity = draw(2, 3, 6, 7)
    for symmetric in (True, False):
        zeros = torch.zeros_like(affinity if symmetric else torch.cat([affinity] * 2, 1))
        out = random_walk(maps, zeros, symmetric=symmetric)
        torch.testing.assert_close(out, maps, rtol=1e-14, atol=0)


def test_what_lies_outside_is_not_read():
    maps, affinity = draw(1, 2, 6, 7)
    expected = random_walk(maps, affinity)
    for k, (dy, dx) in enumerate(reference.half_disc(5)):
        affinity[0, k, max(0, 6 - dy) :] = float("nan")
        affinity[0, k, :, : max(0, -dx)] = float("nan")
        affinity[0, k, :, max(0, 7 - dx) :] = float("nan")
    assert torch.equal(random_walk(maps, affinity), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("radius", [1, 5, 12])
def test_grids_smaller_than_the_radius(size, radius):
    for symmetric in (True, False):
        check(2, 3, size, radius, 8, 7, symmetric, torch.float64)


def test_own_offsets():
    """A line of neighbours to the right, as a tensor and as rows; and a chain in one direction."""
    maps, affinity = draw(1, 2, 3, 8, radius=2)
    right = torch.tensor([[0, 1]])
    out = random_walk(maps, affinity[:, :1], right, beta=1, log_steps=2)
    expected = reference.random_walk(maps, affinity[:, :1], [(0, 1)], 1, 2)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    both = random_walk(maps, affinity[:, :2], [(0, 1), (-1, 0)], symmetric=False)
    expected = reference.random_walk(maps, affinity[:, :2], [(0, 1), (-1, 0)], symmetric=False)
    np.testing.assert_allclose(both, expected, atol=1e-12)


def test_symmetric_is_a_case_of_asymmetric():
    maps, affinity = draw(2, 3, 9, 10)
    opposite = torch.zeros_like(affinity)
    for k, (dy, dx) in enumerate(reference.half_disc(5)):
        low, high = max(0, -dx), min(10, 10 - dx)
        opposite[:, k, dy:, low + dx : high + dx] = affinity[:, k, : 9 - dy, low:high]
    both = random_walk(maps, torch.cat([affinity, opposite], 1), symmetric=False)
    torch.testing.assert_close(both, random_walk(maps, affinity), rtol=0, atol=1e-13)


def test_images_do_not_mix_and_bad_values_stay_in_theirs():
    maps, affinity = draw(3, 2, 9, 12)
    whole = random_walk(maps, affinity)
    for b in range(3):
        assert torch.equal(whole[b], random_walk(maps[b : b + 1], affinity[b : b + 1])[0])
    maps[1, 0, 4, 4] = float("nan")
    spoiled = random_walk(maps, affinity)
    assert spoiled[1, 0].isnan().any()
    assert torch.equal(spoiled[::2], whole[::2])


def test_layouts_and_dtypes():
    maps, affinity = draw(2, 3, 9, 12, dtype=torch.float32)
    expected = random_walk(maps, affinity)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (maps, affinity)]
    assert torch.equal(random_walk(*last), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = random_walk(maps.half(), affinity.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, random_walk(maps.half().float(), affinity.half().float()))
    assert random_walk(maps, affinity.double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 2, 5, 6), (2, 0, 5, 6), (1, 2, 0, 6), (1, 2, 5, 0)])
def test_empty(shape):
    maps, affinity = draw(*shape)
    out = random_walk(maps.requires_grad_(), affinity)
    assert out.shape == shape
    out.sum().backward()
    assert maps.grad.shape == shape


# ---- IRN's and AFA's forms ---------------------------------------------------------------------


def test_edges_stop_the_walk():
    """A wall: nothing passes, and its own pixels are emptied."""
    maps = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    maps[..., :4] = 1
    edge = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    edge[..., 4] = 1
    out = propagate_to_edge(maps, edge)
    torch.testing.assert_close(out, maps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, propagate_to_edge(maps, edge[:, 0]))


def test_propagate_to_edge_is_its_parts():
    maps, edge = draw(2, 3, 8, 9)[0], draw(2, 1, 8, 9, seed=1)[0]
    out = propagate_to_edge(maps, edge, 4, beta=3, log_steps=5)
    expected = random_walk(maps * (1 - edge), path_affinity(edge, 4), 4, beta=3, log_steps=5)
    assert torch.equal(out, expected)


def test_window_mask_and_attention():
    mask = window_mask(4, 5, 2)
    places = [(y, x) for y in range(4) for x in range(5)]
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            assert mask[i, j] == (abs(y - v) <= 2 and abs(x - u) <= 2)
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    attention = torch.rand(2, 20, 20, generator=generator, dtype=torch.float64)
    weights = (attention * mask) ** 2
    matrix = weights / (weights.sum(1, keepdim=True) + 1e-4)
    out = attention_propagate(maps, attention, radius=2, log_steps=2)
    expected = maps.flatten(2) @ torch.linalg.matrix_power(matrix, 4)
    torch.testing.assert_close(out.flatten(2), expected)


# ---- golden ------------------------------------------------------------------------------------


def test_golden_irn(golden, golden_spec, assert_golden):
    data, spec = golden("irn_walk_13x17"), golden_spec("irn_walk_13x17")
    maps, edge = (torch.from_numpy(data[name])[None] for name in ("x", "edge"))
    for radius, beta, log_steps in spec["params"]["sets_[radius,beta,exp_times]"]:
        out = propagate_to_edge(maps, edge, radius, beta=beta, log_steps=log_steps)
        name = f"rw_r{radius}_b{beta}_t{log_steps}"
        assert_golden(spec, name, out[0][:, None], data[name])
    out = propagate_to_edge(maps, edge)
    large = F.interpolate(out, scale_factor=4, mode="bilinear", align_corners=False)
    large = large[0, :, :50, :67] / large.max()
    scores = torch.cat([torch.full((1, 50, 67), 0.25), large])
    labels = torch.tensor([0, 4, 9, 15])[scores.argmax(0)]
    best = scores.topk(2, 0).values
    unsure = (best[0] - best[1] <= 1e-4).numpy()
    assert unsure.mean() < 0.01
    np.testing.assert_array_equal(labels.numpy()[~unsure], data["pred"][~unsure])


def test_golden_psa(golden, golden_spec, assert_golden):
    data, spec = golden("psa_walk_90x110"), golden_spec("psa_walk_90x110")
    dense = torch.from_numpy(data["aff_dense"]).unflatten(1, (12, 14)).unflatten(0, (12, 14))
    affinity = torch.zeros(1, 34, 12, 14)
    for k, (dy, dx) in enumerate(reference.half_disc(5)):
        for y in range(12 - dy):
            for x in range(max(0, -dx), min(14, 14 - dx)):
                affinity[0, k, y, x] = dense[y, x, y + dy, x + dx]
    pooled = torch.from_numpy(data["cam_pooled"])[None]
    out = random_walk(pooled, affinity)
    assert_golden(spec, "cam_rw_a16_b8_t8", out[0], data["cam_rw_a16_b8_t8"])
    eye = torch.eye(168).reshape(1, 168, 12, 14)
    transition = random_walk(eye, affinity).reshape(168, 168)
    assert_golden(spec, "trans_mat", transition, data["trans_mat"])


def test_golden_afa(golden, golden_spec, assert_golden):
    data, spec = golden("afa_aff_9x11"), golden_spec("afa_aff_9x11")
    maps, attention = (torch.from_numpy(data[name]) for name in ("cam", "aff"))
    assert_golden(spec, "mask_radius3", window_mask(9, 11, 3), data["mask_radius3"])
    plain = attention_propagate(maps, attention)
    assert_golden(spec, "rw_plain", plain, data["rw_plain"])
    masked = attention_propagate(maps, attention, radius=3)
    assert_golden(spec, "rw_mask", masked, data["rw_mask"])
