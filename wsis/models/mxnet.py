"""Reading MXNet's ``.params`` files without MXNet (the ImageNet weights of WideResNet38).

Layout, little endian: ``uint64 0x112, uint64 0, uint64 n``, n arrays, ``uint64 n``, n names (each
``uint64`` length and bytes). An array is a shape, ``int32`` device type and id, ``int32`` number
type and its values; the three ways to write a shape are in :func:`_read_shape`. Source:
apache/mxnet, src/ndarray/ndarray.cc.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_LIST_MAGIC = 0x112
_SHAPE_64_MAGIC = 0xF993FAC8
_STORAGE_MAGICS = (0xF993FAC9, 0xF993FACA)
_NUMBER_TYPES = dict(enumerate(("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")))


def read_params(path: Path) -> dict[str, Tensor]:
    """The named dense arrays of a ``.params`` file.

    Raises:
        ValueError: not such a file, cut short, or with sparse arrays.
    """
    with path.open("rb") as file:
        magic, _, count = _unpack(file, "<3Q")
        if magic != _LIST_MAGIC:
            raise ValueError("not a .params file of MXNet")
        arrays = [_read_array(file) for _ in range(count)]
        (named,) = _unpack(file, "<Q")
        if named != count:
            raise ValueError(f"{count} arrays but {named} names")
        names = [_take(file, _unpack(file, "<Q")[0]).decode() for _ in range(count)]
    return dict(zip(names, arrays, strict=True))


def _read_array(file: BinaryIO) -> Tensor:
    shape = _read_shape(file)
    if not shape:
        return torch.zeros(0)
    _, _, number_type = _unpack(file, "<3i")
    if number_type not in _NUMBER_TYPES:
        raise ValueError(f"number type {number_type} is unknown")
    dtype = np.dtype(_NUMBER_TYPES[number_type])
    values = np.frombuffer(_take(file, math.prod(shape) * dtype.itemsize), dtype)
    return torch.from_numpy(values.reshape(shape).copy())


def _read_shape(file: BinaryIO) -> tuple[int, ...]:
    """Oldest form: ``uint32`` axes and sizes; later a magic number and ``int64`` sizes."""
    (first,) = _unpack(file, "<I")
    if first in _STORAGE_MAGICS:
        (storage,) = _unpack(file, "<i")
        if storage != 0:
            raise ValueError("sparse arrays are not supported")
    elif first != _SHAPE_64_MAGIC:
        return _unpack(file, f"<{_axes(first)}I")
    (axes,) = _unpack(file, "<I")
    return _unpack(file, f"<{_axes(axes)}q")


def _axes(count: int) -> int:
    if count > 32:
        raise ValueError(f"an array of {count} axes")
    return count


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, _take(file, struct.calcsize(layout)))


def _take(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise ValueError("the file is cut short")
    return content
