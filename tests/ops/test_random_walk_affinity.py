"""Affinities of a half disc (AffinityNet's pairs, IRN's paths): values, gradients, golden files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import random_walk as reference
from wsis.errors import InputError
from wsis.ops.stencil_affinity import disc_offsets, pair_affinity, path_affinity


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def check(ours, theirs, source, seed=0):
    """Result and gradient of two functions of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    source = source.requires_grad_()
    got, wanted = ours(source), theirs(source)
    assert got.shape == wanted.shape
    assert got.dtype == source.dtype
    upstream = torch.rand(got.shape, generator=generator, dtype=torch.float64).to(got.dtype)
    (gradient,) = torch.autograd.grad(got, source, upstream)
    expected = torch.zeros_like(source)
    if wanted.requires_grad:  # else no pair lies inside
        (expected,) = torch.autograd.grad(wanted, source, upstream)
    tolerance = 1e-11 if source.dtype == torch.float64 else 2e-6
    for one, other in ((got, wanted), (gradient, expected)):
        scale = max(1.0, float(other.detach().abs().max()))
        assert (one - other).detach().abs().max() <= tolerance * scale


ANYTHING = {
    "batch": st.integers(1, 3),
    "size": st.tuples(st.integers(1, 15), st.integers(1, 18)),
    "radius": st.integers(2, 8),
    "single": st.booleans(),
    "seed": st.integers(0, 999),
}
CHANNELS = st.integers(1, 40)
LEVELS = st.sampled_from([2, 5, 1000])


def check_pairs(batch, channels, size, radius, single, seed):
    dtype = torch.float32 if single else torch.float64
    features = draw(batch, channels, *size, dtype=dtype, seed=seed)
    features = torch.where(features > 1.3, features.amax(), features)  # some are equal
    offsets = reference.half_disc(radius)
    check(
        lambda f: pair_affinity(f, radius),
        lambda f: reference.pair_affinity(f, offsets),
        features.detach(),
    )


def check_paths(batch, size, radius, single, levels, seed):
    dtype = torch.float32 if single else torch.float64
    edge = draw(batch, *size, dtype=dtype, seed=seed).sigmoid()
    edge = (edge * levels).round() / levels  # few levels: ties are frequent
    offsets = reference.half_disc(radius)
    check(
        lambda e: path_affinity(e, radius),
        lambda e: reference.path_affinity(e, offsets),
        edge.detach(),
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(channels=CHANNELS, **ANYTHING)
def test_pairs(batch, channels, size, radius, single, seed):
    check_pairs(batch, channels, size, radius, single, seed)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(levels=LEVELS, **ANYTHING)
def test_paths(batch, size, radius, single, levels, seed):
    check_paths(batch, size, radius, single, levels, seed)


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(channels=CHANNELS, **ANYTHING)
def test_pairs_at_length(batch, channels, size, radius, single, seed):
    check_pairs(batch, channels, (size[0] + 6, size[1] * 3), radius, single, seed)


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(levels=LEVELS, **ANYTHING)
def test_paths_at_length(batch, size, radius, single, levels, seed):
    check_paths(batch, (size[0] + 6, size[1] * 3), radius, single, levels, seed)


@pytest.mark.parametrize("width", [255, 256, 600])
def test_rows_longer_than_a_block(width):
    check_pairs(1, 3, (2, width), 3, False, 0)
    check_paths(1, (3, width), 4, False, 5, 0)


# ---- offsets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1, 2, 5, 10, 18])
def test_half_disc(radius):
    found = disc_offsets(radius)
    assert found.tolist() == [list(row) for row in reference.half_disc(radius)]
    assert sorted(found.tolist()) == sorted(disc_offsets(radius, form="irn").tolist())
    whole = {(y, x) for y in range(-radius, radius) for x in range(-radius, radius)}
    whole = {(y, x) for y, x in whole if 0 < y * y + x * x < radius * radius}
    both = {tuple(row) for row in torch.cat([found, -found]).tolist()}
    assert both == whole
    assert len(both) == 2 * len(found)


def test_golden_offsets_and_paths(golden):
    data = golden("irn_walk_13x17")
    for radius in (5, 10):
        offsets = disc_offsets(radius, form="irn")
        np.testing.assert_array_equal(offsets, data[f"search_dst_r{radius}"])
        paths = [reference.path(dy, dx) for dy, dx in offsets.tolist()]
        np.testing.assert_array_equal([len(p) for p in paths], data[f"path_len_r{radius}"])
        flat = [pixel for path in paths for pixel in path]
        np.testing.assert_array_equal(flat, data[f"paths_r{radius}"])


# ---- edges -------------------------------------------------------------------------------------


def test_zero_and_constant_features():
    inside = pair_affinity(torch.zeros(1, 4, 6, 7), 3)
    offsets = reference.half_disc(3)
    expected = reference.pair_affinity(torch.zeros(1, 4, 6, 7), offsets)
    assert torch.equal(inside, expected)
    assert set(inside.unique().tolist()) == {0.0, 1.0}
    features = torch.full((1, 4, 6, 7), 3.0, requires_grad=True)
    affinity = pair_affinity(features, 3)
    assert torch.equal(affinity, expected)
    affinity.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_distant_features_have_no_affinity_and_no_gradient():
    features = torch.zeros(1, 2, 1, 2, requires_grad=True)
    with torch.no_grad():
        features[..., 1] = 1e30
    affinity = pair_affinity(features, 2)
    assert affinity[0, 0, 0, 0] == 0
    affinity.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_cropped_as_psa_has_it():
    features = draw(2, 5, 9, 11, dtype=torch.float32).requires_grad_()
    whole, cropped = pair_affinity(features), pair_affinity(features, cropped=True)
    assert torch.equal(cropped[:, :, :5, 4:7], whole[:, :, :5, 4:7])
    (gradient,) = torch.autograd.grad(cropped.sum(), features)
    (expected,) = torch.autograd.grad(whole[:, :, :5, 4:7].sum(), features)
    torch.testing.assert_close(gradient, expected)
    rest = cropped.detach().clone()
    rest[:, :, :5, 4:7] = 0
    assert not rest.any()
    assert not pair_affinity(features[..., :3, :3], cropped=True).any()  # no pixel is left


def test_half_precision_is_computed_in_single():
    features = draw(1, 6, 5, 7, dtype=torch.float16).requires_grad_()
    out = pair_affinity(features)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, pair_affinity(features.detach().float()))
    out.sum().backward()
    assert features.grad.dtype == torch.float16
    assert path_affinity(torch.rand(1, 5, 7).half()).dtype == torch.float32


def test_layouts():
    features = draw(2, 6, 5, 7, dtype=torch.float32)
    last = features.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pair_affinity(last), pair_affinity(features))
    edge = torch.rand(2, 1, 5, 7)
    turned = edge.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(path_affinity(turned), path_affinity(edge[:, 0]))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(shape):
    features = torch.rand(shape, requires_grad=True)
    affinity = pair_affinity(features)
    assert affinity.shape == (shape[0], 34, *shape[2:])
    affinity.sum().backward()
    edge = torch.rand(shape[0], *shape[2:], requires_grad=True)
    path_affinity(edge).sum().backward()
    assert edge.grad.shape == edge.shape


def test_radius_one_has_no_pairs():
    features = torch.rand(2, 3, 4, 5, requires_grad=True)
    out = pair_affinity(features, 1)
    assert out.shape == (2, 0, 4, 5)
    out.sum().backward()
    assert not features.grad.any()
    assert path_affinity(torch.rand(2, 4, 5), 1).shape == (2, 0, 4, 5)


def test_an_edge_that_is_not_a_number_is_handed_on():
    edge = torch.rand(2, 6, 7)
    clean = path_affinity(edge, 4)
    edge[0, 2, 3] = float("nan")
    spoiled = path_affinity(edge, 4)
    expected = reference.path_affinity(edge, reference.half_disc(4))
    assert torch.equal(spoiled.isnan(), expected.isnan())
    assert torch.equal(spoiled[1], clean[1])


BAD = torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair_affinity(BAD[0]), r"features must be a floating .* \[3, 4, 5\]"),
        (lambda: pair_affinity(BAD.long()), "features must be a floating"),
        (lambda: pair_affinity(BAD[:, :0]), "features must have channels"),
        (lambda: pair_affinity(BAD, 0), "radius must be an integer from 1 to 18, got 0"),
        (lambda: pair_affinity(BAD, 19), "radius must be an integer"),
        (lambda: pair_affinity(BAD, 2.0), "radius must be an integer"),
        (lambda: pair_affinity(BAD, True), "radius must be an integer"),
        (lambda: path_affinity(BAD), "edge must have one channel, got"),
        (lambda: path_affinity(BAD[0, 0]), "edge must be a floating"),
        (lambda: path_affinity(BAD[:, 0].int()), "edge must be a floating"),
        (lambda: path_affinity(BAD[:, 0], -1), "radius must be an integer"),
        (lambda: disc_offsets(5, form="afa"), "form must be 'psa' or 'irn', got 'afa'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---- golden ------------------------------------------------------------------------------------


def network_features(data, inputs):
    """AffinityNet's head of the golden files: elu of 1 x 1 convolutions."""
    weights = {n: data[n] for n in ("w_f8_3", "w_f8_4", "w_f8_5", "w_f9")}
    weights = {n: torch.from_numpy(w)[:, :, None, None] for n, w in weights.items()}
    parts = [
        F.elu(F.conv2d(x, weights[f"w_f8_{i}"])) for i, x in zip((3, 4, 5), inputs, strict=True)
    ]
    return F.elu(F.conv2d(torch.cat(parts, 1), weights["w_f9"]))


def test_golden_psa_affinities(golden, golden_spec, assert_golden):
    name = "psa_walk_90x110"
    data, spec = golden(name), golden_spec(name)
    inputs = [torch.from_numpy(data[n]) for n in ("conv4", "conv5", "conv6")]
    affinity = pair_affinity(network_features(data, inputs), cropped=True)
    pairs = affinity[:, :, :8, 4:10].flatten(2)
    assert_golden(spec, "aff_pairs", pairs, data["aff_pairs"])
    dense = reference.dense_affinity(affinity[0], reference.half_disc(5))
    assert_golden(spec, "aff_dense", dense.astype(np.float32), data["aff_dense"])


def test_golden_psa_gradients(golden, golden_spec, assert_golden):
    """From the recorded gradient to the affinities back to the network's inputs."""
    data, spec = golden("psa_loss_13x13"), golden_spec("psa_loss_13x13")
    inputs = [torch.from_numpy(data[n]).requires_grad_() for n in ("conv4", "conv5", "conv6")]
    pairs = pair_affinity(network_features(data, inputs))[:, :, :9, 4:9].flatten(2)
    assert_golden(spec, "aff", pairs.detach(), data["aff"])
    pairs.backward(torch.from_numpy(data["grad_aff"]))
    for name, x in zip(("conv4", "conv5", "conv6"), inputs, strict=True):
        assert_golden(spec, f"grad_{name}", x.grad, data[f"grad_{name}"])


@pytest.mark.parametrize("radius", [5, 10])
def test_golden_irn_affinities(radius, golden, golden_spec, assert_golden):
    data, spec = golden("irn_walk_13x17"), golden_spec("irn_walk_13x17")
    edge = torch.from_numpy(data[f"edge_r{radius}"])
    affinity = path_affinity(edge, radius)
    order = [
        disc_offsets(radius).tolist().index(row)
        for row in disc_offsets(radius, form="irn").tolist()
    ]
    height, width = edge.shape[1:]
    reach = radius - 1
    sources = affinity[:, order, : height - reach, reach : width - reach].flatten(2)
    assert_golden(spec, f"aff_r{radius}", sources, data[f"aff_r{radius}"])
