"""Labels of pairs against a loop over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import affinity as reference
from wsis.errors import InputError
from wsis.ops import affinity_labels
from wsis.ops.affinity_labels import interior


def make_mask(size, seed=0, batch=2, classes=(0, 0, 1, 7, 255), dtype=np.uint8):
    rng = np.random.default_rng(seed)
    coarse = rng.choice(classes, (batch, *(-(-side // 3) for side in size)))
    fine = coarse.repeat(3, axis=1).repeat(3, axis=2)[:, : size[0], : size[1]]
    return torch.from_numpy(fine.astype(dtype))


def expected(mask, offsets, **rest):
    return np.stack([reference.pair_labels(m, offsets, **rest) for m in mask.numpy()])


def test_golden(golden, golden_spec, assert_golden):
    z, spec = golden("psa_loss_13x13"), golden_spec("psa_loss_13x13")
    pairs = affinity_labels(torch.from_numpy(z["label"])[None])
    assert pairs.shape == (1, 34, 13, 13)
    inner = pairs[:, :, :9, 4:9].flatten(2)
    for kind, name in ((2, "bg_pos"), (1, "fg_pos"), (0, "neg")):
        assert_golden(spec, name, (inner == kind).byte(), z[name])
        assert int((pairs == kind).sum()) == int(z[name].sum())  # none elsewhere


def test_golden_counts(golden):
    z = golden("irn_loss_19x21")
    pairs = affinity_labels(torch.from_numpy(z["seg"]), 5)
    assert [int((pairs == kind).sum()) for kind in (2, 1, 0)] == z["counts"].tolist()


def check(size, radius, sources, seed, dtype):
    mask = make_mask(size, seed, dtype=dtype)
    pairs = affinity_labels(mask, radius, sources=sources)
    assert pairs.dtype == torch.uint8
    np.testing.assert_array_equal(
        pairs, expected(mask, reference.half_disc(radius), sources=sources)
    )


CASES = {
    "size": st.tuples(st.integers(1, 14), st.integers(1, 14)),
    "radius": st.integers(2, 6),
    "sources": st.sampled_from(["interior", "all"]),
    "seed": st.integers(0, 99),
    "dtype": st.sampled_from([np.uint8, np.int16, np.int32, np.int64]),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**CASES)
def test_pixel_by_pixel(size, radius, sources, seed, dtype):
    check(size, radius, sources, seed, dtype)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(**CASES)
def test_pixel_by_pixel_long(size, radius, sources, seed, dtype):
    check(size, radius, sources, seed, dtype)


@pytest.mark.parametrize("sources", ["interior", "all"])
def test_any_offsets(sources):
    """Upwards, to the left, farther than the grid; the same pair from its other end."""
    offsets = [(-1, 3), (3, -1), (0, -2), (20, 0), (0, 40)][: 5 if sources == "all" else 3]
    mask = make_mask((8, 11), 4, dtype=np.int64)
    pairs = affinity_labels(mask, offsets=torch.tensor(offsets), sources=sources)
    np.testing.assert_array_equal(pairs, expected(mask, offsets, sources=sources))
    assert (pairs < 255).any()


def test_large_ids_and_another_unknown():
    mask = torch.tensor([[[300, 300, 556, -1]]])  # 556 = 300 + 256
    pairs = affinity_labels(mask, offsets=torch.tensor([[0, 1]]), sources="all", ignore_index=-1)
    assert pairs.tolist() == [[[[1, 0, 255, 255]]]]


def test_inputs_stay_and_views_do_not_matter():
    mask = make_mask((9, 12), 1)
    before = mask.clone()
    flipped = affinity_labels(mask.flip(2), 3)
    assert torch.equal(mask, before)
    np.testing.assert_array_equal(flipped, expected(mask.flip(2), reference.half_disc(3)))
    assert affinity_labels(mask[:0]).shape == (0, 34, 9, 12)


def test_interior():
    offsets = reference.half_disc(5)
    assert interior(13, 13, offsets).nonzero().tolist() == [
        [y, x] for y in range(9) for x in range(4, 9)
    ]
    for size in ((1, 1), (4, 20), (20, 8)):
        assert not interior(*size, offsets).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: affinity_labels(torch.zeros(2, 3, 4)), "integers.*float32"),
        (lambda: affinity_labels(torch.zeros(3, 4, dtype=torch.int64)), r"\[B, h, w\]"),
        (lambda: affinity_labels(torch.zeros(1, 3, 4, dtype=torch.bool)), "integers.*bool"),
        (
            lambda: affinity_labels(make_mask((3, 4)), offsets=torch.zeros(0, 2)),
            r"offsets must be \[K, 2\]",
        ),
        (
            lambda: affinity_labels(make_mask((3, 4)), offsets=torch.zeros(4, dtype=torch.int64)),
            r"offsets must be \[K, 2\]",
        ),
        (lambda: affinity_labels(make_mask((3, 4)), sources="inner"), "interior"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
