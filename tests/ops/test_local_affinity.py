import itertools

import numpy as np
import pytest
import torch

from tests.reference.local_affinity import refine_reference
from wsis.errors import InputError
from wsis.ops.local_affinity import local_affinity, pamr, par, propagate, varm

REFINERS = {"pamr": pamr, "par": par, "varm": varm}
SUMS = {"pamr": 1.0, "par": 1.01, "varm": 0.99}
FILES = [
    *(
        f"{kind}_{case}"
        for kind in REFINERS
        for case in (
            "batch_n2_k4_37x53",
            "big_n1_k2_96x96",
            "odd_n1_k4_65x97",
            "post_n1_k3_40x52",
            "up_n1_k21_37x53",
        )
    ),
    "pamr_many_n1_k81_20x23",
    "varm_many_n1_k81_20x23",
]
EDGES = ("flatimage", "dots", "constmask", "single", "zero", "onepix")


def images(u8):
    return torch.from_numpy(u8).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name", FILES)
def test_golden(name, golden, golden_spec, assert_golden):
    z, spec = golden(name), golden_spec(name)
    refine = REFINERS[name.split("_")[0]]
    stable = z["stable"][:, None].astype(bool) if "stable" in z else np.True_
    for iterations in spec["params"]["iterations"]:
        masks = torch.from_numpy(z["mask"]).requires_grad_()
        out = refine(
            images(z["image_u8"]),
            masks,
            iterations=iterations,
            dilations=spec["params"]["dilations"],
        )
        key = f"out_{iterations}"
        actual = np.where(stable, out.detach().numpy(), z[key])
        assert_golden(spec, key, actual, z[key])
        key = f"grad_mask_{iterations}"
        if key in z:
            out.backward(torch.from_numpy(z["upstream"]))
            if "stable" not in z:  # the gradient mixes stable and unstable pixels
                assert_golden(spec, key, masks.grad.numpy(), z[key])


@pytest.mark.parametrize(("kind", "case"), list(itertools.product(REFINERS, EDGES)))
def test_golden_edges(kind, case, golden, golden_spec, assert_golden):
    name = f"{kind}_edge_16x20"
    z, spec = golden(name), golden_spec(name)
    out = REFINERS[kind](
        images(z[f"{case}_image_u8"]),
        torch.from_numpy(z[f"{case}_mask"]),
        iterations=spec["params"]["iterations"],
        dilations=spec["params"]["dilations"],
    )
    assert_golden(spec, f"{case}_out", out.numpy(), z[f"{case}_out"])


@pytest.mark.parametrize("kind", REFINERS)
@pytest.mark.parametrize(
    ("size", "dilations"), [((7, 5), (1, 2, 24)), ((1, 1), (1,)), ((1, 6), (3,)), ((4, 3), (2, 5))]
)
def test_reference_at_odd_sizes(kind, size, dilations):
    g = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, *size, generator=g, dtype=torch.float64)
    masks = torch.rand(2, 2, *size, generator=g, dtype=torch.float64)
    out = REFINERS[kind](image, masks, iterations=2, dilations=dilations)
    expected = refine_reference(image.numpy(), masks.numpy(), kind, 2, dilations)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert out.dtype == torch.float64


@pytest.mark.parametrize("kind", REFINERS)
@pytest.mark.parametrize("flat", [False, True])
def test_weights_sum(kind, flat):
    image = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(1))
    image = torch.full_like(image, 0.3) if flat else image
    weights = local_affinity(image, kind)
    assert weights.shape == (1, 48, 9, 11)
    assert torch.allclose(weights.sum(dim=1), torch.tensor(SUMS[kind]), atol=1e-5)
    assert weights.min() >= (-5e-3 if kind == "varm" else 0)
    masks = REFINERS[kind](image, torch.full((1, 1, 9, 11), 0.5), iterations=3)
    assert torch.allclose(masks, torch.tensor(0.5 * SUMS[kind] ** 3), atol=1e-5)


@pytest.mark.parametrize("kind", REFINERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_compute_in_float32(kind, dtype):
    g = torch.Generator().manual_seed(2)
    image = torch.rand(1, 3, 7, 5, generator=g).to(dtype)
    masks = torch.rand(1, 1, 7, 5, generator=g).to(dtype)
    image[..., 3:, :] = 0.5  # a flat region
    out = REFINERS[kind](image, masks)
    assert out.dtype == torch.float32
    assert torch.equal(out, REFINERS[kind](image.float(), masks.float()))
    assert out.isfinite().all()


def test_non_contiguous_inputs():
    g = torch.Generator().manual_seed(3)
    image = torch.rand(1, 8, 6, 3, generator=g).permute(0, 3, 1, 2)
    masks = torch.rand(1, 8, 6, 2, generator=g).permute(0, 3, 1, 2)
    expected = varm(image.contiguous(), masks.contiguous(), dilations=(1, 2))
    assert torch.allclose(varm(image, masks, dilations=(1, 2)), expected, atol=1e-7)


def test_propagate_gradcheck():
    g = torch.Generator().manual_seed(4)
    image = torch.rand(1, 3, 4, 3, generator=g, dtype=torch.float64)
    masks = torch.rand(1, 2, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weights = local_affinity(image, "varm", (1, 2))
    assert torch.autograd.gradcheck(lambda m: propagate(m, weights, (1, 2), 2), masks)


def test_no_class_changes_another():
    g = torch.Generator().manual_seed(5)
    image, masks = torch.rand(1, 3, 9, 9, generator=g), torch.rand(1, 3, 9, 9, generator=g)
    assert torch.allclose(par(image, masks)[:, 1:2], par(image, masks[:, 1:2]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_affinity(torch.rand(3, 4, 4), "par"), r"\[B, 3, H, W\], got \[3, 4, 4\]"),
        (lambda: local_affinity(torch.rand(1, 3, 4, 4), "crf"), "pamr, par or varm, got 'crf'"),
        (lambda: local_affinity(torch.rand(1, 3, 4, 4), "par", ()), "dilations must be positive"),
        (lambda: par(torch.rand(2, 3, 4, 4), torch.rand(1, 1, 4, 4)), "B=2"),
        (lambda: propagate(torch.rand(1, 1, 4, 4), torch.rand(1, 8, 4, 4), (1, 2)), "weights must"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
