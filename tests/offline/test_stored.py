"""Stored maps are read; what else a pickle may hold is refused before it is done."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from wsis.errors import InputError
from wsis.offline.masks import write_mask
from wsis.offline.stored import read_maps

RNG = np.random.default_rng(1)
MAPS = RNG.random((2, 5, 7)).astype(np.float32)


def same(path, keys=(3, 14), maps=MAPS):
    stored = read_maps(path)
    assert stored.keys == keys and stored.labels is None
    assert stored.maps.dtype == np.float32
    np.testing.assert_array_equal(stored.maps, maps)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_plain_arrays(dtype, order, tmp_path):
    array = np.asarray(MAPS, dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    same(tmp_path / "a.npy", (0, 1), array.astype(np.float32))
    np.savez(tmp_path / "a.npz", array)
    same(tmp_path / "a.npz", (0, 1), array.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_dictionaries_of_psa(dtype, tmp_path):
    maps = MAPS.astype(dtype)
    for number, content in enumerate(
        (
            {3: maps[0], 14: maps[1]},
            {np.int64(3): np.asfortranarray(maps[0]), np.int32(14): maps[1]},
            OrderedDict([("3", maps[0]), ("14", maps[1])]),
        )
    ):
        path = tmp_path / f"{number}.npy"
        np.save(path, content)
        same(path, maps=maps.astype(np.float32))
    np.savez(tmp_path / "a.npz", **{"3": maps[0], "14": maps[1]})
    same(tmp_path / "a.npz", maps=maps.astype(np.float32))
    np.save(tmp_path / "empty.npy", {})
    assert read_maps(tmp_path / "empty.npy").keys == ()


@pytest.mark.parametrize("keys", [np.array([3, 14]), torch.tensor([3, 14])])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_dictionaries_of_irn(keys, as_tensor, tmp_path):
    maps = torch.from_numpy(MAPS) if as_tensor else MAPS
    np.save(tmp_path / "a.npy", {"keys": keys, "cam": maps[:, ::2, ::2], "high_res": maps})
    same(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", {"keys": keys, "cam": maps[:, ::2, ::2]})
    same(tmp_path / "a.npy", maps=MAPS[:, ::2, ::2])
    np.save(tmp_path / "a.npy", {"keys": keys[:0], "high_res": maps[:0]})
    assert read_maps(tmp_path / "a.npy").maps.shape == (0, 5, 7)
    np.savez(tmp_path / "a.npz", keys=np.asarray(keys), high_res=np.asarray(maps))
    same(tmp_path / "a.npz")


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(protocol, tmp_path):
    content = np.array({3: MAPS[0], np.int16(14): np.asfortranarray(MAPS[1])}, object)
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": ()}
        )
        pickle.dump(content, file, protocol=protocol)
    same(path)


def test_tensors_that_share_and_stride(tmp_path):
    storage = torch.arange(70, dtype=torch.float32).view(2, 5, 7)
    np.save(tmp_path / "a.npy", {0: storage[1].flip(0), 1: storage[0].t().contiguous().t()})
    same(tmp_path / "a.npy", (0, 1), torch.stack([storage[1].flip(0), storage[0]]).numpy())


def test_labels(tmp_path):
    labels = RNG.integers(0, 21, (5, 7)).astype(np.uint8)
    labels[0] = 255
    write_mask(tmp_path / "a.png", labels, range(1, 255))
    np.save(tmp_path / "b.npy", labels.astype(np.int64))
    for name in ("a.png", "b.npy"):
        stored = read_maps(tmp_path / name)
        np.testing.assert_array_equal(stored.labels, labels)
        assert stored.maps is None


# -- what is refused -----------------------------------------------------------------------------


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def marker():
    raise AssertionError("the pickle was run")


ATTACKS = {
    "os.system": lambda: Calls(os.system, "exit 1"),
    "subprocess": lambda: Calls(subprocess.check_call, [sys.executable, "-V"]),
    "eval": lambda: Calls(eval, "__import__('os').abort()"),
    "getattr": lambda: Calls(getattr, "x", "upper"),
    "own function": lambda: Calls(marker),
    "np.load": lambda: Calls(np.load, "x.npy"),
    "np.fromfile": lambda: Calls(np.fromfile, "/dev/zero"),
    "torch.load": lambda: Calls(torch.load, "x.pt"),
    "exception": lambda: ValueError("x"),
    "nested": lambda: np.array([Calls(os.abort)], object),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("where", ["value", "key", "all", "in an npz"])
def test_pickles_that_want_more(name, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = ATTACKS[name]()
    if where == "key":
        if name == "nested":
            pytest.skip("no dictionary can have this key")
        content = {attack: MAPS[0]}
    else:
        content = attack if where == "all" else {3: attack, 14: MAPS[1]}
    outer = np.empty((), object)
    outer[()] = content
    if where == "in an npz":
        path = tmp_path / "a.npz"
        np.savez(path, outer)
    else:
        path = tmp_path / "a.npy"
        np.save(path, outer)
    with pytest.raises(InputError, match="the pickle wants") as error:
        read_maps(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_storage_is_read_as_weights_only(tmp_path):
    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Calls(os.abort), 2),)

    np.save(tmp_path / "a.npy", {3: Storage()})
    with pytest.raises(InputError, match=r"a\.npy"):
        read_maps(tmp_path / "a.npy")


class Raw:
    """An array whose pickle claims something else than it has."""

    def __init__(self, shape, dtype, data):
        self.state = (1, shape, dtype, False, data)

    def __reduce__(self):
        function, arguments, _ = np.zeros(1).__reduce__()
        return function, arguments, self.state


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (Raw((1000, 1000), np.dtype("f4"), b"1234"), "4 bytes"),
        (Raw((-1, -1), np.dtype("f4"), b"1234"), "4 bytes"),
        (Raw((1,), np.dtype("O"), b"12345678"), "damaged array of objects"),
        (Raw((1,), np.dtype([("a", "O")]), b"12345678"), "dtype|structured"),
        (Raw((1,), np.dtype("V8"), b"12345678"), "dtype"),
        (Raw((1,), np.dtype("U2"), b"12345678"), "dtype"),
    ],
)
def test_arrays_that_lie(raw, message, tmp_path):
    np.save(tmp_path / "a.npy", {3: raw})
    with pytest.raises(InputError, match=message):
        read_maps(tmp_path / "a.npy")


def test_a_tensor_larger_than_its_storage(tmp_path):
    class Tensor:
        def __reduce__(self):
            function, (storage, _, _, _, *rest) = torch.zeros(4).__reduce_ex__(2)
            return function, (storage, 0, (100, 100), (100, 1), *rest)

    np.save(tmp_path / "a.npy", {3: Tensor()})
    with pytest.raises(InputError, match="larger than its storage"):
        read_maps(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 3, 4, 5)), r"\[n, h, w\]"),
        (np.zeros((4, 5)), r"\[n, h, w\]"),
        (np.full((4, 5), 256), "0..255"),
        (np.full((1, 4, 5), np.nan), "finite"),
        (np.zeros((1, 4, 5), "U1"), "numbers"),
        ({"a": MAPS[0]}, "class numbers"),
        ({1: MAPS[0], 2: MAPS[0, 1:]}, "one size"),
        ({1: MAPS}, "one size"),
        ({"keys": [1]}, "'high_res' or 'cam'"),
        ({"keys": [1], "cam": MAPS}, "as many keys"),
        ([1, 2], "array or a dictionary"),
        (None, "array or a dictionary"),
    ],
)
def test_contents_that_are_no_maps(content, message, tmp_path):
    path = tmp_path / "a.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        outer = np.empty((), object)
        outer[()] = content
        np.save(path, outer)
    with pytest.raises(InputError, match=message):
        read_maps(path)


def test_damaged_files(tmp_path):
    np.save(tmp_path / "whole.npy", {3: MAPS[0]})
    np.savez(tmp_path / "whole.npz", MAPS)
    for name in ("whole.npy", "whole.npz"):
        data = (tmp_path / name).read_bytes()
        for cut in (0, 3, 40, 130, len(data) // 2, len(data) - 5):
            path = tmp_path / f"cut{cut}{name[-4:]}"
            path.write_bytes(data[:cut])
            with pytest.raises(InputError, match="cut"):
                read_maps(path)
    with pytest.raises(InputError, match="no such file"):
        read_maps(tmp_path / "absent.npy")
