"""Where training runs."""

from __future__ import annotations

import torch

from wsis.engine import distributed
from wsis.errors import InputError


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
