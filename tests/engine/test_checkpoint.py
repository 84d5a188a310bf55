from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from wsis.engine import checkpoint, logs
from wsis.engine.checkpoint import (
    CheckpointStore,
    optimizer_state,
    restore_optimizer,
    save_weights,
)
from wsis.errors import InputError
from wsis.models.weights import read_state

ROOT = Path(__file__).parents[2]


def groups(step: int) -> dict[str, dict[str, torch.Tensor]]:
    fill = torch.full((7, 5), float(step))
    return {"model": {"a.weight": fill, "a.bias": fill[0]}, "ema": {"n": torch.tensor(step)}}


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if isinstance(tensor, dict):
            assert_equal(actual[name], tensor)
        else:
            assert actual[name].dtype == tensor.dtype
            assert torch.equal(actual[name], tensor), name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_round_trip_of_every_dtype_and_layout(tmp_path, dtype):
    base = torch.arange(70).reshape(7, 10).to(dtype)
    saved = {
        "model": {
            "plain": base,
            "transposed": base.T,
            "sliced": base[1:, ::3],
            "expanded": base[:1].expand(3, 10),
            "shared": base,
            "scalar": base[3, 3],
            "empty": base[:0],
            "channels_last": base[None, None].to(memory_format=torch.channels_last),
        },
        "nothing": {},
    }
    state = {"seconds": 0.1 + 0.2, "means": {"total": [1e-300, 3]}, "worst": float("inf")}
    store = CheckpointStore(tmp_path / "deep" / "ckpt")
    path = store.save(0, saved, state)
    loaded, loaded_state = store.load(path, verify=True)
    assert_equal(loaded, saved)
    assert loaded_state == {**state, "step": 0}


def test_loading_needs_no_gradient_and_survives_removal(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"model": {"w": nn.Parameter(torch.ones(3))}}, {})
    loaded, _ = store.load(path)
    shutil.rmtree(path)
    assert not loaded["model"]["w"].requires_grad
    assert loaded["model"]["w"].sum() == 3


# -- which checkpoints there are -----------------------------------------------------------------


def test_keeps_the_newest_and_the_pinned(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    for step in range(1, 7):
        store.save(step, groups(step), {}, pin="best" if step in (1, 3) else None)
    assert names(tmp_path) == {"step-3", "step-5", "step-6", "last", "best"}
    assert store.latest().name == "step-6"
    assert store.pinned("best").name == "step-3"


def test_steps_are_compared_as_numbers(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (9, 10, 11):
        store.save(step, groups(step), {})
    (tmp_path / "last").unlink()
    assert store.latest().name == "step-11"
    assert names(tmp_path) == {"step-10", "step-11"}


def test_going_back_removes_the_future_that_was_left(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30):
        store.save(step, groups(step), {}, pin="best" if step == 30 else None)
    store.save(25, groups(25), {})
    assert names(tmp_path) == {"step-20", "step-25", "step-30", "last", "best"}
    store.save(26, groups(26), {}, pin="best")
    assert names(tmp_path) == {"step-25", "step-26", "last", "best"}


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(4, groups(4), {"round": 1})
    store.save(4, groups(5), {"round": 2}, pin="best")
    assert names(tmp_path) == {"step-4", "last", "best"}
    loaded, state = store.load(store.latest(), verify=True)
    assert_equal(loaded, groups(5))
    assert state == {"round": 2, "step": 4}


def test_a_replaced_step_counts_until_its_successor_is_there(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(4, groups(4), {}, pin="best")
    (tmp_path / "step-4").rename(tmp_path / "step-4-replaced")
    assert store.latest() == store.pinned("best") == tmp_path / "step-4-replaced"
    store.save(6, groups(6), {})
    assert store.pinned("best") == tmp_path / "step-4-replaced"
    store.save(4, groups(4), {}, pin="best")
    assert names(tmp_path) == {"step-4", "last", "best"}


def test_stale_temporary_folders_go_at_the_next_save(tmp_path):
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-file").write_text("step-")
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    store.save(1, groups(1), {})
    assert names(tmp_path) == {"step-1", "last"}


@pytest.mark.parametrize("content", ["", "step-9", "../../etc", "step-1\nstep-2", "\0"])
def test_a_useless_pointer_falls_back_to_the_highest_step(tmp_path, content):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, groups(step), {})
    (tmp_path / "last").write_text(content)
    assert store.latest().name == "step-2"


def test_a_pointer_cannot_leave_the_folder(tmp_path):
    CheckpointStore(tmp_path / "other").save(9, groups(9), {})
    store = CheckpointStore(tmp_path / "ckpt")
    store.save(1, groups(1), {})
    for name in ("../other/step-9", str(tmp_path / "other" / "step-9")):
        (tmp_path / "ckpt" / "last").write_text(name)
        assert store.pinned("last") is None
        assert store.latest() == tmp_path / "ckpt" / "step-1"


@pytest.mark.parametrize("name", ["Model", "../model", "model.1", ""])
def test_refuses_names_that_are_no_file_stem(tmp_path, name):
    with pytest.raises(InputError, match="a-z"):
        CheckpointStore(tmp_path).save(1, {name: {}}, {})
    with pytest.raises(InputError, match="a-z"):
        CheckpointStore(tmp_path).save(1, {}, {}, pin=name)


def test_refuses_numbers_out_of_range(tmp_path):
    with pytest.raises(InputError, match="keep"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(InputError, match="step"):
        CheckpointStore(tmp_path).save(-1, {}, {})
    with pytest.raises(InputError, match="last"):
        CheckpointStore(tmp_path).save(1, {}, {}, pin="last")


# -- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("model.safetensors", "it has [0-9]+ bytes instead of [0-9]+"),
        ("ema.safetensors", "it has [0-9]+ bytes instead of [0-9]+"),
        ("state.json", "it is not JSON"),
    ],
)
def test_a_truncated_file_makes_the_checkpoint_not_exist(tmp_path, file, reason):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, groups(step), {})
    damaged = tmp_path / "step-2" / file
    os.truncate(damaged, damaged.stat().st_size - 3)
    assert store.latest().name == "step-1"
    with pytest.raises(InputError, match=f"step-2/{file} cannot be used: {reason}; .*older"):
        store.load(tmp_path / "step-2")


def test_an_absent_file_is_named(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, groups(1), {})
    (path / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=r"ema\.safetensors cannot be used: No such file"):
        store.load(path)
    with pytest.raises(InputError, match=r"step-9/state\.json cannot be used: No such file"):
        store.load(tmp_path / "step-9")
    assert store.latest() is None


def test_a_flipped_bit_is_found_by_verify_alone(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, groups(1), {})
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store.load(path)
    with pytest.raises(InputError, match="sha256"):
        store.load(path, verify=True)


def test_a_damaged_header_is_an_input_error(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, groups(1), {})
    file = path / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        store.load(path)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"format": 2, "files": {}, "state": {}},
        {"format": 1, "files": [], "state": {}},
        {"format": 1, "files": {}, "state": 3},
        {"format": 1, "files": {"../x.safetensors": {"bytes": 1, "sha256": ""}}, "state": {}},
        {"format": 1, "files": {"/x.safetensors": {"bytes": 1, "sha256": ""}}, "state": {}},
        {"format": 1, "files": {"model.pkl": {"bytes": 1, "sha256": ""}}, "state": {}},
        {"format": 1, "files": {"model.safetensors": {"bytes": "1"}}, "state": {}},
    ],
)
def test_a_state_of_another_form_is_refused(tmp_path, document):
    store = CheckpointStore(tmp_path)
    path = store.save(1, groups(1), {})
    (path / "state.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"state\.json cannot be used: it is not a checkpoint"):
        store.load(path)
    (path / "state.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON"):
        store.load(path)


# -- kill at any moment --------------------------------------------------------------------------

SAVER = """
    import sys, torch
    from pathlib import Path
    from wsis.engine.checkpoint import CheckpointStore
    store = CheckpointStore(Path(sys.argv[1]), keep=2)
    last = store.latest()
    # Every third round saves the same step again, every fourth one is pinned.
    step = store.load(last)[1]["step"] if last else 0
    for round in range(1_000_000):
        step += round % 3 != 0
        t = torch.full((64, 33), float(step))
        groups = {"model": {"a": t, "b": t[0]}, "optimizer": {"a/momentum_buffer": -t}}
        store.save(step, groups, {"round": round}, pin="best" if round % 4 == 0 else None)
        print(step, flush=True)
"""


def test_kill_at_random_moments_never_loses_a_checkpoint(tmp_path):
    folder, moments = tmp_path / "ckpt", random.Random(3)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # One warm process forks each victim: importing torch eight times would take most of the time.
    server = textwrap.dedent("""
        import os, sys, torch, safetensors.torch, wsis.engine.checkpoint
        for line in sys.stdin:
            pid = os.fork()
            if pid == 0:
                exec(compile(os.environ["SAVER"], "saver", "exec"))
            print("pid", pid, flush=True)
            os.waitpid(pid, 0)
            print("gone", flush=True)
    """)
    environment["SAVER"] = textwrap.dedent(SAVER)
    server = subprocess.Popen(
        [sys.executable, "-c", server, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        steps_seen = interrupted = 0
        for _ in range(8):
            server.stdin.write("go\n")
            server.stdin.flush()
            pid = int(server.stdout.readline().split()[1])
            acknowledged = int(server.stdout.readline())
            # Saves go on meanwhile (some milliseconds each): the moment is anywhere in one.
            time.sleep(moments.uniform(0.0, 0.1))
            os.kill(pid, signal.SIGKILL)
            for line in iter(server.stdout.readline, "gone\n"):
                acknowledged = int(line)
            store = CheckpointStore(folder)
            loaded, state = store.load(store.latest(), verify=True)
            # Nothing that was reported as saved is lost, and groups belong together.
            assert state["step"] >= acknowledged >= steps_seen
            interrupted += bool(list(folder.glob(".tmp-*")))
            assert torch.equal(loaded["model"]["a"], torch.full((64, 33), float(state["step"])))
            assert torch.equal(loaded["optimizer"]["a/momentum_buffer"], -loaded["model"]["a"])
            assert store.pinned("best") is not None
            store.load(store.pinned("best"), verify=True)
            steps_seen = state["step"]
        assert interrupted > 0  # else no kill fell into a save and nothing was tested
    finally:
        server.kill()
        server.wait()


def test_every_crash_point_leaves_the_previous_or_the_new_checkpoint(tmp_path, monkeypatch):
    """Stop the save before its k-th call to the disk, for every k, as a crash would."""

    class Crash(BaseException):
        pass

    calls = {"left": 10**9}

    def counted(function):
        def call(*args, **kwargs):
            if calls["left"] == 0:
                raise Crash
            calls["left"] -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (Path, "rename"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
        (checkpoint, "save_file"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))

    finished = False
    points = 0
    while not finished:
        folder = tmp_path / str(points)
        store = CheckpointStore(folder, keep=1)
        calls["left"] = 10**9
        store.save(7, groups(7), {"round": 1}, pin="best")
        calls["left"] = points
        try:
            store.save(7, groups(8), {"round": 2}, pin="best")
            finished = True
        except Crash:
            pass
        for path in (store.latest(), store.pinned("best")):
            loaded, state = store.load(path, verify=True)
            assert_equal(loaded, groups(6 + state["round"]))
        calls["left"] = 10**9
        store.save(7, groups(9), {"round": 3}, pin="best")
        assert names(folder) == {"step-7", "last", "best"}
        points += 1
    assert points > 12


def test_everything_is_durable_before_it_is_named(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, groups(1), {})
    events = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def label(path) -> str:
        path = Path(path)
        name = "TMP" if path.name.startswith(".tmp") else path.name
        return name if path.parent == tmp_path or path == tmp_path else f"TMP/{name}"

    def watch(kind, function, describe):
        def call(*args):
            events.append(f"{kind} {describe(*args)}")
            return function(*args)

        return call

    def opened(number):
        return label(os.readlink(f"/proc/self/fd/{number}"))

    monkeypatch.setattr(os, "fsync", watch("fsync", fsync, opened))
    monkeypatch.setattr(Path, "rename", watch("rename", rename, lambda a, b: label(b)))
    monkeypatch.setattr(os, "replace", watch("replace", replace, lambda a, b: label(b)))
    store.save(2, {"model": groups(2)["model"]}, {}, pin="best")
    root = f"fsync {tmp_path.name}"
    assert events == [
        "fsync TMP/model.safetensors",
        "fsync TMP/TMP",  # state.json under its temporary name
        "replace TMP/state.json",
        "fsync TMP",
        "rename step-2",
        root,
        *["fsync TMP", "replace best", root],
        *["fsync TMP", "replace last", root],
    ]


# -- full and read-only disks --------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 10, 300, 40_000, 200_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, limit):
    big = {"model": {"w": torch.zeros(50_000)}, "optimizer": {"w/m": torch.zeros(50_000)}}
    store = CheckpointStore(tmp_path)
    store.save(1, groups(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*step-2.*400000 bytes needed, \d+ by"):
            store.save(2, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == {"step-1", "last"}
    assert_equal(store.load(store.latest(), verify=True)[0], groups(1))
    store.save(2, big, {})
    assert store.latest().name == "step-2"


def test_no_space_for_the_pointer(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, groups(1), {})

    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs.os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        store.save(2, groups(2), {})
    assert not list(tmp_path.glob(".tmp-*"))
    store.load(store.latest(), verify=True)


def test_a_read_only_folder(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "ckpt")
    store.save(1, groups(1), {})
    mkdir = Path.mkdir

    def read_only(self, *args, **kwargs):
        if self.name.startswith(".tmp"):
            raise OSError(30, "Read-only file system")
        mkdir(self, *args, **kwargs)

    # A superuser may write anywhere, so permission bits alone would not test it.
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InputError, match=r"step-2: Read-only file system.*writable disk"):
        store.save(2, groups(2), {})
    assert names(tmp_path / "ckpt") == {"step-1", "last"}


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "ckpt").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*ckpt/step-1"):
        CheckpointStore(tmp_path / "ckpt").save(1, groups(1), {})


# -- weights files -------------------------------------------------------------------------------


def test_weights_round_trip(tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(path, groups(3)["model"], {"recipe": "demo"})
    assert_equal(read_state(path), groups(3)["model"])
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"recipe": "demo"}
    assert names(path.parent) == {"weights.safetensors"}
    with pytest.raises(InputError, match=r"\.safetensors"):
        save_weights(tmp_path / "weights.pth", {}, {})


def test_weights_on_a_full_disk_keep_the_old_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, groups(3)["model"], {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*40000 bytes needed"):
            save_weights(path, {"w": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_equal(read_state(path), groups(3)["model"])
    assert names(tmp_path) == {"weights.safetensors"}


# -- optimiser -----------------------------------------------------------------------------------

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
