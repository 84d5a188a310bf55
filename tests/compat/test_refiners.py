"""PAMR, PAR and VARM as other projects use them."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.reference.local_affinity import refine_reference
from wsis.compat import PAMR, PAR, VARM
from wsis.errors import InputError

CLASSES = {"pamr": PAMR, "par": PAR, "varm": VARM}
KINDS = list(CLASSES)
CASES = ("batch_n2_k4_37x53", "odd_n1_k4_65x97", "post_n1_k3_40x52", "up_n1_k21_37x53")
EDGES = ("flatimage", "dots", "constmask", "single", "zero", "onepix")


def make(kind, iterations=10, dilations=(1, 2)):
    return CLASSES[kind](num_iter=iterations, dilations=list(dilations))


def images(u8):
    return torch.from_numpy(u8).permute(0, 3, 1, 2).float() / 255


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("kind", "case"), list(itertools.product(KINDS, CASES)))
def test_golden(kind, case, golden, golden_spec, assert_golden):
    name = f"{kind}_{case}"
    z, spec = golden(name), golden_spec(name)
    stable = z["stable"][:, None].astype(bool) if "stable" in z else np.True_
    for iterations in spec["params"]["iterations"]:
        module = make(kind, iterations, spec["params"]["dilations"])
        masks = torch.from_numpy(z["mask"]).requires_grad_()
        out = module(images(z["image_u8"]), masks)
        key = f"out_{iterations}"
        assert_golden(spec, key, np.where(stable, out.detach().numpy(), z[key]), z[key])
        key = f"grad_mask_{iterations}"
        if key in z and "stable" not in z:
            out.backward(torch.from_numpy(z["upstream"]))
            assert_golden(spec, key, masks.grad.numpy(), z[key])


@pytest.mark.parametrize(("kind", "case"), list(itertools.product(KINDS, EDGES)))
def test_golden_edges(kind, case, golden, golden_spec, assert_golden):
    name = f"{kind}_edge_16x20"
    z, spec = golden(name), golden_spec(name)
    module = make(kind, spec["params"]["iterations"], spec["params"]["dilations"])
    out = module(images(z[f"{case}_image_u8"]), torch.from_numpy(z[f"{case}_mask"]))
    assert_golden(spec, f"{case}_out", out.numpy(), z[f"{case}_out"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (4, 9)])
def test_equals_the_formula(kind, size):
    image, masks = rand(2, 3, *size, dtype=torch.float64), rand(2, 2, *size, dtype=torch.float64)
    out = make(kind, 2, (1, 6))(image, masks)
    expected = refine_reference(image.numpy(), masks.numpy(), kind, 2, (1, 6))
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_arguments_come_in_the_order_of_the_originals():
    image, masks = rand(1, 3, 9, 8), rand(1, 2, 9, 8, seed=1)
    for kind, positional in [
        ("pamr", PAMR(3, [1, 4])),
        ("par", PAR([1, 4], 3)),
        ("varm", VARM([1, 4], 3)),
    ]:
        assert torch.equal(positional(image, masks), make(kind, 3, (1, 4))(image, masks))
        assert positional.num_iter == 3
        assert list(positional.dilations) == [1, 4]
    once = PAMR()
    assert (once.num_iter, list(once.dilations)) == (1, [1])
    assert torch.equal(once(x=image, mask=masks), make("pamr", 1, [1])(image, masks))
    assert PAR([1], 1)(imgs=image, masks=masks).shape == masks.shape


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_are_read_at_each_call(kind):
    image, masks = rand(1, 3, 9, 8), rand(1, 2, 9, 8, seed=1)
    module = make(kind, 1)
    module.num_iter = 4
    assert torch.equal(module(image, masks), make(kind, 4)(image, masks))
    module.num_iter = 0
    assert torch.equal(module(image, masks), masks)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_resized_to_the_image(kind):
    image, masks = rand(1, 3, 17, 12), rand(1, 2, 5, 7, seed=1)
    enlarged = F.interpolate(masks, (17, 12), mode="bilinear", align_corners=True)
    module = make(kind)
    assert module(image, masks).shape == (1, 2, 17, 12)
    assert torch.allclose(module(image, masks), module(image, enlarged), atol=1e-6)


def test_images_are_resized_to_the_masks_where_asked():
    image, masks = rand(1, 3, 17, 12), rand(1, 2, 5, 7, seed=1)
    reduced = F.interpolate(image, (5, 7), mode="bilinear", align_corners=True)
    module = PAR([1, 2], 3, resize="images")
    assert torch.allclose(module(image, masks), PAR([1, 2], 3)(reduced, masks), atol=1e-6)
    assert module(image.half(), masks).shape == masks.shape
    with pytest.raises(InputError, match="resize must be masks or images, got 'both'"):
        PAR([1], 1, resize="both")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_outside_is_kept_and_float32_inside(kind, dtype):
    image, masks = rand(1, 3, 11, 9), rand(1, 2, 11, 9, seed=1)
    image[..., 5:, :] = 0.5  # a flat region: in half precision the originals divide 0 by 0
    image, masks = image.to(dtype), masks.to(dtype)
    out = make(kind)(image, masks)
    assert out.dtype == dtype
    assert out.isfinite().all()
    wide = make(kind)(image.double(), masks.double())
    step = torch.finfo(dtype).eps
    assert torch.allclose(out.double(), wide, atol=max(step, 1e-5) if dtype != torch.float64 else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes_and_integer_images(kind):
    u8 = (rand(1, 3, 9, 8) * 255).to(torch.uint8)
    masks = rand(1, 2, 9, 8, seed=1)
    if kind != "varm":  # which wants [0, 1]
        assert torch.allclose(make(kind)(u8, masks), make(kind)(u8.float(), masks))
    half = make(kind)(u8 / 255, masks.half())
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), make(kind)(u8 / 255, masks), atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_and_expanded_inputs(kind):
    image, masks = rand(2, 3, 9, 8), rand(1, 2, 9, 8, seed=1)
    module = make(kind)
    expected = module(image, masks.repeat(2, 1, 1, 1))
    assert torch.equal(module(image, masks.expand(2, -1, -1, -1)), expected)
    last = torch.channels_last
    out = module(image.to(memory_format=last), masks.repeat(2, 1, 1, 1).to(memory_format=last))
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_serves_all_masks_and_one_set_of_masks_all_images(kind):
    images, masks = torch.rand(3, 3, 9, 11), torch.rand(3, 2, 9, 11)
    module = CLASSES[kind](num_iter=3, dilations=[1, 2])
    image, mask = images[:1], masks[:1]
    assert torch.equal(module(image, masks), module(image.expand(3, -1, -1, -1), masks))
    assert torch.equal(module(images, mask), module(images, mask.expand(3, -1, -1, -1)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_masks(kind):
    image, small = rand(1, 3, 6, 5, dtype=torch.float64), rand(1, 2, 3, 4, dtype=torch.float64)
    module = make(kind, 2, (1, 3))
    assert torch.autograd.gradcheck(lambda m: module(image, m), small.requires_grad_())
    half = rand(1, 2, 6, 5).half().requires_grad_()
    module(image.half(), half).sum().backward()
    assert half.grad.dtype == torch.float16


class Net(nn.Module):
    def __init__(self, refiner):
        super().__init__()
        self.head = nn.Conv2d(3, 2, 1)
        self.refiner = refiner


# What the originals register: one-hot shifts, row by row; PAMR has three.
EIGHT = torch.eye(9)[[0, 1, 2, 3, 5, 6, 7, 8]].view(8, 1, 3, 3)
ALL_NINE = torch.eye(9).view(9, 1, 3, 3)
DIFFERENCE = ALL_NINE[4] - EIGHT
KERNELS = {
    "pamr": {"aff_x.kernel": DIFFERENCE, "aff_m.kernel": EIGHT, "aff_std.kernel": ALL_NINE},
    "par": {"kernel": EIGHT},
    "varm": {"kernel": EIGHT},
}


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways(kind):
    net = Net(make(kind))
    ours = net.state_dict()
    head = {k: v for k, v in ours.items() if k.startswith("head.")}
    theirs = head | {f"refiner.{k}": v for k, v in KERNELS[kind].items()}
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    odd = theirs | {f"refiner.{k}": torch.zeros(1) for k in KERNELS[kind]}
    for state in (ours, theirs, head, odd, head | {"refiner.kernel": EIGHT}):
        net.load_state_dict(state, strict=True)
        assert all(torch.equal(v, ours[k]) for k, v in net.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*refiner\.weight"):
        net.load_state_dict(theirs | {"refiner.weight": torch.zeros(1)})
    make(kind).load_state_dict({"kernel": EIGHT})


@pytest.mark.parametrize("kind", KINDS)
def test_behaves_as_a_module(kind):
    image, masks = rand(2, 3, 9, 8), rand(2, 2, 9, 8, seed=1)
    module = make(kind)
    expected = module(image, masks)
    for same in (copy.deepcopy(module), module.eval(), module.half(), nn.DataParallel(module)):
        assert torch.equal(same(image, masks), expected)
    assert not list(module.parameters())
    replica = module._replicate_for_data_parallel()  # what DataParallel does on devices
    assert torch.equal(replica(image, masks), expected)


def test_importing_costs_nothing():
    program = """
        import sys
        sys.modules["torch"] = sys.modules["numpy"] = None  # importing either fails
        import wsis.compat
        assert "PAMR" in dir(wsis.compat)
        assert not [m for m in sys.modules if m.startswith("wsis.compat.")]
        try:
            wsis.compat.PAMMR
        except AttributeError as error:
            assert "PAMMR" in str(error)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_named(kind):
    with pytest.raises(InputError, match="dilations"):
        make(kind, 1, [])(rand(1, 3, 4, 4), rand(1, 1, 4, 4))
    with pytest.raises(InputError, match=r"masks must be .*got \[3, 1, 4, 4\]"):
        make(kind)(rand(2, 3, 4, 4), rand(3, 1, 4, 4))
    with pytest.raises(InputError, match="image must be"):
        make(kind)(rand(3, 4, 4), rand(3, 1, 4, 4))
