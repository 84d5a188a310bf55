"""Resumed runs end bit for bit like undisturbed ones, whatever the configuration."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.run.conftest import TINY
from wsis.commands.train import load_config
from wsis.engine.trainer import Trainer

DALI = importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None
STEPS = 4  # of a run: 2 epochs of 2 steps, of 5 images in batches of 2


class Killed(BaseException):
    """What a kill is to a trainer: nothing runs any more, not even its own clean-up."""


@dataclass(frozen=True)
class Case:
    """A configuration, when it is interrupted, and with how many workers each part runs."""

    config: dict
    stops: tuple[int, ...]
    workers: tuple[int, ...]

    def __str__(self) -> str:
        optim, data = self.config["optim"], self.config["data"]
        words = [f"seed{self.config['seed']}", data["loader"], optim["name"], optim["amp"]]
        words += [f"x{optim['accumulate']}"] * (optim["accumulate"] > 1)
        words += ["ema"] * (optim["ema"] > 0) + ["flip2"] * data["view2_flip"]
        words += [self.config["supervision"]] * (self.config["supervision"] != "labels")
        words += ["stop" + ".".join(map(str, self.stops)), "w" + ".".join(map(str, self.workers))]
        return "-".join(words)


def draw_case(number: int) -> Case:
    """Case `number`: a fifth of them is interrupted five times in a row."""
    rng = random.Random(number)
    several = number % 5 == 4
    stops = [rng.randrange(STEPS + 1) for _ in range(5 if several else 1)]
    optim = {
        **TINY["optim"],
        "name": rng.choice(["sgd", "sgd", "adamw"]),
        "epochs": 2,
        "batch_size": 2,
        "accumulate": rng.choice([1, 1, 2]),
        "ema": rng.choice([0.0, 0.5, 0.9]),
        "amp": rng.choice(["off", "off", "bf16"]),
        "clip": rng.choice([None, 1.0]),
        "warmup": rng.choice([0.0, 0.5]),
    }
    data = {
        **TINY["data"],
        "resize_long": [32, 48],
        "crop": 32,
        "view2": 24,
        "loader": rng.choice(["torch", "dali"]) if DALI else "torch",
        "flip": rng.choice([0.0, 0.5, 1.0]),
        "view2_flip": rng.choice([False, True]),
        "jitter": rng.choice([[0.0, 0.0, 0.0, 0.0], [0.3, 0.3, 0.3, 0.1]]),
    }
    config = {
        **TINY,
        "seed": rng.randrange(2**31),
        "optim": optim,
        "data": data,
        "model": {**TINY["model"], "dropout": rng.choice([0.0, 0.5])},
        "pseudo": {**TINY["pseudo"], "start": rng.choice([0.0, 0.5])},
        "loss": {"contrast_start": rng.choice([0.0, 0.5])},
        "supervision": "masks" if number % 8 == 7 else "labels",
        "save_every": rng.choice([0, 1, 1, 2]),
        "validate_every": rng.choice([1, 2]),
    }
    # Processes cost a second each: the plain tier has few of them, the long one all kinds.
    kinds = [0, 0, 0, 1] if number < 10 else [0, 1, 2, 3]
    return Case(
        config, tuple(sorted(stops)), tuple(rng.choice(kinds) for _ in range(len(stops) + 1))
    )


def train(case: Case, part: int, folder: Path, root: Path, stop: int | None) -> None:
    """Train on from what is in the folder; with `stop`, die after that many steps."""
    folder.mkdir(exist_ok=True)
    data = {**case.config["data"], "root": str(root), "workers": case.workers[part]}
    (folder / "given.yaml").write_text(yaml.safe_dump({**case.config, "data": data}))
    trainer = Trainer(load_config(folder / "given.yaml"), folder, resume=True)
    assert trainer.total_steps == STEPS
    assert trainer.loader.kind == data["loader"]
    step = trainer._train_step

    def mortal(batch, epoch):
        if trainer.step == stop:
            raise Killed
        return step(batch, epoch)

    trainer._train_step = mortal
    if stop is None or stop >= STEPS:
        assert trainer.run().finished
    else:
        with pytest.raises(Killed):
            trainer.run()


def outcome(folder: Path) -> dict[str, bytes]:
    """Everything a run leaves that must not depend on interruptions."""
    last = folder / "ckpt" / (folder / "ckpt" / "last").read_text().strip()
    files = [*last.glob("*.safetensors")]
    files += [folder / name for name in ("weights.safetensors", "log.jsonl", "metrics.csv")]
    assert len(files) >= 5
    return {path.name: path.read_bytes() for path in files}


CASES = [pytest.param(draw_case(n), id=f"{n}-{draw_case(n)}") for n in range(10)]
CASES += [
    pytest.param(draw_case(n), id=f"{n}-{draw_case(n)}", marks=pytest.mark.long)
    for n in range(10, 110)
]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Five images and two to validate on: a tail of one is dropped from each epoch."""
    from tests.run.conftest import write_tree

    return write_tree(tmp_path_factory.mktemp("few") / "tree", train=5, val=2)


@pytest.mark.parametrize("case", CASES)
def test_interrupted_runs_end_like_straight_ones(few, tmp_path, case):
    train(Case(case.config, (), (0,)), 0, tmp_path / "straight", few, None)
    for part, stop in enumerate(case.stops):
        train(case, part, tmp_path / "interrupted", few, stop)
    train(case, len(case.stops), tmp_path / "interrupted", few, None)
    straight, interrupted = outcome(tmp_path / "straight"), outcome(tmp_path / "interrupted")
    assert straight.keys() == interrupted.keys()
    for name, content in straight.items():
        assert interrupted[name] == content, name


def test_the_drawn_cases_cover_what_they_should():
    for cases, workers in ((CASES[:10], {0, 1}), (CASES[10:], {0, 1, 2, 3})):
        drawn = [parameter.values[0] for parameter in cases]
        configs = [case.config for case in drawn]
        assert {w for case in drawn for w in case.workers} == workers
        assert {s for case in drawn for s in case.stops} == set(range(STEPS + 1))
        assert {len(case.stops) for case in drawn} == {1, 5}
        assert any(len(set(case.workers)) > 1 for case in drawn)
        assert {c["optim"]["accumulate"] for c in configs} == {1, 2}
        assert {c["optim"]["amp"] for c in configs} == {"off", "bf16"}
        assert {c["optim"]["name"] for c in configs} == {"sgd", "adamw"}
        assert {c["optim"]["ema"] > 0 for c in configs} == {True, False}
        assert {c["data"]["view2_flip"] for c in configs} == {True, False}
        assert {c["supervision"] for c in configs} == {"labels", "masks"}
        assert {c["data"]["loader"] for c in configs} == ({"torch", "dali"} if DALI else {"torch"})
