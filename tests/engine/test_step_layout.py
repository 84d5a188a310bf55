"""What a step does to memory layouts and precision: no silent copies, the same gradient routes."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import wsis
from wsis.config import ModelConfig, PseudoConfig
from wsis.engine.build import build_model
from wsis.engine.step import Siamese, weak_losses
from wsis.losses.rtc import RtcWeights
from wsis.models.features import relu6_
from wsis.types import Batch

ROOT = Path(wsis.__file__).parent
COPIES = ("clone", "copy_", "_to_copy")
LARGE = 20_000  # elements; below are heads, labels and constants


class Layouts(TorchDispatchMode):
    """Copies of large maps by place, and convolutions whose input is not channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()
        self.other_inputs: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
            maps = args[0]
            if name in COPIES and maps.numel() > LARGE:
                self.copies[self.place()] += 1
            last = maps.is_contiguous(memory_format=torch.channels_last)
            if name == "convolution" and maps.numel() > LARGE and not last:
                self.other_inputs[self.place()] += 1
        return function(*args, **(kwargs or {}))

    @staticmethod
    def place() -> str:
        stack = traceback.extract_stack()
        inside = [f for f in stack if Path(f.filename).is_relative_to(ROOT)]
        return inside[-1].name if inside else "backward"


def a_step(backbone: str, size: int):
    """Network, and a function that computes the losses of two images."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone,
        feature_dim=16,
        dropout=0.0,
        crr_dims=(8,) * 4,
        decoder_dims=(8,) * 4,
        freeze_stem=False,
        freeze_bn=backbone != "small",
    )
    model = build_model(config, 5).to(memory_format=torch.channels_last).train()
    image = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
    label = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])
    batch = Batch(image, label, torch.tensor([[0, size, 0, size]] * 2), torch.arange(2))

    def losses():
        return weak_losses(
            Siamese(model),
            model,
            batch,
            view2_size=size // 2 + 1,
            weights=RtcWeights(seg_gate=False),
            pseudo=PseudoConfig(iterations=2, dilations=(1, 2), high=1.1, low=0.8, relative=True),
            segment=True,
        )

    return model, losses


@pytest.mark.parametrize("backbone", ["small", "efficientnet_lite0"])
def test_forward_keeps_channels_last_and_copies_nothing(backbone):
    _, losses = a_step(backbone, 97)
    with Layouts() as layouts:
        losses()
    # Dilated depthwise kernels are taken apart into phases, on purpose.
    assert set(layouts.copies) <= {"_by_phases"}
    assert layouts.copies["_by_phases"] % 2 == 0
    assert not layouts.other_inputs


def test_the_counter_sees_copies():
    maps = torch.randn(2, 8, 40, 40)
    with Layouts() as layouts:
        F.relu6(maps.requires_grad_() * 1, inplace=True)  # torch's own copies
        F.conv2d(maps, torch.randn(4, 8, 1, 1))
    assert layouts.copies.total() == 1 and layouts.other_inputs.total() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_relu6_in_place_is_torchs(dtype):
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 3, 6, 6.5, torch.inf, -torch.inf, torch.nan])
    x = x.to(dtype).repeat(3, 1)
    grad = torch.arange(30.0).view(3, 10).to(dtype)
    found = []
    for function in (relu6_, F.relu6):
        leaf = x.clone().requires_grad_()
        moved = leaf * 1
        out = function(moved)
        out.backward(grad)
        found.append((out.detach(), leaf.grad))
        assert function is not relu6_ or out is moved
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_bf16_routes_each_loss_to_the_same_parameters():
    """Under autocast a loss reaches a parameter exactly where it does in float32."""
    model, losses = a_step("small", 64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    routes = []
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            terms = losses()
        assert all(value.dtype == torch.float32 for value in terms.values())
        found = {}
        for term, value in terms.items():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            found[term] = {
                name
                for name, gradient in zip(names, gradients, strict=True)
                if gradient is not None and gradient.any()
            }
            assert all(g is None or (g.dtype == torch.float32 and g.isfinite().all())
                       for g in gradients)  # fmt: skip
        routes.append(found)
    assert routes[0] == routes[1]
    rooms = {t: {name.split(".")[0] for name in names} for t, names in routes[0].items()}
    assert rooms["cls"] == rooms["er"] == rooms["com"] == {"backbone", "head"}
    assert rooms["min_pool"] == rooms["ecr"] == {"crr"}
    assert rooms["ctr_intra"] == {"backbone", "head"}
    assert rooms["seg"] == {"backbone", "decoder"}
    assert "head.classifier.weight" not in routes[0]["ctr_intra"]
