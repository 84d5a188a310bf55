from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import energy as reference
from wsis.errors import InputError
from wsis.ops.energy import dense_energy_loss
from wsis.ops.permutohedral import bilateral_lattice, permutohedral_filter

FORMS = [False, True]


def make_case(size=(6, 8), classes=3, dtype=torch.float64, batch=2, channels=3, seed=0):
    """Probabilities, a guide with a few colours, a crop, and labels with 255 in a third of it."""
    g = torch.Generator().manual_seed(seed)
    probs = torch.randn(batch, classes, *size, generator=g, dtype=dtype).softmax(dim=1)
    guide = torch.randint(6, (batch, channels, *size), generator=g) * 50.0
    roi = (torch.rand(batch, *size, generator=g) < 0.8).to(dtype)
    labels = torch.randint(3, (batch, *size), generator=g, dtype=torch.uint8)
    labels[torch.rand(batch, *size, generator=g) < 0.3] = 255
    return probs, guide, roi, labels


def matrices(guide, sigma, sigma_xy, scale, recompute):
    """What the lattice filter does to every single pixel, and the truth it approximates."""
    small = reference.resize(guide.numpy(), scale, recompute, "nearest")
    lattice, truth = [], []
    for image in small:
        shape = image.shape[1:]
        made = bilateral_lattice(
            torch.from_numpy(image[None]).float(),
            sigma_xy * scale,
            [sigma] * len(image),
        )

        def apply(maps, made=made):
            return permutohedral_filter(torch.from_numpy(maps)[None], lattice=made)[0].numpy()

        lattice.append(reference.lattice_matrix(apply, shape))
        truth.append(reference.gaussian(reference.features(image, sigma_xy * scale, sigma)))
    return lattice, truth


def with_gradient(probs, guide, **rest):
    probs = probs.clone().requires_grad_()
    loss = dense_energy_loss(probs, guide, **rest)
    loss.backward()
    return loss.detach(), probs.grad


def check_formula(size, classes, channels, scale, recompute, gated, dtype, seed):
    probs, guide, roi, labels = make_case(size, classes, dtype, channels=channels, seed=seed)
    loss, gradient = with_gradient(
        probs,
        guide,
        sigma=30.0,
        sigma_xy=5.0,
        scale=scale,
        roi=roi,
        labels=labels,
        gated=gated,
        recompute_scale=recompute,
    )
    lattice, _ = matrices(guide, 30.0, 5.0, scale, recompute)
    expected, slope = reference.energy(
        probs.numpy(),
        lattice,
        roi.numpy(),
        (labels == 255).numpy(),
        gated=gated,
        scale=scale,
        recompute=recompute,
    )
    # A float32 filter of float64 unit maps is the matrix, with weights of float32.
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    assert loss.dtype == gradient.dtype == dtype
    assert abs(loss.item() - expected) <= tolerance * max(abs(expected), 1e-3)
    assert np.abs(gradient.numpy() - slope).max() <= tolerance * max(np.abs(slope).max(), 1e-3)


@pytest.mark.parametrize("gated", FORMS)
@pytest.mark.parametrize(
    ("size", "scale", "recompute"),
    [((6, 8), 1, True), ((8, 6), 0.5, True), ((7, 9), 0.5, True), ((7, 9), 0.5, False),
     ((9, 5), 0.7, True), ((9, 5), 0.7, False), ((1, 1), 1, True), ((4, 3), 2, False)],
)  # fmt: skip
def test_formula(size, scale, recompute, gated):
    for dtype in (torch.float32, torch.float64):
        check_formula(size, 3, 3, scale, recompute, gated, dtype, 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(2, 14), st.integers(2, 14)),
    classes=st.integers(1, 22),
    channels=st.integers(1, 5),
    scale=st.sampled_from([0.5, 0.6, 1.0]),
    recompute=st.booleans(),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_anything(size, classes, channels, scale, recompute, gated, seed):
    check_formula(size, classes, channels, scale, recompute, gated, torch.float64, seed)


def test_filter_is_nearly_gaussian():
    """On a smooth image the lattice has the shape of the Gaussian; its height is about half."""
    probs = make_case((16, 16), classes=2, batch=1)[0]
    coarse = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 255
    guide = F.interpolate(coarse, (16, 16), mode="bicubic").clamp(0, 255)
    lattice, truth = matrices(guide, 60.0, 6.0, 1, True)
    assert np.corrcoef(lattice[0].ravel(), truth[0].ravel())[0, 1] > 0.97
    loss = dense_energy_loss(probs, guide, sigma=60.0, sigma_xy=6.0, scale=1)
    gaussian, _ = reference.energy(probs.numpy(), truth)
    assert 0.4 < loss.item() / gaussian < 0.7


# ---- the edge map ------------------------------------------------------------------------------


def test_edge_map_separates_what_it_tells_apart():
    """Two halves, told apart by the guide: mixing them costs nothing, agreeing within them pays."""
    half = torch.zeros(1, 1, 8, 8)
    half[..., 4:] = 1
    split = torch.cat([half, 1 - half], dim=1)
    flat = torch.full_like(split, 0.5)
    rest = {"sigma": 0.1, "sigma_xy": 50.0, "scale": 1}
    apart = dense_energy_loss(split, half, **rest), dense_energy_loss(flat, half, **rest)
    assert apart[0] < 1.9 * apart[1]
    # One half taken for the other is as good as another name for it.
    swapped = dense_energy_loss(split.flip(1), half, **rest)
    assert swapped.item() == pytest.approx(apart[0].item(), rel=1e-5)
    # Without an edge, agreeing everywhere is better still.
    blank, one = torch.zeros_like(half), torch.zeros_like(split)
    one[:, 0] = 1
    everywhere = dense_energy_loss(one, blank, **rest)
    assert everywhere < 1.9 * dense_energy_loss(split, blank, **rest)
    assert everywhere < apart[0]


def test_sigma_per_channel():
    probs, guide, roi, _ = make_case(channels=4)
    same = dense_energy_loss(probs, guide, sigma=[20.0] * 4, roi=roi)
    assert torch.equal(same, dense_energy_loss(probs, guide, sigma=20.0, roi=roi))
    scaled = guide * torch.tensor([1.0, 2.0, 0.5, 4.0])[:, None, None]
    other = dense_energy_loss(probs, scaled, sigma=[20.0, 40.0, 10.0, 80.0], roi=roi)
    assert other.item() == pytest.approx(same.item(), rel=1e-6)


def test_area_keeps_thin_edges():
    edges = torch.zeros(1, 1, 8, 8)
    edges[..., 3] = 1  # between the samples of `nearest`
    probs = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    rest = {"sigma": 0.1, "sigma_xy": 20.0, "scale": 0.5}
    blind = dense_energy_loss(probs, edges, **rest)
    assert torch.equal(blind, dense_energy_loss(probs, torch.zeros_like(edges), **rest))
    assert dense_energy_loss(probs, edges, guide_resize="area", **rest) > blind


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", FORMS)
@pytest.mark.parametrize(("size", "scale"), [((4, 5), 1), ((6, 5), 0.5), ((1, 1), 1)])
def test_exact_gradient(gated, size, scale):
    probs, guide, roi, labels = make_case(size, 3)
    probs.requires_grad_()

    def loss(p):
        return dense_energy_loss(
            p,
            guide,
            sigma=30.0,
            sigma_xy=5.0,
            scale=scale,
            roi=roi,
            labels=labels,
            gated=gated,
            exact=True,
        )

    assert torch.autograd.gradcheck(loss, probs)
    assert torch.autograd.gradgradcheck(loss, probs)


@pytest.mark.parametrize("gated", FORMS)
def test_exact_and_published_gradients(gated):
    """One loss, two gradients: nearly equal where the gate plays no part, else not."""
    probs, guide, roi, labels = make_case((12, 12))
    rest = {"sigma": 30.0, "roi": roi, "labels": labels, "gated": gated}
    published, exact = (with_gradient(probs, guide, **rest, exact=e) for e in (False, True))
    assert published[0].item() == pytest.approx(exact[0].item(), rel=1e-12)
    error = (published[1] - exact[1]).abs().max() / exact[1].abs().max()
    assert error > 0.1 if gated else 0 < error < 0.05


def test_published_gradient_has_no_derivative():
    probs, guide, *_ = make_case()
    probs.requires_grad_()
    (gradient,) = torch.autograd.grad(dense_energy_loss(probs, guide), probs, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("gated", FORMS)
def test_gradient_stays_inside_the_crop(gated):
    probs, guide, roi, labels = make_case()
    rest = {"scale": 1, "labels": labels, "gated": gated}
    _, gradient = with_gradient(probs, guide, roi=roi, **rest)
    outside = (roi == 0)[:, None].expand_as(gradient)
    assert outside.any() and not gradient[outside].any()
    loss, gradient = with_gradient(probs, guide, roi=torch.zeros_like(roi), **rest)
    assert loss == 0 and not gradient.any()


def test_upstream_gradient_is_a_factor():
    probs, guide, *_ = make_case()
    _, gradient = with_gradient(probs, guide)
    p = probs.clone().requires_grad_()
    loss = -3 * dense_energy_loss(p, guide)
    for times in (1, 2):  # what backward keeps is not changed by it
        loss.backward(retain_graph=True)
        torch.testing.assert_close(p.grad, -3 * times * gradient)


# ---- inputs of all kinds -----------------------------------------------------------------------


def test_arguments_are_not_changed():
    arguments = make_case()
    kept = [a.clone() for a in arguments]
    probs, guide, roi, labels = arguments
    for exact in (False, True):
        with_gradient(probs, guide, roi=roi, labels=labels, gated=True, scale=1, exact=exact)
    for argument, before in zip(arguments, kept, strict=True):
        assert argument.shape == before.shape and torch.equal(argument, before)


def test_types_do_not_matter():
    probs, guide, roi, labels = make_case(dtype=torch.float32)
    expected = dense_energy_loss(probs, guide, roi=roi, labels=labels, gated=True)
    for g, r, x in (
        (guide.to(torch.uint8), roi.to(torch.uint8), labels.long()),
        (guide.double(), roi.bool(), labels[:, None].int()),
        (guide.half(), roi.long(), labels[:, None].float()),
    ):
        assert torch.equal(dense_energy_loss(probs, g, roi=r, labels=x, gated=True), expected)


def test_absent_crop_and_labels():
    probs, guide, roi, labels = make_case()
    ones = torch.ones_like(roi)
    for gated in FORMS:
        assert torch.equal(
            dense_energy_loss(probs, guide, gated=gated),
            dense_energy_loss(probs, guide, gated=gated, roi=ones, labels=torch.zeros_like(labels)),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_probabilities_compute_in_float32(dtype):
    probs, guide, roi, _ = make_case(dtype=torch.float32)
    probs = probs.to(dtype).requires_grad_()
    loss = dense_energy_loss(probs, guide, roi=roi)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dense_energy_loss(probs.float(), guide, roi=roi))
    loss.backward()
    assert probs.grad.dtype == dtype


def test_autocast_does_not_matter():
    probs, guide, roi, labels = make_case(dtype=torch.float32)
    expected = with_gradient(probs, guide, roi=roi, labels=labels, gated=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradient(probs, guide, roi=roi, labels=labels, gated=True)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_non_contiguous_inputs():
    probs, guide, roi, labels = make_case((8, 10))
    expected = with_gradient(probs, guide, roi=roi, labels=labels, gated=True)
    last = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (probs, guide)]
    flipped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (roi, labels)]
    got = with_gradient(*last, roi=flipped[0], labels=flipped[1], gated=True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_one_class_and_constant_image():
    """Everything looks alike: one class everywhere has the lowest energy there is."""
    guide = torch.full((1, 3, 6, 6), 100.0)
    ones = torch.ones(1, 1, 6, 6)
    single = dense_energy_loss(ones, guide, scale=1)
    halves = dense_energy_loss(torch.full((1, 2, 6, 6), 0.5), guide, scale=1)
    assert single.item() == pytest.approx(2 * halves.item(), rel=1e-5)
    assert dense_energy_loss(ones, guide, scale=1, gated=True) == 0


def test_images_of_a_batch_are_alone():
    probs, guide, roi, labels = make_case(batch=3)
    rest = {"gated": True, "scale": 1}
    together = dense_energy_loss(probs, guide, roi=roi, labels=labels, **rest)
    alone = [
        dense_energy_loss(probs[i], guide[i], roi=roi[i], labels=labels[i], **rest)
        for i in (slice(0, 1), slice(1, 2), slice(2, 3))
    ]
    assert together.item() == pytest.approx(sum(alone).item() / 3, rel=1e-12)


@pytest.mark.parametrize("shape", [(0, 2, 6, 6), (2, 0, 6, 6), (2, 2, 0, 6)])
def test_empty(shape):
    probs = torch.rand(shape, requires_grad=True)
    guide = torch.rand(shape[0], 3, *shape[2:])
    loss = dense_energy_loss(probs, guide, gated=True)
    loss.backward()
    assert loss == 0 and probs.grad.shape == shape


# ---- bad input ---------------------------------------------------------------------------------

PROBS, GUIDE = torch.rand(1, 2, 4, 4), torch.rand(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense_energy_loss(PROBS[0], GUIDE), r"probs must be a floating \[B, K, H, W\]"),
        (lambda: dense_energy_loss(PROBS.long(), GUIDE), "probs must be a floating.*int64"),
        (lambda: dense_energy_loss(PROBS, GUIDE[0]), r"guide must be \[B, c, H, W\]"),
        (lambda: dense_energy_loss(PROBS, GUIDE[..., 1:]), r"\[1, 4, 4\], got \[1, 3, 4, 3\]"),
        (lambda: dense_energy_loss(PROBS, GUIDE[:, :0]), "guide must be"),
        (lambda: dense_energy_loss(PROBS, GUIDE + 1j), "guide must be real"),
        (
            lambda: dense_energy_loss(PROBS, GUIDE.clone().requires_grad_()),
            "guide must not require a gradient",
        ),
        (lambda: dense_energy_loss(PROBS, GUIDE, guide_resize="cubic"), "must be nearest or area"),
        (lambda: dense_energy_loss(PROBS, GUIDE, sigma=0), "sigma must be positive.*got 0"),
        (lambda: dense_energy_loss(PROBS, GUIDE, sigma=[1.0, 2.0]), r"one per channel \(3\)"),
        (lambda: dense_energy_loss(PROBS, GUIDE, sigma_xy=-1), "sigma_xy must be positive.*-1"),
        (lambda: dense_energy_loss(PROBS, GUIDE, scale=0), "scale must be positive.*got 0"),
        (lambda: dense_energy_loss(PROBS, GUIDE, scale=0.1), "leave at least one pixel"),
        (lambda: dense_energy_loss(PROBS, GUIDE, roi=PROBS), r"roi must be \[B, H, W\]"),
        (lambda: dense_energy_loss(PROBS, GUIDE, labels=PROBS[0]), r"labels must be \[B, H, W\]"),
        (lambda: dense_energy_loss(PROBS, GUIDE * float("nan")), "finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
