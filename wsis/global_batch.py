"""The batch of all data-parallel processes, so that N of them compute what one would.

Most of the method's losses are means over images, which data-parallel training averages by itself.
Prototypes, the best positions of a class and channel dropout look at the whole batch; they go
through here. Without a launch everything is the process's own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(values: Tensor) -> Tensor:
    """``[B, ..]`` of every process as one ``[N B, ..]``, in the order of the processes.

    Args:
        values: of one shape in all processes; on the device that their collectives use.

    Returns:
        The whole batch, without gradient.
    """
    _, processes = place()
    values = values.detach()
    if processes == 1:
        return values
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(processes)]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor of one shape, without gradient, as float."""
    _, processes = place()
    value = value.detach().float()
    if processes > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= processes
    return value


class ChannelDropout(nn.Dropout2d):
    """Drops whole channels in training; the mask is drawn for the whole batch, by all alike.

    The generators of the processes must be in the same state.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, C, h, w]`` float, of this process."""
        rank, processes = place()
        if processes == 1 or not self.training:
            return super().forward(maps)
        batch, channels = maps.shape[:2]
        ones = maps.new_ones(processes * batch, channels, 1, 1)
        return maps * super().forward(ones)[rank * batch : (rank + 1) * batch]
