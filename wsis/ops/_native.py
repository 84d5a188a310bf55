"""How arrays, threads and streams reach ``wsis._C``. Shared by all operators; torch is optional."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wsis import _C

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "_C",
    "cuda_function",
    "is_tensor",
    "num_parts",
    "num_threads",
    "prefer_huge_pages",
    "stream",
    "view",
]

# A thread of its own costs about 20 us to start; below about 100 us of work it does not pay.
_TOUCHED_PER_THREAD = 1 << 18


def is_tensor(array: object) -> bool:
    """Whether this is a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def view(array: Any) -> Any:
    """The array as ``wsis._C`` takes it, without a copy.

    Args:
        array: a torch tensor on the CPU or CUDA, a numpy array (read-only or not), or anything with
            ``__dlpack__``; any shape and dtype.

    Returns:
        For tensors a DLPack capsule of the detached tensor, made without stream synchronisation;
        else the array itself, whose buffer or ``__dlpack__`` is read natively.
    """
    if not is_tensor(array):
        return array
    dlpack: ModuleType = sys.modules["torch"].utils.dlpack
    return dlpack.to_dlpack(array.detach())


def num_threads() -> int:
    """Threads an operator may use: torch's setting where torch is loaded, else the cores we own."""
    if torch := sys.modules.get("torch"):
        return torch.get_num_threads()
    if wish := os.environ.get("OMP_NUM_THREADS", "").split(",")[0]:
        return max(1, int(wish))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_parts(touched: int) -> int:
    """In how many parts, one thread each, to cut a call that touches this many elements."""
    return max(1, min(num_threads(), touched // _TOUCHED_PER_THREAD))


def prefer_huge_pages(tensor: Tensor) -> None:
    """Asks the system for pages of 2 MiB for a large new tensor, before it is written.

    See csrc/cpu/memory.h. Nothing happens off the CPU, or where the system has none to give.

    Args:
        tensor: contiguous float32 or float64; its values are not touched.
    """
    if tensor.device.type == "cpu":
        _C.prefer_huge_pages(view(tensor))


def cuda_function(name: str) -> Any:
    """A CUDA entry of ``wsis._C``.

    Raises:
        RuntimeError: the module was built without CUDA.
    """
    function = getattr(_C, name, None)
    if function is None:
        reason = _C.build_info().get("cpu_only_because", "unknown")
        raise RuntimeError(
            f"wsis was built for the CPU only ({reason}), got a CUDA tensor; reinstall it with "
            "WSIS_CUDA=1 pip install . where nvcc is found"
        )
    return function


def stream(tensor: Tensor) -> int:
    """The current CUDA stream of the tensor's device, as the integer that ``wsis._C`` takes."""
    return sys.modules["torch"].cuda.current_stream(tensor.device).cuda_stream
