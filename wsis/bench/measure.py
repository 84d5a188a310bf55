"""Time and peak memory of a call on a device."""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """What a call cost.

    Attributes:
        seconds: median over its calls.
        peak_mib: memory above what was held before, of the process or of the GPU; None where the
            system does not tell.
    """

    seconds: float
    peak_mib: float | None


def measure(call: Callable[[], Any], device: torch.device, *, budget: float = 2.0) -> Measured:
    """Time a call after one that is not counted, 3 to 20 times within `budget` seconds.

    Example:
        >>> measure(lambda: sum(range(1000)), torch.device("cpu"), budget=0.1).seconds > 0
        True
    """
    peak = _peak(call, device)  # the first call
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 20):
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
        if len(times) == 1 and times[0] > budget:
            break
    return Measured(median(times), peak)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(call: Callable[[], Any], device: torch.device) -> float | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    _trim()
    try:
        _RESET.write_text("5")  # the largest resident set starts from now
        resident = _resident("VmRSS")
    except OSError:
        call()
        return None
    call()
    return max(0.0, (_resident("VmHWM") - resident) / 2**10)


def _trim() -> None:
    """Give back what earlier calls have freed, which else would hide what this one takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return float(found[1])
