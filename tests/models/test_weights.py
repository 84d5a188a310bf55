"""Weights files are read without running anything that they may carry."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from wsis.errors import InputError
from wsis.models.weights import read_state


class Payload:
    """Runs code when unpickled without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("legacy", [False, True])
def test_plain_torch_files_are_read(tmp_path, wrapper, legacy):
    state = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
    content = state if wrapper is None else {wrapper: state, "epoch": 3}
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    read = read_state(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_a_payload_in_a_torch_file_never_runs(tmp_path, legacy, suffix):
    canary, path = tmp_path / "canary", tmp_path / f"weights{suffix}"
    torch.save(
        {"w": torch.ones(1), "x": Payload(canary)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(InputError, match="cannot be read"):
        read_state(path)
    assert not canary.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".npy", ".bin", ".ckpt", ".safetensors"])
def test_a_bare_pickle_never_runs(tmp_path, suffix):
    canary, path = tmp_path / "canary", tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(InputError) as error:
        read_state(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(InputError, match="no TorchScript"):
        read_state(path)


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {"w": 3}, {1: 2}])
def test_a_torch_file_that_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match="expected"):
        read_state(tmp_path / "x.pth")


def test_a_packed_torch_file_is_refused_unread(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for item in source.infolist():
            bomb.writestr(item.filename, source.read(item))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("the file was read"))
    with pytest.raises(InputError, match="packed"):
        read_state(tmp_path / "bomb.pth")


def test_an_old_torch_is_told_to_upgrade(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(InputError, match=r"torch >= 2\.10, got 2\.9\.1"):
        read_state(tmp_path / "x.pth")


def test_an_absent_file_and_a_truncated_one(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_state(tmp_path / "x.safetensors")
    torch.save({"w": torch.ones(100)}, tmp_path / "x.pth")
    os.truncate(tmp_path / "x.pth", 300)
    with pytest.raises(InputError, match="cannot be read"):
        read_state(tmp_path / "x.pth")
