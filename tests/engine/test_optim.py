from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from wsis.engine.optim import corrected_average, finite_norm, make_optimizer, poly_factor, set_lr
from wsis.errors import InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.GroupNorm(1, 2))

    def pretrained_parameters(self):
        return [(f"backbone.{n}", p) for n, p in self.backbone.named_parameters()]

    def new_parameters(self):
        return [(f"head.{n}", p) for n, p in self.head.named_parameters()]


def grouped(model, **options):
    options = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, **options}
    optimizer = make_optimizer(model, **options)
    names = {id(p): n for n, p in model.named_parameters()}
    return optimizer, {
        names[id(p)]: (g["lr"], g["weight_decay"])
        for g in optimizer.param_groups
        for p in g["params"]
    }


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_parameter_has_its_rate_and_decay(name):
    model = Net()
    optimizer, found = grouped(model, name=name)
    assert found == {
        "backbone.0.weight": (0.01, 5e-4),
        "backbone.0.bias": (0.02, 0.0),
        "backbone.1.weight": (0.01, 0.0),
        "backbone.1.bias": (0.02, 0.0),
        "backbone.2.weight": (0.01, 5e-4),
        "backbone.2.bias": (0.02, 0.0),
        "head.0.weight": (0.1, 5e-4),
        "head.0.bias": (0.2, 0.0),
        "head.1.weight": (0.1, 0.0),
        "head.1.bias": (0.2, 0.0),
    }
    assert type(optimizer).__name__.lower() == name
    group = optimizer.param_groups[0]
    assert group["momentum"] == 0.9 if name == "sgd" else group["betas"] == (0.9, 0.999)


def test_frozen_norms_and_layers_leave_the_four_groups_of_the_paper():
    model = Net()
    for module in (model.backbone[0], model.backbone[1], model.head[1]):
        module.requires_grad_(False)
    optimizer, found = grouped(model, new_lr_scale=5.0, bias_lr_scale=3.0)
    assert [group["label"] for group in optimizer.param_groups] == [
        "pretrained weights",
        "pretrained biases",
        "new weights",
        "new biases",
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [
        pytest.approx(lr) for lr in (0.01, 0.03, 0.05, 0.15)
    ]
    assert "backbone.0.weight" not in found


def test_one_step_follows_the_formula():
    model = Net()
    optimizer, found = grouped(model, momentum=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_lr(optimizer, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        lr, decay = found[name]
        expected = before[name] - 0.5 * lr * (1 + decay * before[name])
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adam"},
        {"lr": 0.0},
        {"lr": math.nan},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1e-4},
        {"new_lr_scale": 0.0},
        {"bias_lr_scale": -1.0},
    ],
)
def test_refuses_bad_numbers_by_name(options):
    key = "optimizer" if "name" in options else next(iter(options))
    with pytest.raises(InputError, match=key):
        grouped(Net(), **options)


def test_nothing_to_train():
    with pytest.raises(InputError, match="no trainable parameter"):
        grouped(Net().requires_grad_(False))


def test_poly_factor():
    assert poly_factor(0, 100) == 1.0
    assert poly_factor(100, 100) == 0.0
    assert poly_factor(0, 0) == 1.0
    assert poly_factor(25, 100) == pytest.approx(0.75**0.9, rel=1e-15)
    assert poly_factor(25, 100, power=1.0) == 0.75
    warm = [poly_factor(t, 100, warmup=4) / poly_factor(t, 100) for t in range(6)]
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rel=1e-15)


@pytest.mark.parametrize("step", [-1, 101])
def test_poly_factor_outside_the_run(step):
    with pytest.raises(InputError, match=r"0\.\.100"):
        poly_factor(step, 100)


def with_gradients(*gradients):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return [*parameters, nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize(
    ("max_norm", "factor"), [(None, 1.0), (13.0, 1.0), (20.0, 1.0), (6.5, 0.5)]
)
def test_norm_and_clip(max_norm, factor):
    first, second = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
    parameters = with_gradients(first, second)
    assert float(finite_norm(iter(parameters), max_norm)) == 13.0
    assert torch.equal(parameters[0].grad, first * factor)
    assert torch.equal(parameters[1].grad, second * factor)
    assert parameters[2].grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_show_and_stay(bad):
    first, second = torch.tensor([1.0, bad]), torch.tensor([12.0])
    parameters = with_gradients(first, second)
    assert not finite_norm(parameters, 1.0).isfinite()
    assert torch.equal(parameters[1].grad, second)


def test_norm_of_half_gradients_does_not_overflow():
    parameters = with_gradients(torch.full((100,), 6e4, dtype=torch.float16))
    assert float(finite_norm(parameters, None)) == pytest.approx(6e5, rel=1e-3)


def test_norm_without_gradients():
    assert float(finite_norm([nn.Parameter(torch.ones(2))], 1.0)) == 0.0
    with pytest.raises(InputError, match="max_norm"):
        finite_norm([], 0.0)


@pytest.mark.parametrize("updates", [1, 2, 30])
def test_average_gives_the_first_weights_no_share_of_their_own(updates):
    model = nn.BatchNorm1d(3).double()  # floating buffers and an integer one
    average = AveragedModel(model, multi_avg_fn=corrected_average(0.9), use_buffers=True)
    seen = []
    for step in range(updates):
        nn.init.normal_(model.weight)
        model.running_mean.fill_(step)
        model.num_batches_tracked.fill_(step)
        average.update_parameters(model)
        seen.append((model.weight.detach().clone(), float(step)))
    shares = torch.tensor([0.9 ** (updates - 1 - i) for i in range(updates)], dtype=torch.float64)
    shares /= shares.sum()
    weight = sum(share * weight for share, (weight, _) in zip(shares, seen, strict=True))
    mean = sum(share * value for share, (_, value) in zip(shares, seen, strict=True))
    torch.testing.assert_close(average.module.weight, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(average.module.running_mean[0], mean, rtol=1e-12, atol=1e-12)
    assert average.module.num_batches_tracked == updates - 1
