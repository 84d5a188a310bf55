from __future__ import annotations

import json
import os
import resource
import shutil

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.engine.checkpoints import assert_equal, groups, names
from wsis.engine.checkpoint import (
    CheckpointStore,
    save_weights,
)
from wsis.errors import InputError
from wsis.models.weights import read_state

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
