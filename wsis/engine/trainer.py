"""The training loop: data order, optimiser steps, checkpoints, logs, resume.

Everything random in a step follows from (seed, step): the loader keys its samples by
(seed, epoch, position), dropout is re-seeded before every step. So a checkpoint needs no generator
state, and a run that was killed at any moment ends bit-identical to an undisturbed one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from wsis.config import TrainConfig
from wsis.data.loader import make_loader
from wsis.data.memory import keep_freed_memory
from wsis.engine import distributed
from wsis.engine.about import check_origin, describe, origin, processes_before
from wsis.engine.build import build_model, open_split, open_training_set
from wsis.engine.check import batch_rule, check
from wsis.engine.checkpoint import (
    CheckpointStore,
    optimizer_state,
    restore_optimizer,
    save_weights,
)
from wsis.engine.device import pick_device
from wsis.engine.interrupt import StopRequest
from wsis.engine.logs import RunLog
from wsis.engine.meters import RunningMean
from wsis.engine.optim import corrected_average, finite_norm, make_optimizer, poly_factor, set_lr
from wsis.engine.step import Siamese, Supervised, mask_losses, weak_losses
from wsis.engine.validate import classification_scores
from wsis.errors import InputError
from wsis.losses.equivariance import ClassCounts, count_classes
from wsis.models.network import Network
from wsis.types import Batch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the weights are those of the step before."""


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        finished: False when a signal stopped it; resume goes on from there.
        epochs: whole epochs done.
        seconds: training time over all parts of the run.
    """

    finished: bool
    epochs: int
    seconds: float


class Trainer:
    """One training run in one folder.

    Args:
        config: the whole run.
        folder: where checkpoints, logs and weights go; made if absent.
        resume: go on from the folder's last checkpoint, if it has one.

    Raises:
        InputError: the folder holds another run's checkpoint, or none of `config`'s parts works.
    """

    def __init__(self, config: TrainConfig, folder: Path, *, resume: bool) -> None:
        check(config, distributed.world_size())
        self.config, self.folder = config, Path(folder)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = pick_device(config.device)
        if config.optim.amp == "fp16" and self.device.type != "cuda":
            raise InputError("optim.amp fp16 needs a GPU; use bf16 or off on the CPU")
        if self.device.type == "cpu":
            keep_freed_memory()
        self.one_label = config.loss.classification == "single"
        self.train_set = open_training_set(config, self.folder, resume=resume)
        self.val_set = open_split(config.data, config.data.val_split, one_label=self.one_label)

        torch.manual_seed(config.seed)
        self.model = build_model(
            config.model, len(self.train_set.classes), supervision=config.supervision
        )
        self.model.to(self.device).to(memory_format=torch.channels_last)
        wrapper = Siamese if config.supervision == "labels" else Supervised
        network = wrapper(self.model)
        if config.optim.compile:
            network.compile()  # only as a step calls it: validation has images of any size
        # Before its epoch the decoder gets no gradient, which DDP must be told to expect.
        self.network = distributed.wrap_ddp(network, find_unused=True)
        self.optimizer = make_optimizer(
            self.model,
            name=config.optim.name,
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            new_lr_scale=config.optim.new_lr_scale,
        )
        self.ema = None
        if config.optim.ema > 0:
            average = corrected_average(config.optim.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.optim.amp == "fp16" and self.device.type == "cuda"
        )
        self.loader = make_loader(
            config.data.loader,
            self.train_set,
            device=self.device,
            batch_size=config.optim.batch_size,
            crop=config.data.crop,
            resize_long=tuple(config.data.resize_long),
            flip=config.data.flip,
            jitter=tuple(config.data.jitter),
            resize_scale=config.data.resize_scale,
            hsv=tuple(config.data.hsv),
            mean=self.model.backbone.mean,
            std=self.model.backbone.std,
            square=config.data.square,
            seed=config.seed,
            workers=config.data.workers,
            masks=config.supervision != "labels",
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        self.total_steps = config.optim.steps or config.optim.epochs * self.loader.steps_per_epoch
        self.epochs = -(-self.total_steps // self.loader.steps_per_epoch)  # the last may be a part
        self.segment_from = round(config.pseudo.start * self.epochs)
        self.contrast_from = round(config.loss.contrast_start * self.epochs)

        self.step = 0
        self.seconds = 0.0
        self._clock = time.monotonic()
        self.best_map = -1.0
        self.means = RunningMean()
        self.store = CheckpointStore(self.folder / "ckpt")
        self.log = RunLog(self.folder) if distributed.is_main() else None
        self.origin = origin(config, self.train_set)
        self.identity: str = self.origin["identity"]
        latest = self.store.latest() if resume else None
        told = latest is None or self._restore(latest)
        if self.log is not None:
            self.log.rewind(self.step)
            if not told:
                self._save()  # `config.yaml`, which this version writes below, would not tell
            before = processes_before(self.folder) if self.step else None
            if (line := batch_rule(config, distributed.world_size(), before)) is not None:
                print(line, flush=True)
            describe(
                config,
                self.folder,
                train=self.train_set,
                val=self.val_set,
                about={"device": str(self.device), "loader": self.loader.kind},
            )

    # -- state ---------------------------------------------------------------------------------

    def _save(self, *, pin: str | None = None) -> None:
        if self.log is None:
            return
        self.log.sync()
        tensors, scalars = optimizer_state(self.optimizer, self.model)
        groups = {"model": self.model.state_dict(), "optimizer": tensors}
        if self.ema is not None:
            groups["ema"] = self.ema.state_dict()
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "best_map": self.best_map,
            "means": self.means.state(),
            "optimizer": scalars,
            "scaler": self.scaler.state_dict(),
            **self.origin,
        }
        self.store.save(self.step, groups, state, pin=pin)

    def _restore(self, path: Path) -> bool:
        """Go on from a checkpoint; False where it does not say of which run it is."""
        groups, state = self.store.load(path)
        told = check_origin(state, self.config, self.train_set, self.folder, path)
        distributed.meet()  # all have read what the first one may write now
        self.model.load_state_dict(groups["model"])
        restore_optimizer(self.optimizer, self.model, groups["optimizer"], state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(groups["ema"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.best_map = state["best_map"]
        self.means.load_state(state["means"])
        return told

    # -- steps ---------------------------------------------------------------------------------

    def _seed_step(self) -> None:
        """Key torch's generators by (seed, step): dropout needs no stored state.

        All processes alike: each draws for the whole batch and takes its images' part.
        """
        key = np.random.SeedSequence([self.config.seed, self.step, 0])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """The batch in `accumulate` equal parts, on the CPU but for what the loader put there."""
        count = self.config.optim.accumulate
        size = len(batch.image) // count
        for k in range(count):
            part = slice(k * size, (k + 1) * size)
            yield Batch(
                batch.image[part],
                batch.label[part],
                batch.valid_box[part],
                batch.index[part],
                None if batch.mask is None else batch.mask[part],
            )

    def _losses(self, batch: Batch, epoch: int, counts: ClassCounts) -> dict[str, Tensor]:
        if self.config.supervision != "labels":
            return mask_losses(self.network, batch, classify=self.config.model.head == "rtc")
        weights = self.config.loss
        if epoch < self.contrast_from:
            weights = replace(weights, ctr=0.0, com=0.0)
        return weak_losses(
            self.network,
            self.model,
            batch,
            view2_size=self.config.data.view2,
            view2_flip=self.config.data.view2_flip,
            weights=weights,
            pseudo=self.config.pseudo,
            segment=epoch >= self.segment_from and weights.seg > 0,
            counts=counts,
        )

    def _train_step(self, batch: Batch, epoch: int) -> dict[str, float]:
        """One optimiser step; returns the losses, their mean over all processes.

        The host waits for the device once, before the weights move, and reads the losses and the
        norm of the gradient together. Raises NonFiniteError, then in every process.
        """
        optim = self.config.optim
        self._seed_step()
        factor = poly_factor(
            self.step,
            self.total_steps,
            power=optim.power,
            warmup=int(optim.warmup * self.total_steps),
        )
        set_lr(self.optimizer, factor)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for k, part in enumerate(self._parts(batch)):
            with distributed.synced(self.network, last=k + 1 == optim.accumulate):
                with torch.autocast(
                    self.device.type, AMP_DTYPES.get(optim.amp), enabled=optim.amp != "off"
                ):
                    # Counted before the labels leave the CPU.
                    counts = count_classes(part.label)
                    losses = self._losses(part.to(self.device), epoch, counts)
                self.scaler.scale(losses["total"] / optim.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / optim.accumulate
        self.scaler.unscale_(self.optimizer)
        norm = finite_norm(self.model.parameters(), optim.clip)
        values = distributed.mean_values({**sums, "norm": norm})
        # A gradient that overflows in fp16 is the scaler's business: it skips the step and lowers
        # its scale. A loss that is not finite is nobody's.
        watched = values.pop("norm")
        if not math.isfinite(values["total"] + (0.0 if self.scaler.is_enabled() else watched)):
            names = [self.train_set.ids[i] for i in batch.index.tolist()]
            terms = {name: float(value) for name, value in sums.items()}
            raise NonFiniteError(
                f"loss or gradient not finite at step {self.step} (losses {terms}, gradient norm "
                f"{float(norm)}); the weights are unchanged. Images: {', '.join(names)}. "
                "Lower --optim.lr or set --optim.clip"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return values

    def _validate(self) -> dict[str, float]:
        values = classification_scores(
            self.evaluated_model(),
            self.val_set,
            side=self.config.data.crop,
            square=self.config.data.square,
            device=self.device,
        )
        self.model.train()
        return values

    def evaluated_model(self) -> Network:
        """The network whose weights are the result: the moving average where there is one."""
        if self.ema is None:
            return self.model
        average = self.ema.module
        assert isinstance(average, Network)
        return average

    # -- loop ----------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train to the end, or until a signal asks to stop; both leave a checkpoint."""
        steps = self.loader.steps_per_epoch
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not distributed.is_main(),
            dynamic_ncols=True,
        )
        # torchrun passes on a signal that may have gone to all processes of a job.
        grace = 5.0 if distributed.launched() else 0.0
        with StopRequest(grace) as stop, bar:
            while self.step < self.total_steps:
                epoch, start = divmod(self.step, steps)
                bar.set_description(f"epoch {epoch + 1}/{self.epochs}")
                if not self._epoch(epoch, start, stop, bar):
                    self._save()
                    return TrainResult(False, self.step // steps, self.seconds)
        if self.log is not None:
            self.log.close()
            # One entry: safetensors writes several in no fixed order.
            metadata = {"run": f"{self.identity} step {self.step}"}
            save_weights(
                self.folder / "weights.safetensors", self.evaluated_model().state_dict(), metadata
            )
        return TrainResult(True, self.epochs, self.seconds)

    def _epoch(self, epoch: int, start: int, stop: StopRequest, bar: tqdm) -> bool:
        """Train from batch `start` to the end of the epoch; False when asked to stop before."""
        self.model.train()
        every = self.config.save_every
        self._clock = time.monotonic()
        for batch in self.loader.epoch(epoch, start):
            values = self._train_step(batch, epoch)
            self.step += 1
            self.means.update(values)
            self._lap()
            if self.log is not None:
                self.log.record(self.step, epoch=epoch + 1, **values)
            self._show(bar)
            if self.step % self.loader.steps_per_epoch == 0 or self.step >= self.total_steps:
                break
            if distributed.any_rank(stop.requested):
                return False
            if every and self.step % every == 0:
                self._save()
        self._end_epoch(epoch)
        return not distributed.any_rank(stop.requested) or self.step >= self.total_steps

    def _lap(self) -> None:
        """Add what has passed since the last lap, loading and validation included."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now

    def _show(self, bar: tqdm) -> None:
        means = self.means.mean()
        text = [f"{name} {means[name]:.3f}" for name in ("total", "cls", "seg") if name in means]
        if self.best_map >= 0:
            text.append(f"{'top-1' if self.one_label else 'mAP'} {self.best_map:.1f}")
        text.append(f"{self.config.optim.batch_size * (bar.format_dict['rate'] or 0):.1f} img/s")
        bar.set_postfix_str(", ".join(text), refresh=False)
        bar.update()

    def _end_epoch(self, epoch: int) -> None:
        row = {"lr": self.optimizer.param_groups[0]["lr"], **self.means.mean()}
        pin = None
        last = self.step >= self.total_steps
        if last or (epoch + 1) % self.config.validate_every == 0:
            row |= self._validate()
            value = row["val_top1" if self.one_label else "val_map"]
            if value > self.best_map:
                self.best_map, pin = value, "best"
        self.means.reset()
        self._lap()
        if self.log is None:
            return
        self.log.epoch(epoch + 1, self.step, **row)
        self.log.time(self.step, seconds=self.seconds)
        self._save(pin=pin)
