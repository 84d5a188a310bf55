"""Data-parallel processes started by torchrun; every function also works without a launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsis.engine.launch import end_with_parent
from wsis.errors import InputError

T = TypeVar("T")

_ROUND = 64  # results of each process between two meetings
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def default_device() -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def session(device: str = "auto", *, timeout: float = 600.0) -> Iterator[torch.device]:
    """Belong to the processes that torchrun started (nccl on GPUs, gloo on CPUs).

    When a rank dies torchrun ends the others, and when torchrun dies they end too; besides, a
    collective that waits longer than ``timeout`` fails. So work that one rank does alone
    (validation, saving) must stay below it.
    The group is not taken down after an error: with nccl that would wait for the other ranks.

    Args:
        device: ``"auto"`` (CUDA where available) or a torch device name.
        timeout: seconds a collective may wait; 600 is torch's own default for nccl.

    Yields:
        The device of this process. Without a launch nothing else happens.

    Raises:
        InputError: no such device, a launch variable is missing, or there are fewer GPUs than
            processes here.
    """
    try:
        wanted = default_device() if device == "auto" else torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"device '{device}' is none of torch's; use --device auto, cpu or cuda"
        ) from error
    kind = wanted.type
    if not launched():
        yield wanted
        return
    missing = [name for name in _LAUNCH if name not in os.environ]
    if missing:
        raise InputError(
            f"RANK is set but {', '.join(missing)} is not; launch with torchrun, or unset RANK"
        )
    end_with_parent()
    backend = "gloo"
    if kind == "cuda":
        backend, local, found = "nccl", int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise InputError(
                f"process {local} of this machine needs its own GPU, found {found}; "
                "lower torchrun's --nproc-per-node"
            )
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield default_device() if kind == "cuda" else torch.device(kind)
    # Together: gloo aborts a process whose peer has closed its sockets before it.
    dist.barrier()
    dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def rank() -> int:
    """Number of this process, 0 without a launch."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Number of processes, 1 without a launch."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def _device() -> torch.device:
    """Where the tensors of a collective must lie."""
    return default_device() if dist.get_backend() == "nccl" else torch.device("cpu")


def mean_values(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over processes of named scalars, in float64; the host waits for the device once.

    Args:
        values: ``[]`` each, on the device of this process; the same names in every process.
    """
    packed = torch.stack([value.detach().double() for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(packed)
        packed /= world_size()
    return dict(zip(values, packed.tolist(), strict=True))


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes of a tensor of one shape, on the CPU; may be the same memory.

    Integers stay integers: their sum is exact.
    """
    if world_size() == 1:
        return values
    summed = values.to(_device())
    dist.all_reduce(summed)
    return summed.cpu()


def from_main(make: Callable[[], T]) -> T:
    """What the main process makes, in every process; the others do not call `make`."""
    if world_size() == 1:
        return make()
    made = [make() if is_main() else None]
    dist.broadcast_object_list(made, device=_device())
    return cast("T", made[0])


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of a list: every item is one process's."""
    return items[rank() :: world_size()]


def in_order(own: Iterable[T], total: int) -> Generator[T, None, None]:
    """Results for a whole list, in its order and in every process, from those of each `share`.

    The processes meet every 64 results and exchange them, so that none waits long for another at
    the end, and no process keeps more than one round of results. All must consume all.

    Args:
        own: this process's results, one for each item of its `share`; small, as they are pickled.
        total: length of the whole list.
    """
    if world_size() == 1:
        yield from own
        return
    source = iter(own)
    for _ in range(0, total, _ROUND * world_size()):
        parts = gather_objects(list(islice(source, _ROUND)))
        for k in range(len(parts[0])):
            yield from (part[k] for part in parts if k < len(part))


def gather_objects(value: T) -> list[T]:
    """What every process has, by rank, in all of them; small things only, they are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def meet() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all of them stop at the same step."""
    if world_size() == 1:
        return flag
    packed = torch.tensor([float(flag)], device=_device())
    dist.all_reduce(packed, dist.ReduceOp.MAX)
    return bool(packed.item())


def wrap_ddp(model: nn.Module, *, find_unused: bool = False) -> nn.Module:
    """The model in DistributedDataParallel, or itself where there is one process only.

    Buffers are not broadcast: frozen norms need no broadcast, and one between two forward passes of
    a step changes in place what the first pass saved for its backward.

    Args:
        model: on the device of this process.
        find_unused: some trainable parameters get no gradient in some steps. Then the forward of
            ``model`` must be called once per step: DDP looks for the unused ones in each call.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=find_unused
    )


def synced(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Context of one accumulated part: gradients travel between processes after the last only."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
