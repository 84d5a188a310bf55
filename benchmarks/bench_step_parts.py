"""Where the time of a training step goes: recipe lite0, 8 images of 225 px, one CPU thread.

Every part of ``wsis.engine.trainer`` is timed where it is called, without what it calls that is a
part itself; all terms of the method are on. Photographs with ``--root``, else the built-in scenes.
Processor time, median of the steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest

WARM_UP, STEPS = 2, 5
PARTS = (
    "load",
    "forward",
    "cam and crr",
    "refine",
    "losses",
    "backward",
    "optimiser",
    "other",
)


class Clock:
    """Processor time by part; a part inside another stops the other's time."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._running = ["other"]
        self._since = time.process_time()

    def lap(self) -> None:
        now = time.process_time()
        self.spent[self._running[-1]] += now - self._since
        self._since = now

    def watch(self, owner: object, name: str, part: str) -> None:
        """Time every call of a function of an object or module."""
        function = getattr(owner, name)

        def timed(*arguments, **options):
            self.lap()
            self._running.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self.lap()
                self._running.pop()

        setattr(owner, name, timed)


@lru_cache(maxsize=1)
def measure(root: str | None) -> dict[str, float]:
    """Milliseconds of each part."""
    import torch

    from wsis.engine import step, trainer
    from wsis.recipes import get_recipe

    config = get_recipe("lite0")
    config.device, config.threads, config.data.workers = "cpu", 1, 0
    config.data.dataset, config.data.root = ("voc", root) if root else ("scenes", None)
    config.data.loader = "torch"
    with tempfile.TemporaryDirectory() as folder:
        run = trainer.Trainer(config, Path(folder), resume=False)
        run.model.train()
        clock = Clock()
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((step, "pseudo_masks"), (step, "rtc_losses"),
                                (trainer, "finite_norm"), (torch.Tensor, "backward")):  # fmt: skip
                patch.setattr(owner, name, getattr(owner, name))  # put back at the end
            clock.watch(run.network, "forward", "forward")
            clock.watch(run.model.head, "forward", "cam and crr")
            clock.watch(run.model.crr, "forward", "cam and crr")
            clock.watch(step, "pseudo_masks", "refine")
            clock.watch(step, "rtc_losses", "losses")
            clock.watch(torch.Tensor, "backward", "backward")
            clock.watch(trainer, "finite_norm", "optimiser")
            clock.watch(run.optimizer, "step", "optimiser")
            clock.watch(run.ema, "update_parameters", "optimiser")
            loading = SimpleNamespace(take=run.loader.epoch(0).__next__)
            clock.watch(loading, "take", "load")
            steps = []
            for _ in range(WARM_UP + STEPS):
                clock.lap()
                clock.spent.clear()
                run._train_step(loading.take(), run.segment_from)
                clock.lap()
                steps.append(dict(clock.spent))
        run.log.close()
    kept = steps[WARM_UP:]
    return {part: 1e3 * statistics.median(s.get(part, 0.0) for s in kept) for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_step(benchmark, request, part):
    spent = measure(request.config.getoption("--root"))
    benchmark.group = "training step of lite0, 8 x 225 x 225"
    benchmark.extra_info["share"] = round(100 * spent[part] / sum(spent.values()), 1)
    ticks = iter((0.0, spent[part] / 1e3))
    benchmark._timer = lambda: next(ticks)  # measured above
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
