"""MXNet's .params files, written here byte by byte after its published layout."""

import struct

import numpy as np
import pytest
import torch

from wsis.errors import InputError
from wsis.models.mxnet import read_params
from wsis.models.weights import read_state

ARRAYS = {
    "arg:conv1a_weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "aux:bn7_moving_var": np.linspace(0, 1, 5, dtype=np.float64),
}


def as_bytes(form, arrays=ARRAYS, magic=0x112):
    parts = [struct.pack("<3Q", magic, 0, len(arrays))]
    for array in arrays.values():
        n = array.ndim
        parts.append(
            {
                "oldest": struct.pack(f"<I{n}I", n, *array.shape),
                "shape64": struct.pack(f"<II{n}q", 0xF993FAC8, n, *array.shape),
                "storage": struct.pack(f"<IiI{n}q", 0xF993FAC9, 0, n, *array.shape),
                "sparse": struct.pack(f"<IiI{n}q", 0xF993FAC9, 1, n, *array.shape),
            }[form]
        )
        parts.append(struct.pack("<3i", 1, 0, {"f4": 0, "f8": 1}[array.dtype.str[1:]]))
        parts.append(array.tobytes())
    parts.append(struct.pack("<Q", len(arrays)))
    parts += [struct.pack("<Q", len(name)) + name.encode() for name in arrays]
    return b"".join(parts)


@pytest.mark.parametrize("form", ["oldest", "shape64", "storage"])
def test_every_form_of_shape(form, tmp_path):
    path = tmp_path / "net.params"
    path.write_bytes(as_bytes(form))
    state = read_state(path)
    assert list(state) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert torch.equal(state[name], torch.from_numpy(array))


def test_faults(tmp_path):
    path = tmp_path / "net.params"
    for content, message in (
        (as_bytes("oldest", magic=7), "not a .params file"),
        (as_bytes("oldest")[:-3], "cut short"),
        (as_bytes("sparse"), "sparse"),
        (struct.pack("<3QI", 0x112, 0, 1, 10**9), "1000000000 axes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_params(path)
    with pytest.raises(InputError, match=r"net.params: expected .* cannot be read \(an array of"):
        read_state(path)
