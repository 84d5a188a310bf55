"""A step's network is one graph to torch.compile, and trains to the same weights up to rounding."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
import yaml

from tests.run.conftest import TINY, write_tree
from wsis.commands.train import load_config
from wsis.config import ModelConfig
from wsis.engine.build import build_model
from wsis.engine.step import Siamese, Supervised
from wsis.engine.trainer import Trainer


def a_model(**config):
    torch.manual_seed(0)
    small = ModelConfig(
        backbone="small",
        feature_dim=16,
        dropout=0.0,
        crr_dims=(8,) * 4,
        decoder_dims=(8,) * 4,
        freeze_stem=False,
        freeze_bn=False,
        **config,
    )
    return build_model(small, 5).to(memory_format=torch.channels_last).train()


def total(maps) -> torch.Tensor:
    tensors = [value for field in fields(maps) if (value := getattr(maps, field.name)) is not None]
    return sum((tensor * torch.linspace(0, 1, tensor.shape[-1])).sum() for tensor in tensors)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("refined", [True, False])
def test_the_siamese_network_is_one_graph(refined):
    torch._dynamo.reset()
    model = a_model(crr=refined)
    images = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 33, 33)
    found = []
    for siamese in (Siamese(model), Siamese(copy.deepcopy(model))):
        if found:
            siamese.compile(fullgraph=True, backend="aot_eager")  # a break would be an error
        value = sum(map(total, siamese(*images, True)))
        value.backward()
        gradients = {name: p.grad for name, p in siamese.named_parameters() if p.grad is not None}
        found.append((value.detach(), gradients))
    (value, gradients), (compiled_value, compiled) = found
    torch.testing.assert_close(compiled_value, value, rtol=1e-5, atol=1e-4)
    assert set(gradients) == set(compiled)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_compiling_leaves_the_model_itself_alone():
    """Validation calls the network with images of any size, and its weights keep their names."""
    model = a_model()
    network = Supervised(model)
    network.compile(backend="aot_eager")
    assert model._compiled_call_impl is None and network._compiled_call_impl is not None
    assert all(not name.startswith("_orig_mod") for name, _ in network.named_parameters())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_run_trains_and_resumes(tmp_path):
    """By the real compiler: losses equal to rounding; a plain run goes on with its checkpoints."""
    tree, losses = write_tree(tmp_path / "data"), {}
    for compiled in (False, True):
        torch._dynamo.reset()
        folder = tmp_path / str(compiled)
        folder.mkdir()
        values = {**TINY, "data": {**TINY["data"], "root": str(tree)}}
        values["optim"] = {**TINY["optim"], "clip": 5.0, "compile": compiled}
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        trainer = Trainer(load_config(folder / "config.yaml"), folder, resume=False)
        assert trainer.run().finished
        losses[compiled] = (folder / "log.jsonl").read_text().splitlines()
        identity = trainer.identity
    rows = [[yaml.safe_load(line) for line in losses[compiled]] for compiled in (False, True)]
    for plain, compiled in zip(*rows, strict=True):
        assert plain.keys() == compiled.keys()
        torch.testing.assert_close(compiled["total"], plain["total"], rtol=0.02, atol=0.01)
    config = load_config(tmp_path / "True" / "config.yaml")
    config.optim.compile = False
    assert Trainer(config, tmp_path / "True", resume=True).identity == identity
