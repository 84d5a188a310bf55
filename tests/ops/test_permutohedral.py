"""The permutohedral lattice and its filters: golden vectors, the slow lattice, its own laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.permutohedral import filter_reference, normalisers_reference
from wsis import _C, _lattice
from wsis.errors import InputError
from wsis.ops.permutohedral import (
    bilateral_filter,
    bilateral_lattice,
    feature_lattice,
    gaussian_lattice,
    normalisers,
    permutohedral_filter,
)


def points(d, n, seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(1, d, n, generator=g) * spread


def run(features, values, reverse=False, threads=1):
    """Plain filter of numpy arrays [d, N], [C, N]."""
    lattice = _lattice.build(np.ascontiguousarray(features[None]), np.empty, threads=threads)
    values = np.ascontiguousarray(values[None])
    return _lattice.filter(lattice, values, np.empty, reverse=reverse, threads=threads)[0]


# ---- golden vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 5, 6])
def test_golden(d, golden, golden_spec, assert_golden):
    z, spec = golden("permutohedral"), golden_spec("permutohedral")
    features, values = z[f"features_{d}"], z[f"values_{d}"]
    assert_golden(spec, f"out_{d}", run(features, values), z[f"out_{d}"])
    key = f"out_rev_{d}"
    assert_golden(spec, key, run(features, values, reverse=True), z[key])
    if f"out_pad_{d}" in z:
        key = f"out_pad_{d}_nodummy" if f"out_pad_{d}_nodummy" in z else f"out_pad_{d}"
        assert_golden(spec, key, run(features[:, :997], values[:, :997]), z[key])


def test_golden_all_points_at_zero(golden, golden_spec, assert_golden):
    z, spec = golden("permutohedral"), golden_spec("permutohedral")
    out = run(np.zeros((2, 64), np.float32), np.ones((1, 64), np.float32))
    assert_golden(spec, "out_allzero", out, z["out_allzero"])


# ---- against the slow lattice ------------------------------------------------------------------


def check(features, channels, seed=0, size=None):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((channels, features.shape[1]))
    lattice = _lattice.build(np.ascontiguousarray(features[None]), np.empty, size=size)
    for reverse in (False, True):
        expected, vertices = filter_reference(features, values, reverse)
        assert lattice.vertices == (vertices,)
        for kind, tolerance in (("float32", 2e-6), ("float64", 2e-6)):
            out = _lattice.filter(lattice, values[None].astype(kind), np.empty, reverse=reverse)
            assert out.dtype == kind
            assert np.abs(out[0] - expected).max() <= tolerance * np.abs(expected).max() + 1e-12


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 6, 9, 17, 32])
def test_any_dimension(d):
    rng = np.random.default_rng(d)
    check((rng.random((d, 70)) * 2).astype(np.float32), 3)


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 16, 24, 31, 32, 33, 40, 81])
def test_any_number_of_channels(channels):
    rng = np.random.default_rng(channels)
    check((rng.random((3, 90)) * 4).astype(np.float32), channels)


@pytest.mark.parametrize(("d", "spread"), [(3, 14), (4, 7), (5, 5)])
def test_lines_in_many_chunks(d, spread):
    """Thousands of vertices with neighbours: the blur takes them in several chunks."""
    features = (np.random.default_rng(d).random((d, 900)) * spread).astype(np.float32)
    lattice = _lattice.build(features[None], np.empty)
    assert lattice.images[0][7].shape[1] > 1
    check(features, 2)
    for threads in (2, 3):
        again = _lattice.build(features[None], np.empty, threads=threads).images[0]
        for one, other in zip(lattice.images[0][:6], again[:6], strict=True):
            assert np.array_equal(one, other)
        values = np.random.default_rng(0).random((1, 9, 900), np.float32)
        out = [_lattice.filter(lattice, values, np.empty, threads=n) for n in (1, threads)]
        assert np.array_equal(*out)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    d=st.integers(1, 7),
    size=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    channels=st.integers(1, 35),
    spread=st.sampled_from([0.0, 0.3, 3.0, 40.0]),
    seed=st.integers(0, 999),
)
def test_anything(d, size, channels, spread, seed):
    rng = np.random.default_rng(seed)
    features = ((rng.random((d, size[0] * size[1])) - 0.5) * spread).astype(np.float32)
    check(features, channels, seed, size if seed % 2 else None)


@pytest.mark.parametrize("spread", [3e3, 1e5])
def test_keys_of_more_than_64_bits(spread):
    """Six features over a wide range: two words a key; no two points are neighbours then."""
    rng = np.random.default_rng(0)
    features = ((rng.random((6, 50)) - 0.5) * spread).astype(np.float32)
    features[:, 25:] = features[:, :25] + 0.1
    check(features, 2)


def test_lattice_of_pixels_is_that_of_its_features():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (2, 3, 19, 27), dtype=np.uint8)
    values = torch.from_numpy(rng.random((2, 4, 19, 27))).float()
    y, x = np.mgrid[:19, :27].astype(np.float32)
    for pixels in (image, image.astype(np.float32)):
        features = np.concatenate(
            [np.stack([x / np.float32(5), y / np.float32(7)])[None].repeat(2, 0),
             image.astype(np.float32) / np.array([9, 10, 11], np.float32)[:, None, None]], axis=1
        )  # fmt: skip
        out = bilateral_filter(
            values, torch.from_numpy(pixels), (5, 7), [9, 10, 11], normalization="none"
        )
        expected = permutohedral_filter(values, torch.from_numpy(features))
        assert torch.equal(out, expected)
        last = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        lattice = _lattice.build_image(
            (19, 27), np.empty, spatial=(5, 7), image=last, channels_last=True, widths=[9, 10, 11]
        )
        again = _lattice.filter(lattice, values.flatten(2).numpy(), np.empty)
        assert np.array_equal(again, out.flatten(2).numpy())


@pytest.mark.parametrize("normalization", ["none", "before", "after", "symmetric"])
def test_normalisations(normalization):
    features, values = points(3, 60), torch.randn(1, 2, 60)
    out = permutohedral_filter(values, features, normalization=normalization)
    before, after = normalisers_reference(features[0].numpy(), normalization)
    expected = filter_reference(features[0].numpy(), values[0].numpy() * before)[0] * after
    assert np.abs(out[0].numpy() - expected).max() <= 1e-5
    if normalization == "after":
        ones = permutohedral_filter(torch.ones(1, 1, 60), features, normalization="after")
        assert (ones - 1).abs().max() <= 1e-5


def test_one_lattice_serves_a_batch():
    values = torch.rand(3, 2, 9, 11)
    lattice = gaussian_lattice((9, 11), 2)
    together = permutohedral_filter(values, lattice=lattice, normalization="symmetric")
    for b in range(3):
        alone = permutohedral_filter(values[b : b + 1], lattice=lattice, normalization="symmetric")
        assert torch.equal(alone[0], together[b])


def test_sizes_follow_the_vertices():
    """Per pixel: one place, entry and weight a corner. Everything else is as long as M or V."""
    lattice = gaussian_lattice((40, 48), 5)
    slots, weights, entries, first, rows, counts, lines, cuts = lattice.images[0]
    (vertices,) = lattice.vertices
    assert slots.shape == weights.shape == entries.shape == (40 * 48, 3)
    assert len(first) == 15 + 1
    assert len(rows) == len(counts) == first[-1] < 40 * 48 // 4
    assert lines.shape == (3, vertices)
    assert cuts.shape == (3, 1, 2)
    assert cuts.max() <= vertices < 40 * 48 // 8
    assert counts.sum() == 40 * 48 * 3


# ---- gradients and compilation -----------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["none", "before", "after", "symmetric"])
def test_gradcheck(normalization):
    lattice = feature_lattice(points(3, 14).repeat(2, 1, 1))
    values = torch.randn(2, 2, 14, dtype=torch.float64, requires_grad=True)

    def call(v):
        return permutohedral_filter(v, lattice=lattice, normalization=normalization)

    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


def test_reverse_is_the_transpose():
    lattice = feature_lattice(points(5, 400, spread=2.0))
    a, b = torch.randn(2, 1, 3, 400, dtype=torch.float64)
    before, after = normalisers(lattice, "before", a.device)
    empty = np.empty
    forward = _lattice.filter(lattice, a.numpy(), empty, before=before, after=after)
    back = _lattice.filter(lattice, b.numpy(), empty, before=after, after=before, reverse=True)
    assert abs((forward * b.numpy()).sum() - (back * a.numpy()).sum()) <= 1e-9


def test_opcheck():
    from wsis.ops._lattice import pack

    for batch in (1, 2):
        arrays, sizes = pack(feature_lattice(points(2, 30).repeat(batch, 1, 1)))
        factors = torch.rand(batch, 30)
        values = torch.rand(2, 3, 30, requires_grad=True)
        for before, reverse in ((None, False), (factors, True)):
            arguments = (values, arrays, before, factors, sizes, reverse)
            torch.library.opcheck(torch.ops.wsis.lattice_filter, arguments)


def test_compiles_with_a_given_lattice():
    lattice = gaussian_lattice((6, 7), 2)
    compiled = torch.compile(
        lambda v: permutohedral_filter(v * 2, lattice=lattice).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    ours, theirs = (torch.rand(2, 3, 6, 7, requires_grad=True) for _ in range(2))
    theirs.data.copy_(ours.data)
    compiled(ours).backward()
    permutohedral_filter(theirs * 2, lattice=lattice).square().sum().backward()
    assert torch.allclose(ours.grad, theirs.grad)


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
def test_empty(shape):
    values = torch.rand(shape, requires_grad=True)
    image = torch.rand(shape[0], 3, *shape[2:])
    for out in (permutohedral_filter(values, image), bilateral_filter(values, image, 3, 3)):
        assert out.shape == shape
        out.sum().backward()
    assert values.grad.shape == shape


def test_one_pixel_and_constant_image():
    lattice = bilateral_lattice(torch.zeros(1, 3, 1, 1), 80, 13)
    one = permutohedral_filter(torch.full((1, 2, 1, 1), 3.0), lattice=lattice)
    features = np.zeros((5, 1), np.float32)
    assert np.allclose(one.flatten(), filter_reference(features, np.full((2, 1), 3.0))[0].ravel())
    flat = torch.full((1, 3, 12, 17), 90, dtype=torch.uint8)
    out = bilateral_filter(torch.ones(1, 1, 12, 17), flat, 4, 13, normalization="after")
    assert (out - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_strided(dtype):
    values = torch.rand(2, 6, 9, 3).to(dtype).permute(0, 3, 1, 2)
    image = torch.randint(0, 256, (2, 6, 9, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    out = bilateral_filter(values, image, 5, 20, normalization="symmetric")
    expected = bilateral_filter(
        values.float().contiguous(), image.contiguous(), 5, 20, normalization="symmetric"
    )
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


VALUES, IMAGE = torch.rand(1, 2, 4, 5), torch.rand(1, 3, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permutohedral_filter(VALUES), "one of features and lattice"),
        (lambda: permutohedral_filter(VALUES, IMAGE[..., :4]), "features must be"),
        (lambda: permutohedral_filter(VALUES, torch.rand(3, 2, 4, 5)), "values must be"),
        (lambda: permutohedral_filter(VALUES, torch.rand(1, 33, 4, 5)), "1 to 32"),
        (lambda: permutohedral_filter(VALUES, IMAGE, normalization="both"), "normalization must"),
        (lambda: permutohedral_filter(VALUES, IMAGE * np.inf), "must be finite"),
        (lambda: permutohedral_filter(VALUES, IMAGE * np.nan), "must be finite"),
        (lambda: permutohedral_filter(VALUES, IMAGE * 1e7), "too wide a range"),
        (lambda: permutohedral_filter(VALUES, lattice=gaussian_lattice((5, 5), 1)), "values must"),
        (lambda: bilateral_filter(VALUES, IMAGE, 0, 13), "must be positive"),
        (lambda: bilateral_filter(VALUES, IMAGE, 3, -1.0), "must be positive"),
        (lambda: bilateral_filter(VALUES, IMAGE, 3, float("nan")), "must be positive"),
        (lambda: bilateral_filter(VALUES, IMAGE, 3, [1, 2]), "image must be|channel"),
        (lambda: bilateral_filter(VALUES, IMAGE.long(), 3, 1), "image must be uint8 or floating"),
        (lambda: bilateral_lattice(IMAGE[0], 3, 1), "image must be"),
        (lambda: gaussian_lattice((4, 5), (1, float("inf"))), "must be positive"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_bindings_guard_themselves():
    lattice = _lattice.build(np.zeros((1, 2, 9), np.float32), np.empty)
    arrays = list(lattice.images[0])
    values = np.zeros((3, 9), np.float32)
    size = _C.permutohedral_filter_scratch(arrays, 3, 1, 9, 1)
    scratch = np.zeros(size, np.float32)
    call = _C.permutohedral_filter_cpu
    with pytest.raises(ValueError, match="8 arrays"):
        call(values, arrays[:7], None, None, scratch, values, False, 1, 9, 1)
    with pytest.raises(ValueError, match="slots must be of shape"):
        call(values, arrays, None, None, scratch, values, False, 1, 10, 1)
    with pytest.raises(ValueError, match="scratch must be of shape"):
        call(values, arrays, None, None, scratch[1:], values, False, 1, 9, 1)
    with pytest.raises(ValueError, match="before must be float32"):
        call(values, arrays, np.ones(9), None, scratch, values, False, 1, 9, 1)
    with pytest.raises(ValueError, match="result must be float32"):
        call(values, arrays, None, None, scratch, values.astype(float), False, 1, 9, 1)
    with pytest.raises(ValueError, match="parts must be"):
        call(values, arrays, None, None, scratch, values, False, 1, 9, 0)
