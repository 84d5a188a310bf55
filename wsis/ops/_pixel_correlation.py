"""The operators ``torch.ops.wsis.pixel_correlation`` and ``pixel_correlation_backward``.

Their documentation and checks are in `wsis.ops.pixel_correlation`; here are shapes, memory,
devices, fake kernels and gradients.

Sizes: ``M`` feature maps, ``B`` batch, ``C`` class maps, ``D`` features, ``N = h w`` pixels.

``temperature`` 0 means relu. ``saved`` ``[M, B, C + 1, N]`` is what a map gave, before the mean,
and in the last channel what its columns were multiplied with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wsis.ops._native import _C, cuda_function, num_parts, stream, view

LOWEST_TEMPERATURE = 0.02  # exp(-2 / 0.02) is about the smallest weight that float32 can hold

# 10 million operations take about 100 us on a core, num_parts counts 2^18 for that.
_OPERATIONS_PER_TOUCHED = 40


def _options(eps: float, temperature: float, maps: int) -> tuple[int, float, float, float, float]:
    """similarity, eps, sum_eps, inverse, share of the bindings."""
    if temperature > 0:
        return 1, eps, 0.0, 1 / temperature, 1 / maps
    return 0, eps, eps, 1.0, 1 / maps


def _scratch(cams: Tensor, depth: int, backward: bool) -> tuple[Tensor, int]:
    """Memory for a call, and its threads."""
    batch, classes, pixels = cams.shape
    operations = batch * pixels * pixels * (depth + 2 * classes) * (3 if backward else 1)
    parts = num_parts(operations // _OPERATIONS_PER_TOUCHED)
    size = _C.pixel_correlation_scratch(batch, classes, depth, pixels, backward, parts)
    return cams.new_empty(size), parts


def _forward_cpu(cams: Tensor, f: Tensor, saved: Tensor, result: Tensor, options: Any) -> None:
    scratch, parts = _scratch(cams, f.shape[1], False)
    _C.pixel_correlation_cpu(
        view(cams), view(f), view(saved), view(result), view(scratch), *options, parts
    )


def _backward_cpu(
    gradient: Tensor,
    cams: Tensor,
    f: Tensor,
    saved: Tensor,
    cams_gradient: Tensor | None,
    f_gradient: Tensor | None,
    options: Any,
) -> None:
    scratch, parts = _scratch(cams, f.shape[1], True)
    _C.pixel_correlation_backward_cpu(
        view(gradient),
        view(cams),
        view(f),
        view(saved),
        None if cams_gradient is None else view(cams_gradient),
        None if f_gradient is None else view(f_gradient),
        view(scratch),
        *options,
        parts,
    )


def _forward_cuda(cams: Tensor, f: Tensor, saved: Tensor, result: Tensor, options: Any) -> None:
    cuda_function("pixel_correlation_cuda")(
        *(view(x) for x in (cams, f, saved, result, torch.empty_like(f), f.new_empty(_norms(f)))),
        *options,
        stream(cams),
    )


def _backward_cuda(
    gradient: Tensor,
    cams: Tensor,
    f: Tensor,
    saved: Tensor,
    cams_gradient: Tensor | None,
    f_gradient: Tensor | None,
    options: Any,
) -> None:
    batch, classes, pixels = cams.shape
    cuda_function("pixel_correlation_backward_cuda")(
        *(view(x) for x in (gradient, cams, f, saved)),
        None if cams_gradient is None else view(cams_gradient),
        None if f_gradient is None else view(f_gradient),
        view(torch.empty_like(f)),
        view(f.new_empty(_norms(f))),
        view(f.new_empty([batch, 2 * (classes + 1), pixels])),
        *options,
        stream(cams),
    )


def _norms(f: Tensor) -> list[int]:
    return [f.shape[0], f.shape[2]]


_forward_into: dict[str, Any] = {"cpu": _forward_cpu, "cuda": _forward_cuda}
_backward_into: dict[str, Any] = {"cpu": _backward_cpu, "cuda": _backward_cuda}


def _new_saved(cams: Tensor, features: list[Tensor]) -> Tensor:
    batch, classes, pixels = cams.shape
    return cams.new_empty([len(features), batch, classes + 1, pixels])


def _pixel_correlation(
    cams: Tensor, features: list[Tensor], eps: float, temperature: float
) -> tuple[Tensor, Tensor]:
    saved = _new_saved(cams, features)
    result = cams.new_zeros(cams.shape)
    if result.numel():
        cams = cams.contiguous()
        for f, s in zip(features, saved, strict=True):
            options = _options(eps, temperature, len(features))
            _forward_into[cams.device.type](cams, f.contiguous(), s, result, options)
    return result, saved


def _pixel_correlation_backward(
    gradient: Tensor,
    cams: Tensor,
    features: list[Tensor],
    saved: Tensor,
    eps: float,
    temperature: float,
    cams_wanted: bool,
    features_wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    cams_gradient = cams.new_zeros(cams.shape if cams_wanted else [0])
    # without class maps nothing is written
    new = torch.empty if cams.numel() else torch.zeros
    f_gradients = [
        new(f.shape if wanted else [0], dtype=f.dtype, device=f.device)
        for f, wanted in zip(features, features_wanted, strict=True)
    ]
    if not cams.numel():
        return cams_gradient, f_gradients
    gradient, cams, saved = gradient.contiguous(), cams.contiguous(), saved.contiguous()
    for f, wanted, s, f_gradient in zip(features, features_wanted, saved, f_gradients, strict=True):
        if cams_wanted or wanted:
            _backward_into[cams.device.type](
                gradient,
                cams,
                f.contiguous(),
                s,
                cams_gradient if cams_wanted else None,
                f_gradient if wanted else None,
                _options(eps, temperature, len(features)),
            )
    return cams_gradient, f_gradients


# ---- registration ------------------------------------------------------------------------------

_library = torch.library.Library("wsis", "FRAGMENT")
_library.define(
    "pixel_correlation(Tensor cams, Tensor[] features, float eps, float temperature) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "pixel_correlation_backward(Tensor gradient, Tensor cams, Tensor[] features, Tensor saved, "
    "float eps, float temperature, bool cams_wanted, bool[] features_wanted) "
    "-> (Tensor, Tensor[])"
)
for _device in ("CPU", "CUDA"):
    _library.impl("pixel_correlation", _pixel_correlation, _device)
    _library.impl("pixel_correlation_backward", _pixel_correlation_backward, _device)


@torch.library.register_fake("wsis::pixel_correlation", lib=_library)
def _(
    cams: Tensor, features: list[Tensor], eps: float, temperature: float
) -> tuple[Tensor, Tensor]:
    return cams.new_empty(cams.shape), _new_saved(cams, features)


@torch.library.register_fake("wsis::pixel_correlation_backward", lib=_library)
def _(
    gradient: Tensor,
    cams: Tensor,
    features: list[Tensor],
    saved: Tensor,
    eps: float,
    temperature: float,
    cams_wanted: bool,
    features_wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    return cams.new_empty(cams.shape if cams_wanted else [0]), [
        f.new_empty(f.shape if wanted else [0])
        for f, wanted in zip(features, features_wanted, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    cams, features, ctx.eps, ctx.temperature = inputs
    ctx.save_for_backward(cams, output[1], *features)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    cams, saved, *features = ctx.saved_tensors
    cams_wanted, features_wanted = ctx.needs_input_grad[:2]
    cams_gradient, f_gradients = torch.ops.wsis.pixel_correlation_backward(
        gradient, cams, features, saved, ctx.eps, ctx.temperature, cams_wanted, features_wanted
    )
    return (
        cams_gradient if cams_wanted else None,
        [g if wanted else None for g, wanted in zip(f_gradients, features_wanted, strict=True)],
        None,
        None,
    )


def _no_second(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError("pixel_correlation has no second derivative")


torch.library.register_autograd(
    "wsis::pixel_correlation", _backward, setup_context=_keep, lib=_library
)
torch.library.register_autograd("wsis::pixel_correlation_backward", _no_second, lib=_library)
