"""Checkpoints when the process is killed or the disk refuses."""

from __future__ import annotations

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

from tests.engine.checkpoints import assert_equal, groups, names
from wsis.engine import checkpoint, logs
from wsis.engine.checkpoint import (
    CheckpointStore,
)
from wsis.errors import InputError

ROOT = Path(__file__).parents[2]


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
