"""Which run a checkpoint belongs to, over versions of wsis, and what is said when it is another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import pytest
import yaml

from tests.run.conftest import TINY, write_tree
from wsis.cli import main
from wsis.commands.train import load_config
from wsis.config import DataConfig, TrainConfig
from wsis.engine import about
from wsis.engine.about import identity
from wsis.engine.trainer import Trainer
from wsis.errors import InputError


@pytest.fixture(scope="module")
def begun(tree, tmp_path_factory):
    """A run with one checkpoint."""
    base = tmp_path_factory.mktemp("begun")
    (base / "tiny.yaml").write_text(
        yaml.safe_dump({**TINY, "data": {**TINY["data"], "root": str(tree)}})
    )
    Trainer(load_config(base / "tiny.yaml"), base / "run", resume=False)._save()
    return base / "run"


@pytest.fixture
def run(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


def state_of(run):
    return run / "ckpt" / "step-0" / "state.json"


def make_old(run):
    """The checkpoint as wsis wrote it before 2026-11-29: a hash of every field, nothing else."""
    config = load_config(run / "config.yaml")
    relevant = config.as_dict()
    for free in ("threads", "device", "report_images", "quality_images", "predict", "save_every"):
        relevant.pop(free)
    for free in ("workers", "root", "labels", "loader", "on_error", "masks", "cache", "cache_gb"):
        relevant["data"].pop(free)
    relevant["optim"].pop("compile")
    document = json.loads(state_of(run).read_text())
    relevant["fingerprint"] = document["state"].pop("fingerprint")
    document["state"].pop("config")
    text = json.dumps(relevant, sort_keys=True)
    document["state"]["identity"] = hashlib.sha256(text.encode()).hexdigest()
    state_of(run).write_text(json.dumps(document))


@dataclasses.dataclass
class LaterData(DataConfig):
    """Of a later version."""

    blur: float = 0.0


@dataclasses.dataclass
class Later(TrainConfig):
    """Of a later version."""

    data: LaterData = dataclasses.field(default_factory=LaterData)
    late: tuple[int, int] = (3, 4)


@pytest.fixture
def later(monkeypatch):
    """The configuration of a run as a version with more fields has it."""
    monkeypatch.setattr(about, "TrainConfig", Later)

    def upgrade(config, **values):
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        fields["data"] = LaterData(**dataclasses.asdict(config.data))
        return Later(**{**fields, **values})

    return upgrade


@pytest.mark.parametrize("old", [False, True])
def test_a_field_that_a_later_version_adds_changes_nothing(run, later, old):
    if old:
        make_old(run)
    config = load_config(run / "config.yaml")
    new = later(config)
    for _ in range(2):  # the first has written the later version's config.yaml
        resumed = Trainer(new, run, resume=True)
        assert "late" in yaml.safe_load((run / "config.yaml").read_text())
    assert resumed.identity == identity(new, resumed.train_set)
    with pytest.raises(InputError, match=r"masks: late was \[3, 4\], is \[5, 4\]\. Resume"):
        Trainer(later(config, late=(5, 4)), run, resume=True)
    new.data.blur = 0.5
    with pytest.raises(InputError, match=r"masks: data\.blur was 0\.0, is 0\.5\. Resume"):
        Trainer(new, run, resume=True)


def test_fields_at_their_default_are_not_in_the_identity(run, later):
    config = load_config(run / "config.yaml")
    made = Trainer(config, run.parent / "new", resume=False)
    assert identity(later(config), made.train_set) == made.identity
    assert identity(later(config, late=(5, 4)), made.train_set) != made.identity
    config.seed += 1
    assert identity(config, made.train_set) != made.identity


@pytest.mark.parametrize("old", [False, True])
def test_another_configuration_does_not_resume(run, capsys, old):
    if old:
        make_old(run)
    before = (run / "config.yaml").read_bytes()
    arguments = ["train", "--config", str(run / "config.yaml"), "--out", str(run)]
    arguments += ["--resume", "auto", "--seed", "2", "--data.resize_long", "[48,65]"]
    assert main([*arguments, "--data.workers", "1", "--predict.flip", "false"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    differing = "data.resize_long was [48, 64], is [48, 65]; seed was 1, is 2. Resume with"
    assert f"another configuration, data set or masks: {differing}" in line
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("old", [False, True])
def test_another_data_set_does_not_resume(run, tmp_path, old):
    if old:
        make_old(run)
    config = load_config(run / "config.yaml")
    config.data.root = str(write_tree(tmp_path / "other", train=11))
    with pytest.raises(InputError, match="masks: the training images, their labels or masks are"):
        Trainer(config, run, resume=True)


def test_a_field_that_is_gone_and_a_default_that_moved_are_named(run, monkeypatch):
    document = json.loads(state_of(run).read_text())
    document["state"]["config"] |= {"optim.nesterov": True, "optim.power": 0.8}
    state_of(run).write_text(json.dumps(document))
    moved = "optim.power was 0.8, is 0.9"
    gone = "optim.nesterov was true, is no field any more"
    with pytest.raises(InputError, match=rf"masks: ({moved}; {gone}|{gone}; {moved})\. Resume"):
        Trainer(load_config(run / "config.yaml"), run, resume=True)


def test_an_old_checkpoint_needs_no_config_file(run):
    make_old(run)
    config = load_config(run / "config.yaml")
    (run / "config.yaml").unlink()
    other = dataclasses.replace(config, seed=2)
    with pytest.raises(InputError, match=r"masks: \S+config.yaml cannot be read\. Resume"):
        Trainer(other, run, resume=True)
    Trainer(config, run, resume=True)
    assert json.loads(state_of(run).read_text())["state"]["config"]["seed"] == 1
