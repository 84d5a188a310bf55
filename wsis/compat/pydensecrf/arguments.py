"""What the arguments of pydensecrf may be, with its error texts."""

from __future__ import annotations

import multiprocessing
from enum import IntEnum
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np

from wsis.errors import InputError
from wsis.ops._native import num_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Names of the C types, as pydensecrf's messages give them.
_C_NAMES = {
    "?": "bool",
    "b": "signed char",
    "B": "unsigned char",
    "h": "short",
    "H": "unsigned short",
    "i": "int",
    "I": "unsigned int",
    "l": "long",
    "L": "unsigned long",
    "q": "long long",
    "Q": "unsigned long long",
    "f": "float",
    "d": "double",
    "g": "long double",
}


def array(name: str, value: Any, rank: int, dtype: Any = np.float32) -> NDArray[Any]:
    """A buffer of this rank and dtype, read-only or not; never a copy."""
    if value is None:
        raise TypeError(f"Argument '{name}' must not be None")
    found = np.asarray(memoryview(value))
    if found.ndim != rank:
        raise InputError(
            f"Buffer has wrong number of dimensions (expected {rank}, got {found.ndim})"
        )
    wanted = np.dtype(dtype)
    if found.dtype != wanted:
        got = _C_NAMES.get(found.dtype.char, str(found.dtype))
        raise InputError(
            f"Buffer dtype mismatch, expected '{_C_NAMES[wanted.char]}' but got '{got}'"
        )
    if not found.flags.c_contiguous:
        raise InputError("ndarray is not C-contiguous")
    return found


def compatibility(compat: Any, labels: int) -> float | list[Any]:
    """A number, or a vector or matrix as lists."""
    if isinstance(compat, Number):
        weight = float(compat)  # type: ignore[arg-type]
        if not np.isfinite(weight):
            raise InputError(f"compat must be finite, got {weight}")
        return weight
    rank = memoryview(compat).ndim
    if rank not in (1, 2):
        raise InputError("LabelCompatibility of dimension >2 not meaningful.")
    values = array("compat", compat, rank)
    if values.shape != (labels,) * rank:
        raise InputError(
            f"compat must be a number, ({labels},) or {(labels, labels)}, got {values.shape}"
        )
    if not np.isfinite(values).all():
        raise InputError("compat must be finite")
    return values.tolist()


def widths(name: str, given: Any, count: int) -> tuple[float, ...]:
    """The widths along the axes; pydensecrf reads the first ``count`` of a longer sequence."""
    if isinstance(given, (str, bytes)):
        raise TypeError(f"{name} must be a number or numbers, got {type(given).__name__}")
    if isinstance(given, Number):
        given = [given] * count
    values = tuple(float(given[axis]) for axis in range(count))
    if not all(0 < value < float("inf") for value in values):
        shown = values if len(set(values)) > 1 else values[0]
        raise InputError(f"{name} must be positive, got {shown}")
    return values


def integer(value: Any) -> int:
    """As C does with a number: 5.0 is 5."""
    if isinstance(value, (str, bytes)):
        raise TypeError("an integer is required")
    return int(value)


def member(kind: type[IntEnum], name: str, value: Any) -> int:
    """The number of an enumeration's member, given as member or number."""
    try:
        return kind(integer(value))
    except ValueError:
        known = ", ".join(f"{one.value} ({one.name})" for one in kind)
        raise InputError(f"{name} must be one of {known}, got {value}") from None


def threads() -> int:
    """All that may be used; one in a worker process, whose siblings use the others."""
    return 1 if multiprocessing.parent_process() is not None else num_threads()
