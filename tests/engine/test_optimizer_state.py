"""Optimisers by parameter name: training goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.engine.checkpoints import assert_equal
from wsis.engine.checkpoint import (
    CheckpointStore,
    optimizer_state,
    restore_optimizer,
)
from wsis.errors import InputError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.late, self.frozen = nn.Linear(7, 3), nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor, late: bool) -> torch.Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden) + (self.late(hidden) if late else 0)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        # `late` has no gradient, so no state, in the first steps.
        model(torch.randn(4, 5, generator=generator), late=step >= 4).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_training_goes_on_bit_for_bit(tmp_path, kind, stop):
    def fresh(reverse):
        torch.manual_seed(0)
        model = Net()
        parameters = [p for p in model.parameters() if p.requires_grad]
        return model, OPTIMIZERS[kind](parameters[::-1] if reverse else parameters)

    straight, optimizer = fresh(reverse=False)
    train(straight, optimizer, range(9))

    model, first = fresh(reverse=False)
    train(model, first, range(stop))
    tensors, numbers = optimizer_state(first, model)
    store = CheckpointStore(tmp_path)
    store.save(stop, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": numbers})

    # The order of the parameters differs: their names decide.
    resumed, second = fresh(reverse=True)
    train(resumed, second, range(20, 22))
    loaded, state = store.load(store.latest())
    resumed.load_state_dict(loaded["model"])
    restore_optimizer(second, resumed, loaded["optimizer"], state["optimizer"])
    assert_equal(optimizer_state(second, resumed)[0], tensors)
    train(resumed, second, range(stop, 9))
    assert_equal(resumed.state_dict(), straight.state_dict())
    assert_equal(optimizer_state(second, resumed)[0], optimizer_state(optimizer, straight)[0])


def test_restoring_does_not_alias_the_loaded_tensors():
    model = Net()
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, range(5))
    tensors, numbers = optimizer_state(optimizer, model)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    restore_optimizer(optimizer, model, tensors, numbers)
    train(model, optimizer, range(5, 7))
    assert_equal(tensors, before)


def test_another_optimizer_or_model_is_refused():
    model = Net()
    optimizer = OPTIMIZERS["momentum"](model.second.parameters())
    train(model, optimizer, range(2))
    tensors, numbers = optimizer_state(optimizer, model)
    with pytest.raises(InputError, match="state of SGD, the run uses AdamW"):
        restore_optimizer(OPTIMIZERS["adamw"](model.parameters()), model, tensors, numbers)
    with pytest.raises(InputError, match=r"trains 'second\.weight', this run does not"):
        restore_optimizer(OPTIMIZERS["momentum"](model.first.parameters()), model, tensors, numbers)
    tensors["second.weight/momentum_buffer"] = torch.zeros(3, 8)
    with pytest.raises(InputError, match=r"must be \[3, 7\], the checkpoint holds \[3, 8\]"):
        restore_optimizer(optimizer, model, tensors, numbers)
