"""The operators ``torch.ops.wsis.local_affinity_packed``, ``propagate`` and ``local_refine``.

Their documentation and checks are in `wsis.ops.local_affinity`; here are shapes, memory, devices,
fake kernels and gradients.

``packed`` are weights in the layout of the device: ``[B, H, ceil(W / 16), P, 16]`` on the CPU,
where 16 pixels of a row lie side by side, ``[B, P / 4, H, W, 4]`` on CUDA.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from wsis.ops._native import _C, cuda_function, num_parts, stream, view

Kind = Literal["pamr", "par", "varm"]
KINDS: tuple[str, ...] = get_args(Kind)  # in the order of csrc/kernels/local_affinity.h

DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
MOST_DILATIONS = 64  # csrc/kernels/local_affinity.h
TILE = 16  # csrc/cpu/local_affinity.h
FAST_DILATIONS = 6  # csrc/cuda/local_affinity.h
POSITION_SHARE = 0.01  # of PAR's second softmax; rulixiang/afa wetr/PAR.py

# local_refine takes images in groups whose weights stay below this, or one by one. On the CPU the
# weights of small images then stay in the last-level cache, from which every iteration reads them.
# On CUDA an image that exceeds it alone has its weights computed again in every iteration.
_PACKED_BYTES = {"cpu": 16 << 20, "cuda": 2 << 30}


def packed_shape(batch: int, taps: int, height: int, width: int, device: str) -> list[int]:
    """Shape of packed weights."""
    if device == "cuda":
        return [batch, taps // 4, height, width, 4]
    return [batch, height, -(-width // TILE), taps, TILE]


def position_weights(dilations: list[int]) -> list[float]:
    """PAR's softmax over distances, ``[P]``, sum 1."""
    distance = [d * math.hypot(dy, dx) for d in dilations for dy, dx in DIRECTIONS]
    mean = sum(distance) / len(distance)
    sigma = math.sqrt(sum((d - mean) ** 2 for d in distance) / (len(distance) - 1))
    logits = [-((d / (sigma + 1e-8) / 0.3) ** 2) for d in distance]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def _new_packed(image: Tensor, dilations: list[int]) -> Tensor:
    batch, _, height, width = image.shape
    taps = 8 * len(dilations)
    return image.new_empty(packed_shape(batch, taps, height, width, image.device.type))


def _position(kind: str, dilations: list[int]) -> list[float]:
    """What PAR adds to the weights, ``[P]``; nothing for the others."""
    if kind != "par":
        return []
    return [POSITION_SHARE * weight for weight in position_weights(dilations)]


def _weigh_cpu(image: Tensor, kind: str, dilations: list[int], packed: Tensor) -> None:
    """Fills ``packed``."""
    batch, channels, height, width = image.shape
    size = _C.local_affinity_padded_size(batch * channels, height, width, dilations)
    _C.local_affinity_cpu(
        view(image.contiguous()),
        view(packed),
        view(image.new_empty(size)),
        KINDS.index(kind),
        dilations,
        _position(kind, dilations),
        num_parts(packed.numel() // 4),
    )


def _propagate_cpu(
    masks: Tensor,
    packed: Tensor,
    counts: Tensor | None,
    dilations: list[int],
    iterations: int,
    transposed: bool,
    result: Tensor,
) -> None:
    """Fills ``result``."""
    _, planes, height, width = masks.shape
    parts = num_parts(planes * height * width * len(dilations) // 2)
    size = _C.propagate_scratch_size(planes, height, width, dilations, transposed, parts)
    _C.propagate_cpu(
        view(masks.contiguous()),
        view(packed.contiguous()),
        None if counts is None else view(counts.contiguous()),
        view(result),
        view(masks.new_empty(size)),
        dilations,
        iterations,
        transposed,
        parts,
    )


def _weigh_cuda(image: Tensor, kind: str, dilations: list[int], packed: Tensor | None) -> Tensor:
    """Fills ``packed``; returns the stats that `_propagate_lean_cuda` takes."""
    kernel = cuda_function("local_affinity_cuda")
    batch, channels, height, width = image.shape
    needed = packed is None or len(dilations) != FAST_DILATIONS or image.dtype != torch.float32
    stats = image.new_empty([batch, channels + 4, height, width] if needed else [0])
    kernel(
        view(image.contiguous()),
        None if packed is None else view(packed),
        view(stats) if needed else None,
        KINDS.index(kind),
        dilations,
        _position(kind, dilations),
        stream(image),
    )
    return stats


def _keep_counted(masks: Tensor, counts: Tensor | None, result: Tensor) -> None:
    """The result of no iteration."""
    result.copy_(masks)
    if counts is not None:
        planes = torch.arange(masks.shape[1], device=masks.device)
        result.masked_fill_((planes >= counts[:, None])[..., None, None], 0)


def _propagate_cuda(
    masks: Tensor,
    packed: Tensor,
    counts: Tensor | None,
    dilations: list[int],
    iterations: int,
    transposed: bool,
    result: Tensor,
) -> None:
    """Fills ``result``."""
    if iterations == 0:
        return _keep_counted(masks, counts, result)
    packed = packed.contiguous()
    if packed.data_ptr() % 16:  # a view; four weights are read at once
        packed = packed.clone()
    cuda_function("propagate_cuda")(
        view(masks.contiguous()),
        view(packed),
        None if counts is None else view(counts.contiguous()),
        view(result),
        view(torch.empty_like(result)),
        dilations,
        iterations,
        transposed,
        stream(masks),
    )


def _refine_lean_cuda(
    image: Tensor,
    masks: Tensor,
    counts: Tensor | None,
    kind: str,
    dilations: list[int],
    iterations: int,
    transposed: bool,
    result: Tensor,
) -> None:
    """Fills ``result`` without packed weights, computing them again in every iteration."""
    if iterations == 0:
        return _keep_counted(masks, counts, result)
    image = image.to(masks.dtype).contiguous()
    cuda_function("propagate_lean_cuda")(
        view(masks.contiguous()),
        view(image),
        view(_weigh_cuda(image, kind, dilations, None)),
        None if counts is None else view(counts.contiguous()),
        view(result),
        view(torch.empty_like(result)),
        KINDS.index(kind),
        dilations,
        _position(kind, dilations),
        iterations,
        transposed,
        stream(masks),
    )


_weigh: dict[str, Any] = {"cpu": _weigh_cpu, "cuda": _weigh_cuda}
_propagate_into: dict[str, Any] = {"cpu": _propagate_cpu, "cuda": _propagate_cuda}


def _like(masks: Tensor) -> Tensor:
    return torch.empty_like(masks, memory_format=torch.contiguous_format)


def _local_affinity_packed(image: Tensor, kind: str, dilations: list[int]) -> Tensor:
    packed = _new_packed(image, dilations)
    if packed.numel():
        _weigh[image.device.type](image, kind, dilations, packed)
    return packed


def _propagate(masks: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    result = _like(masks)
    if result.numel():
        _propagate_into[masks.device.type](masks, packed, *rest, result)
    return result


def _local_refine(
    image: Tensor,
    masks: Tensor,
    counts: Tensor | None,
    kind: str,
    dilations: list[int],
    iterations: int,
    transposed: bool,
) -> Tensor:
    device = image.device.type
    result = _like(masks)
    if not result.numel():
        return result
    one = 8 * len(dilations) * image.shape[-2] * image.shape[-1] * image.element_size()
    if device == "cuda" and one > _PACKED_BYTES[device]:
        _refine_lean_cuda(image, masks, counts, kind, dilations, iterations, transposed, result)
        return result
    group = max(1, _PACKED_BYTES[device] // one)
    packed = _new_packed(image[:group], dilations)
    for first in range(0, image.shape[0], group):
        some = slice(first, first + group)
        weights = packed[: image[some].shape[0]]
        _weigh[device](image[some], kind, dilations, weights)
        _propagate_into[device](
            masks[some],
            weights.to(masks.dtype),
            None if counts is None else counts[some],
            dilations,
            iterations,
            transposed,
            result[some],
        )
    return result


# ---- registration ------------------------------------------------------------------------------

_library = torch.library.Library("wsis", "FRAGMENT")
_library.define("local_affinity_packed(Tensor image, str kind, int[] dilations) -> Tensor")
_library.define(
    "propagate(Tensor masks, Tensor packed, Tensor? counts, int[] dilations, int iterations, "
    "bool transposed) -> Tensor"
)
_library.define(
    "local_refine(Tensor image, Tensor masks, Tensor? counts, str kind, int[] dilations, "
    "int iterations, bool transposed) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _library.impl("local_affinity_packed", _local_affinity_packed, _device)
    _library.impl("propagate", _propagate, _device)
    _library.impl("local_refine", _local_refine, _device)


@torch.library.register_fake("wsis::local_affinity_packed", lib=_library)
def _(image: Tensor, kind: str, dilations: list[int]) -> Tensor:
    return _new_packed(image, dilations)


@torch.library.register_fake("wsis::propagate", lib=_library)
def _(masks: Tensor, *rest: Any) -> Tensor:
    return _like(masks)


@torch.library.register_fake("wsis::local_refine", lib=_library)
def _(image: Tensor, masks: Tensor, *rest: Any) -> Tensor:
    return _like(masks)


# Propagation is linear in the masks: its gradient is the transposed propagation of the gradient,
# whose gradient is the plain one again. Nothing but the weights' source is kept.


def _keep_propagate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, counts, *ctx.rest = inputs
    ctx.save_for_backward(packed, counts)


def _propagate_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    packed, counts = ctx.saved_tensors
    dilations, iterations, transposed = ctx.rest
    masks = torch.ops.wsis.propagate(
        gradient, packed, counts, dilations, iterations, not transposed
    )
    return masks, None, None, None, None, None


def _keep_refine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, _, counts, *ctx.rest = inputs
    ctx.save_for_backward(image, counts)


def _refine_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    image, counts = ctx.saved_tensors
    kind, dilations, iterations, transposed = ctx.rest
    masks = torch.ops.wsis.local_refine(
        image, gradient, counts, kind, dilations, iterations, not transposed
    )
    return None, masks, None, None, None, None, None


torch.library.register_autograd(
    "wsis::propagate", _propagate_backward, setup_context=_keep_propagate, lib=_library
)
torch.library.register_autograd(
    "wsis::local_refine", _refine_backward, setup_context=_keep_refine, lib=_library
)
