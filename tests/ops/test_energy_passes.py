"""How the dense energy loss walks over memory: halving, factors, pieces, threads, pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.ops.test_energy import FORMS, make_case, with_gradient
from wsis.ops import _native
from wsis.ops.energy import dense_energy_loss


@pytest.mark.parametrize("gated", FORMS)
def test_half_is_torchs_bilinear_resize(gated):
    """Even sizes are scaled by a half in another way than others; large ones in several pieces."""
    probs, guide, roi, labels = make_case((600, 620), 4, torch.float32)
    rest = {"roi": roi, "labels": labels, "gated": gated}
    got = with_gradient(probs, guide, sigma_xy=80.0, **rest)
    flat = probs.contiguous(memory_format=torch.channels_last)
    expected = with_gradient(flat, guide, sigma_xy=80.0, **rest)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())

    whole = probs.clone().requires_grad_()
    small = F.interpolate(whole, scale_factor=0.5, mode="bilinear", align_corners=False)
    nearest = {k: v[..., ::2, ::2] for k, v in (("roi", roi), ("labels", labels))}
    loss = dense_energy_loss(
        small, guide[..., ::2, ::2], sigma_xy=40.0, scale=1, gated=gated, **nearest
    )
    loss.backward()
    assert got[0].item() == pytest.approx(loss.item(), rel=1e-6)
    tolerance = 1e-6 * whole.grad.abs().max().item()
    torch.testing.assert_close(got[1], whole.grad, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("gated", FORMS)
def test_crop_may_be_soft(gated):
    """float32 lets the lattice multiply with crop and gate, float64 does it after the filter."""
    probs, guide, roi, labels = make_case((12, 10))
    roi = roi * torch.rand(roi.shape, generator=torch.Generator().manual_seed(1)).double()
    rest = {"roi": roi, "labels": labels, "gated": gated, "scale": 1}
    loss, gradient = with_gradient(probs, guide, **rest)
    single = with_gradient(probs.float(), guide, **rest)
    assert single[0].item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(single[1].double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("batch", "classes", "size", "scale"),
    [(2, 5, (40, 52), 1), (1, 1, (300, 310), 1), (2, 4, (600, 620), 0.5), (1, 2, (203, 401), 0.5)],
)
def test_threads_do_not_matter(monkeypatch, batch, classes, size, scale, exact):
    probs, guide, roi, labels = make_case(size, classes, torch.float32, batch)

    def both():
        rest = {"roi": roi, "labels": labels, "gated": True, "scale": scale, "exact": exact}
        return with_gradient(probs, guide, **rest)

    monkeypatch.setattr(_native, "_TOUCHED_PER_THREAD", 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both())
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages here"
)
def test_huge_pages_are_asked_for():
    fresh = torch.empty(24 << 20)  # 96 MiB: memory of its own
    _native.prefer_huge_pages(fresh)
    _native.prefer_huge_pages(torch.empty(3))
    _native.prefer_huge_pages(torch.empty(0))
    middle, inside = fresh.data_ptr() + (48 << 20), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *flags = line.split()
        if "-" in first:
            begin, end = (int(side, 16) for side in first.split("-"))
            inside = begin <= middle < end
        elif first == "VmFlags:" and inside:
            assert "hg" in flags
            return
    pytest.fail("the memory is nowhere")
