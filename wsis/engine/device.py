"""Where training runs, and how its memory is kept."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from wsis.engine import distributed
from wsis.errors import InputError

# Numbers of malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def pick_device(name: str) -> torch.device:
    """`auto` takes the process's GPU where there is one; InputError for one that is not there.

    Of several processes each has its own GPU, whichever number was named.
    """
    if name == "auto" or (distributed.world_size() > 1 and name.startswith("cuda")):
        return distributed.default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device '{name}' cannot be used here: {str(error).splitlines()[0]}; use --device cpu"
        ) from error


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of returning it to the system after every tensor.

    A step on the CPU frees and takes the same hundreds of megabytes; without this every large
    tensor costs page faults, 12 % of a step of EfficientNet-Lite0. Elsewhere it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)
