"""The operators ``torch.ops.wsis.random_walk``, ``pair_affinity`` and ``path_affinity``.

Their documentation and checks are in `wsis.ops.random_walk`; here are shapes, memory, devices, fake
kernels and gradients. ``offsets`` are ``dy, dx`` of each, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wsis.ops._native import _C, cuda_function, num_parts, stream, view

MOST_EXPONENT = 64  # beta beyond which, or if broken, torch computes the power

# 10 million operations take about 100 us on a core, num_parts counts 2^18 for that.
_OPERATIONS_PER_TOUCHED = 40

# What the Chebyshev expansion may leave out, as a share of the largest eigenvalue: below the
# rounding of the sum.
_TAIL = {torch.float32: 1e-9, torch.float64: 1e-17}


@cache
def coefficients(steps: int, tail: float) -> tuple[float, ...]:
    """Of ``z^steps`` in Chebyshev polynomials; empty where that saves nothing.

    ``c_k`` is the chance that a walk of ``steps`` steps of one up or down ends at ``k`` or ``-k``.
    What is left out is at most ``tail``; the rest is scaled to sum to 1, so that what does not
    change in a step does not change at all.
    """
    if steps < 2:
        return ()
    chances = [1.0]  # of ending at 0, 2, 4, ..., relative to the first (steps is even)
    for k in range(0, steps, 2):
        chances.append(chances[-1] * (steps - k) / (steps + k + 2))
        if chances[-1] < tail * 1e-3:
            break
    whole = 2 * sum(chances) - chances[0]
    left, last = 0.0, len(chances) - 1
    while last > 0 and left + 2 * chances[last] <= tail * whole:
        left += 2 * chances[last]
        last -= 1
    if 2 * last > 0.9 * steps:
        return ()
    kept = 2 * sum(chances[: last + 1]) - chances[0]
    found = [0.0] * (2 * last + 1)
    found[0] = chances[0] / kept
    for i in range(1, last + 1):
        found[2 * i] = 2 * chances[i] / kept
    return tuple(found)


def _plan(maps: Tensor, symmetric: bool, steps: int) -> tuple[int, list[float]]:
    """Products with the matrix, and coefficients of their sum or none."""
    found = coefficients(steps, _TAIL[maps.dtype]) if symmetric else ()
    return (len(found) - 1, list(found)) if found else (steps, [])


# ---- random_walk -------------------------------------------------------------------------------


def _walk_cpu(maps: Tensor, affinity: Tensor, result: Tensor, options: Any) -> None:
    offsets, symmetric, transposed, exponent, steps = options
    products, sums = _plan(maps, symmetric, steps)
    operations = maps.numel() * products * (len(offsets) + 1)
    size = _C.random_walk_scratch(*maps.shape, offsets, symmetric)
    _C.random_walk_cpu(
        view(maps),
        view(affinity),
        view(maps.new_empty(size)),
        view(result),
        offsets,
        symmetric,
        transposed,
        exponent,
        products,
        sums,
        num_parts(operations // _OPERATIONS_PER_TOUCHED),
    )


def _walk_cuda(maps: Tensor, affinity: Tensor, result: Tensor, options: Any) -> None:
    offsets, symmetric, transposed, exponent, steps = options
    products, sums = _plan(maps, symmetric, steps)
    cuda_function("random_walk_cuda")(
        *(view(x) for x in (maps, affinity, result)),
        view(torch.empty_like(affinity)),
        view(maps.new_empty([maps.shape[0], *maps.shape[2:]])),
        view(maps.new_empty([2, *maps.shape])),
        offsets,
        symmetric,
        transposed,
        exponent,
        products,
        sums,
        stream(maps),
    )


_walk_into: dict[str, Any] = {"cpu": _walk_cpu, "cuda": _walk_cuda}


def _random_walk(
    maps: Tensor,
    affinity: Tensor,
    offsets: Sequence[int],
    symmetric: bool,
    transposed: bool,
    exponent: int,
    steps: int,
) -> Tensor:
    result = maps.new_empty(maps.shape)
    if result.numel():
        options = (list(offsets), symmetric, transposed, exponent, steps)
        _walk_into[maps.device.type](maps.contiguous(), affinity.contiguous(), result, options)
    return result


# ---- affinities --------------------------------------------------------------------------------


def _planes(like: Tensor, offsets: Sequence[int]) -> list[int]:
    return [like.shape[0], len(offsets) // 2, *like.shape[-2:]]


def _pair_affinity(features: Tensor, offsets: Sequence[int]) -> Tensor:
    affinity = features.new_empty(_planes(features, offsets))
    if affinity.numel():
        arguments = (view(features.contiguous()), view(affinity), list(offsets))
        if features.device.type == "cpu":
            operations = affinity.numel() * features.shape[1]
            _C.pair_affinity_cpu(*arguments, num_parts(operations // _OPERATIONS_PER_TOUCHED))
        else:
            cuda_function("pair_affinity_cuda")(*arguments, stream(features))
    return affinity


def _pair_affinity_backward(
    gradient: Tensor, features: Tensor, affinity: Tensor, offsets: Sequence[int]
) -> Tensor:
    result = features.new_zeros(features.shape)
    if affinity.numel():
        arrays = (gradient.contiguous(), features.contiguous(), affinity.contiguous())
        if features.device.type == "cpu":
            operations = 2 * affinity.numel() * features.shape[1]
            _C.pair_affinity_backward_cpu(
                *(view(x) for x in (*arrays, torch.empty_like(arrays[2]), result)),
                list(offsets),
                num_parts(operations // _OPERATIONS_PER_TOUCHED),
            )
        else:
            cuda_function("pair_affinity_backward_cuda")(
                *(view(x) for x in (*arrays, result)), list(offsets), stream(features)
            )
    return result


def _path_affinity(edge: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    affinity = edge.new_empty(_planes(edge, offsets))
    chosen = torch.empty(affinity.shape, dtype=torch.uint8, device=edge.device)
    if affinity.numel():
        arguments = (*(view(x) for x in (edge.contiguous(), chosen, affinity)), list(offsets))
        if edge.device.type == "cpu":
            _C.path_affinity_cpu(*arguments, num_parts(affinity.numel()))
        else:
            cuda_function("path_affinity_cuda")(*arguments, stream(edge))
    return affinity, chosen


def _path_affinity_backward(gradient: Tensor, chosen: Tensor, offsets: Sequence[int]) -> Tensor:
    result = gradient.new_zeros([gradient.shape[0], *gradient.shape[2:]])
    if gradient.numel():
        arrays = (gradient.contiguous(), chosen.contiguous(), result)
        arguments = (*(view(x) for x in arrays), list(offsets))
        if gradient.device.type == "cpu":
            _C.path_affinity_backward_cpu(*arguments, num_parts(gradient.numel()))
        else:
            cuda_function("path_affinity_backward_cuda")(*arguments, stream(gradient))
    return result


# ---- registration ------------------------------------------------------------------------------

_library = torch.library.Library("wsis", "FRAGMENT")
_SCHEMAS = {
    "random_walk": (
        "(Tensor maps, Tensor affinity, int[] offsets, bool symmetric, bool transposed, "
        "int exponent, int steps) -> Tensor",
        _random_walk,
    ),
    "pair_affinity": ("(Tensor features, int[] offsets) -> Tensor", _pair_affinity),
    "pair_affinity_backward": (
        "(Tensor gradient, Tensor features, Tensor affinity, int[] offsets) -> Tensor",
        _pair_affinity_backward,
    ),
    "path_affinity": ("(Tensor edge, int[] offsets) -> (Tensor, Tensor)", _path_affinity),
    "path_affinity_backward": (
        "(Tensor gradient, Tensor chosen, int[] offsets) -> Tensor",
        _path_affinity_backward,
    ),
}
for _name, (_schema, _function) in _SCHEMAS.items():
    _library.define(_name + _schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _function, _device)


@torch.library.register_fake("wsis::random_walk", lib=_library)
def _(maps: Tensor, *_rest: Any) -> Tensor:
    return maps.new_empty(maps.shape)


@torch.library.register_fake("wsis::pair_affinity", lib=_library)
def _(features: Tensor, offsets: Sequence[int]) -> Tensor:
    return features.new_empty(_planes(features, offsets))


@torch.library.register_fake("wsis::pair_affinity_backward", lib=_library)
def _(gradient: Tensor, features: Tensor, affinity: Tensor, offsets: Sequence[int]) -> Tensor:
    return features.new_empty(features.shape)


@torch.library.register_fake("wsis::path_affinity", lib=_library)
def _(edge: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = _planes(edge, offsets)
    return edge.new_empty(shape), edge.new_empty(shape, dtype=torch.uint8)


@torch.library.register_fake("wsis::path_affinity_backward", lib=_library)
def _(gradient: Tensor, chosen: Tensor, offsets: Sequence[int]) -> Tensor:
    return gradient.new_empty([gradient.shape[0], *gradient.shape[2:]])


def _keep_walk(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    affinity, *ctx.options = inputs[1:]
    ctx.save_for_backward(affinity)


def _walk_back(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (affinity,) = ctx.saved_tensors
    offsets, symmetric, transposed, exponent, steps = ctx.options
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("random_walk has no gradient to the affinity")
    back = torch.ops.wsis.random_walk(
        gradient, affinity, offsets, symmetric, not transposed, exponent, steps
    )
    return back, None, None, None, None, None, None


def _keep_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.offsets = inputs
    ctx.save_for_backward(features, output)


def _pairs_back(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    features, affinity = ctx.saved_tensors
    back = torch.ops.wsis.pair_affinity_backward(gradient, features, affinity, ctx.offsets)
    return back, None


def _keep_paths(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.offsets = inputs[1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _paths_back(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    (chosen,) = ctx.saved_tensors
    return torch.ops.wsis.path_affinity_backward(gradient, chosen, ctx.offsets), None


def _no_second(name: str) -> Any:
    def refuse(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(f"{name} has no second derivative")

    return refuse


torch.library.register_autograd(
    "wsis::random_walk", _walk_back, setup_context=_keep_walk, lib=_library
)
torch.library.register_autograd(
    "wsis::pair_affinity", _pairs_back, setup_context=_keep_pairs, lib=_library
)
torch.library.register_autograd(
    "wsis::path_affinity", _paths_back, setup_context=_keep_paths, lib=_library
)
for _name in ("pair_affinity", "path_affinity"):
    torch.library.register_autograd(f"wsis::{_name}_backward", _no_second(_name), lib=_library)
