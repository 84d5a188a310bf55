"""Reads maps that other projects have stored: arrays, class-keyed dictionaries, label images.

The dictionaries of jiwoon-ahn/psa (``{class: map}``) and jiwoon-ahn/irn (``{"keys", "cam",
"high_res"}``, also with torch tensors) are pickles inside ``.npy`` files. Pickles can run any
program. Here a pickle may name a dozen functions, each of which is replaced by one of this file
that checks what it is given: nothing of the file's choosing is called, not even numpy's own.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from wsis.data.dataset import read_mask
from wsis.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".npy", ".npz", ".png")


@dataclass(frozen=True)
class StoredMaps:
    """Maps of one image as a file holds them.

    Attributes:
        keys: number of each map in the file.
        maps: ``[n, h, w] float32``; None where the file holds labels.
        labels: ``[h, w] uint8``; None where the file holds maps.
    """

    keys: tuple[int, ...] = ()
    maps: NDArray[np.float32] | None = None
    labels: NDArray[np.uint8] | None = None


def read_maps(path: str | Path, *, coarse: bool = False) -> StoredMaps:
    """The maps or labels of one image.

    Args:
        path: ``.png`` (palette or 8-bit grey labels); ``.npy`` or ``.npz`` with a ``[n, h, w]``
            array, a ``[h, w]`` array of integer labels, maps under class numbers, or ``keys`` with
            ``high_res`` (taken where there is one) or ``cam``.
        coarse: take ``cam`` where a dictionary has both: IRN's walk starts from those.

    Raises:
        InputError: no such file, damaged, a pickle that wants more than arrays in a dictionary, or
            arrays that are neither maps nor labels.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(path, {3: np.ones((4, 5), np.float32)})
        >>> read_maps(path).keys, read_maps(path).maps.shape
        ((3,), (1, 4, 5))
    """
    path = Path(path)
    if path.suffix.lower() == ".png":
        return StoredMaps(labels=read_mask(path))
    with _naming(path):
        return _interpret(
            read_content(path), ("cam", "high_res") if coarse else ("high_res", "cam")
        )


def read_content(path: Path) -> Any:
    """What a ``.npy`` or ``.npz`` file holds: an array, or a dictionary of arrays.

    Raises:
        InputError: no such file, damaged, or a pickle that wants more than arrays in a dictionary.
    """
    with _naming(path):
        if path.suffix.lower() != ".npz":
            with open(path, "rb") as file:
                return _read_npy(file)
        content: dict[str, Any] = {}
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    content[name.removesuffix(".npy")] = _read_npy(file)
        return content["arr_0"] if list(content) == ["arr_0"] else content


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file becomes an InputError that names it, once."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{path}: cannot be read as maps ({reason})") from None
    except Exception as error:
        # An unpickler on damaged bytes raises nearly anything: IndexError, AttributeError, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{path}: damaged ({reason})") from None


# -- what the content means ----------------------------------------------------------------------


def _interpret(content: Any, order: tuple[str, str]) -> StoredMaps:
    if isinstance(content, np.ndarray):
        if content.ndim == 2 and content.dtype.kind in "iu":
            if content.size and not 0 <= content.min() <= content.max() <= 255:
                raise InputError("labels must be 0..255")
            return StoredMaps(labels=content.astype(np.uint8))
        if content.ndim != 3:
            raise InputError(f"maps must be [n, h, w], got {list(content.shape)} {content.dtype}")
        return StoredMaps(tuple(range(len(content))), _floats(content))
    if not isinstance(content, Mapping):
        raise InputError(f"expected an array or a dictionary, got {type(content).__name__}")
    if "keys" in content:
        maps = next((content[name] for name in order if name in content), None)
        if maps is None:
            raise InputError("a dictionary with 'keys' must have 'high_res' or 'cam'")
        numbers, array = np.asarray(content["keys"]).reshape(-1).tolist(), np.asarray(maps)
        if array.ndim != 3 or len(array) != len(numbers):
            raise InputError(
                f"maps must be [{len(numbers)}, h, w] for as many keys, got {list(array.shape)}"
            )
        return StoredMaps(tuple(map(_number, numbers)), _floats(array))
    planes = [np.asarray(value) for value in content.values()]
    shapes = sorted({plane.shape for plane in planes})
    if len(shapes) > 1 or any(plane.ndim != 2 for plane in planes):
        raise InputError(f"the maps of a dictionary must be [h, w] of one size, got {shapes}")
    stacked = np.stack([_floats(p) for p in planes]) if planes else np.zeros((0, 1, 1), np.float32)
    return StoredMaps(tuple(_number(key) for key in content), stacked)


def _floats(maps: NDArray[Any]) -> NDArray[np.float32]:
    if maps.dtype.kind not in "fiub":
        raise InputError(f"maps must be numbers, got {maps.dtype}")
    maps = maps.astype(np.float32)
    if not np.isfinite(maps).all():
        raise InputError("maps must be finite, got NaN or infinity")
    return maps


def _number(key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise InputError(f"keys must be class numbers, got {key!r}") from None


# -- .npy files ----------------------------------------------------------------------------------


def _read_npy(file: IO[bytes]) -> Any:
    """An array, or what a 0-d object array holds."""
    data = io.BytesIO(file.read())
    version = np.lib.format.read_magic(data)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f"expected .npy of version 1 or 2, got {version}")
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    _, _, dtype = header(data)
    if dtype.hasobject:
        return _plain(_Unpickler(data, encoding="latin1").load())
    data.seek(0)
    return np.lib.format.read_array(data, allow_pickle=False)


class _Dtype:
    """Stands for ``numpy.dtype``: plain numbers and 'O' only."""

    def __init__(self, code: str, align: Any = False, copy: Any = False) -> None:
        if code not in _CODES:
            raise InputError(f"the pickle holds an array of dtype {code!r}")
        self.code = code
        self.order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise InputError("the pickle holds a structured array")
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        """The dtype of numbers."""
        if self.code[0] == "O":
            raise InputError("the pickle holds objects where numbers are expected")
        return np.dtype(self.code).newbyteorder(self.order)


_CODES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
_CODES |= {"b1", "f2", "f4", "f8", "O8"}


class _Array:
    """Stands for ``numpy.ndarray`` while it is put together."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.code[0] == "O":
            # A list of what the pickle has built: only things of this file and plain Python.
            if not isinstance(data, list) or len(data) != math.prod(shape):
                raise InputError("the pickle holds a damaged array of objects")
            self.value = data[0] if shape == () else data
        else:
            self.value = _from_bytes(data, dtype, shape, "F" if fortran else "C")


def _from_bytes(data: Any, dtype: _Dtype, shape: Any, order: Any = "C") -> NDArray[Any]:
    data = data.encode("latin1") if isinstance(data, str) else bytes(data)
    kind = dtype.numpy()
    sizes = tuple(int(size) for size in shape)
    if min(sizes, default=0) < 0 or math.prod(sizes) * kind.itemsize != len(data):
        raise InputError(f"the pickle holds {len(data)} bytes for an array {list(sizes)} {kind}")
    return np.frombuffer(data, kind).reshape(sizes, order=order)


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return _from_bytes(data, dtype, ()).item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _storage(data: bytes) -> NDArray[Any]:
    """What a torch tensor keeps its numbers in: a checkpoint inside the pickle, read as weights."""
    import torch

    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    dtype = getattr(storage, "dtype", torch.uint8)
    return torch.tensor([], dtype=dtype).set_(storage).numpy()


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or min((*size, *stride), default=0) < 0:
        raise InputError("the pickle holds a damaged tensor")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if last >= storage.size:
        raise InputError("the pickle holds a tensor larger than its storage")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _allowed() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): dict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch.storage", "_load_from_bytes"): _storage,
    }
    functions: dict[str, Callable[..., Any]] = {
        "multiarray._reconstruct": lambda kind, shape, code: _Array(),
        "multiarray.scalar": _scalar,
        "numeric._frombuffer": lambda data, dtype, shape, order: _from_bytes(
            data, dtype, shape, order
        ),
    }
    for name, function in functions.items():
        module, symbol = name.split(".")
        for core in ("numpy.core", "numpy._core"):
            table[f"{core}.{module}", symbol] = function
    for module in ("builtins", "__builtin__"):
        for kind in (dict, str, int):
            table[module, kind.__name__] = kind
    return table


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_allowed` only, and what it hands out for them is this file's own."""

    _table = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._table:
            raise InputError(
                f"the pickle wants {module}.{name}; only arrays in a dictionary are read"
            )
        return self._table[module, name]


def _plain(value: Any) -> Any:
    """Without the stand-ins."""
    if isinstance(value, _Array):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
