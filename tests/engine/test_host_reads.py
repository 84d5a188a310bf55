"""A training step waits for its device once: where it reads losses and gradient norm together."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import wsis
from tests.run.conftest import TINY
from wsis.commands.train import load_config
from wsis.config import ModelConfig, PseudoConfig
from wsis.engine import distributed
from wsis.engine.build import build_model
from wsis.engine.step import Siamese, weak_losses
from wsis.engine.trainer import NonFiniteError, Trainer
from wsis.losses.equivariance import ClassCounts, classes_of_batch, count_classes
from wsis.losses.rtc import RtcWeights
from wsis.losses.segmentation import segmentation_loss
from wsis.types import Batch

ROOT = Path(wsis.__file__).parent
READS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"}
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "bincount", "masked_select", "_unique2")


def place() -> str:
    """Where wsis, or an optimiser of torch, is: `file:function`."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT):
            return f"{path.relative_to(ROOT)}:{frame.name}"
        if path.parent.name == "optim":
            return f"{path.name}:{frame.name}"
    return "elsewhere"


class Reads(TorchFunctionMode):
    """Counts what brings a tensor's value to the host, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS:
            self.found[place()] += 1
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts operators whose result or size depends on values, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or masked:
            self.found[place()] += 1
        return function(*args, **(kwargs or {}))


def a_trainer(tree, folder, device="cpu", **optim):
    import yaml

    values = {**TINY, "data": {**TINY["data"], "root": str(tree)}, "device": device}
    values["optim"] = {**TINY["optim"], "clip": 5.0, **optim}
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return Trainer(load_config(folder / "tiny.yaml"), folder, resume=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    from tests.run.conftest import write_tree

    return write_tree(tmp_path_factory.mktemp("data") / "tree", train=4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_reads_of_a_step_on_the_cpu_and_where_they_are(tree, tmp_path, accumulate):
    trainer = a_trainer(tree, tmp_path / "run", accumulate=accumulate)
    trainer.model.train()
    batch = next(trainer.loader.epoch(0))
    trainer._train_step(batch, epoch=2)
    with Reads() as reads, Waits() as waits:
        trainer._train_step(batch, epoch=2)
    # torch's average counts its updates on the CPU.
    average = {"swa_utils.py:update_parameters": 2, "engine/optim.py:update": 2}
    on_host = {"pseudo/masks.py:_check_finite": 1, "pseudo/masks.py:_room": 1}
    labels = {"losses/equivariance.py:count_classes": 1}  # which are still on the CPU
    assert reads.found == average | {"engine/distributed.py:mean_values": 1} | {
        name: accumulate * count for name, count in (on_host | labels).items()
    }
    # What is chosen by value on the CPU, to save work; CUDA has other branches, see below.
    chosen = {
        "losses/segmentation.py:segmentation_loss": 3,
        "engine/trainer.py:_train_step": 1,  # its backward
        "pseudo/masks.py:_scores_of_present": 1,
        "pseudo/masks.py:make_pseudo_masks": 1,
    }
    assert waits.found == average | {
        name: accumulate * count for name, count in (on_host | chosen).items()
    }


def losses_on_fake_cuda(counts, **options):
    config = ModelConfig(
        backbone="small",
        feature_dim=8,
        crr_dims=(8,) * 4,
        decoder_dims=(8,) * 4,
        freeze_stem=False,
        freeze_bn=False,
    )
    pseudo = replace(PseudoConfig(), dilations=(1, 2), iterations=2, **options)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = build_model(config, 5)
        box, index = torch.zeros(4, 4, dtype=torch.int64), torch.arange(4)
        batch = Batch(torch.randn(4, 3, 48, 48), torch.zeros(4, 5), box, index)
        return weak_losses(
            Siamese(model),
            model,
            batch,
            view2_size=32,
            weights=RtcWeights.reconstructed(),
            pseudo=pseudo,
            segment=True,
            counts=counts,
        )


@pytest.mark.parametrize("relative", [True, False])
def test_nothing_waits_for_a_gpu_between_batch_and_losses(relative):
    """Tensors without values on a GPU that is not there: to read one is an error."""
    losses = losses_on_fake_cuda(ClassCounts(2, 3), relative=relative)
    assert losses["total"].device.type == "cuda"
    assert {"com", "seg", "ctr_intra"} <= losses.keys()
    with pytest.raises(DataDependentOutputException):
        losses_on_fake_cuda(None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu_in_a_step(tree, tmp_path, monkeypatch):
    trainer = a_trainer(tree, tmp_path / "run", device="cuda", ema=0.9)
    trainer.model.train()
    for step in range(2):  # the first one makes constants and workspaces
        batch = next(trainer.loader.epoch(step))
        batch = replace(batch, **{k: v.pin_memory() for k, v in vars(batch).items() if v is not None
                                  and not v.is_cuda})  # fmt: skip
        trainer._train_step(batch, epoch=2)
    read = distributed.mean_values

    def allowed(values):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(values)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(distributed, "mean_values", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step(batch, epoch=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_classes_counted_and_listed():
    label = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert count_classes(label) == (2, 2)
    assert classes_of_batch(label).tolist() == [1, 3]
    assert count_classes(torch.zeros(2, 4)) == (0, 0)
    assert classes_of_batch(torch.zeros(2, 4)).tolist() == []


def test_gated_images_weigh_nothing_whether_left_out_or_ignored(monkeypatch):
    """The branch for CUDA, taken on the CPU."""
    masks = torch.randint(0, 3, (3, 9, 9), generator=torch.Generator().manual_seed(0))
    masks[0] = 255
    label = torch.tensor([[1.0, 0], [1, 1], [1, 1]])
    found = []
    for on_gpu in (False, True):
        logits = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(1))
        logits[0] = torch.inf  # not even this of an image that takes no part
        logits = logits.requires_grad_()
        with monkeypatch.context() as patch:
            if on_gpu:
                patch.setattr(torch.Tensor, "is_cuda", True)
            loss = segmentation_loss(logits, masks, label)
        (gradient,) = torch.autograd.grad(loss, logits)
        found.append((loss.detach(), gradient))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1][1:], found[1][1][1:])
    assert found[0][0] > 0


@pytest.mark.parametrize("place", ["image", "weight", "gradient"])
def test_what_is_not_finite_moves_no_weight(tree, tmp_path, place):
    trainer = a_trainer(tree, tmp_path / "run", ema=0.9)
    trainer.model.train()
    batch = next(trainer.loader.epoch(0))
    trainer._train_step(batch, 0)
    if place == "image":
        batch.image[0, 0, 0, 0] = torch.inf
    elif place == "weight":
        trainer.model.head.projection.weight.data[0, 0] = torch.nan
    else:
        trainer.model.head.projection.weight.register_hook(lambda g: g * torch.inf)
    states = [p for s in trainer.optimizer.state.values() for p in s.values() if p is not None]
    kept = [*trainer.model.parameters(), *trainer.ema.parameters(), *states]
    before = [value.detach().clone() for value in kept]
    with pytest.raises(NonFiniteError, match="weights are unchanged"):
        trainer._train_step(batch, 0)
    for old, new in zip(before, kept, strict=True):
        assert torch.equal(old.nan_to_num(), new.detach().nan_to_num())
