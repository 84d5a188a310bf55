"""The norms inside RTC's losses, differentiable: class activation maps to scores in [0, 1].

Sizes: ``B`` batch, ``K`` foreground classes, ``C = K + 1`` with background at 0, ``h w`` grid.
All functions compute in float32 for half inputs and keep float32 and float64 as they are. A map
with a value that is not finite becomes NaN as a whole, as does its loss. There is no second
derivative.

Behind them is ``torch.ops.wsis.norm_planes``: extrema of each map, then its scores, forward and
backward in two passes over memory each, on CPU and CUDA. Results do not depend on threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from wsis.errors import InputError
from wsis.ops._native import _C, cuda_function, num_parts, stream, view

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-5  # added to every maximum; PSA, SEAM, IRN, AFA, ToCo, SIPE and RTC agree on it

# Codes of csrc/kernels/normalize.h.
NORMS = {"over_max": 0, "shifted": 1, "over_range": 2, "dead_zone": 3, "seed": 4}
BACKGROUNDS = {"constant": 0, "power": 1, "complement": 2}


def as_float(x: Tensor) -> Tensor:
    """``x`` itself when float32 or float64, else (half, bfloat16, integers) as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def max_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """Min-max normalisation of positive evidence, RTC's training norm (ChunyanWang1/RTC).

    ``M(p) = [ [p]+ - min - eps ]+ / (max - min + eps)``, minimum and maximum over the map after
    the ReLU. Differentiable; the gradient also flows through the minimum and the maximum, to the
    first position that attains them.

    Args:
        x: ``[..., h, w]`` float, any range.
        eps: dead zone and guard of the division.

    Returns:
        ``[..., h, w]`` float in [0, 1].

    Raises:
        InputError: fewer than two axes, or empty maps.

    Example:
        >>> max_norm(torch.tensor([[-1.0, 0.0], [1.0, 2.0]])).round(decimals=2)
        tensor([[0.0000, 0.0000],
                [0.5000, 1.0000]])
    """
    maps = as_float(x)
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise InputError(f"x must be [..., h, w] with h, w >= 1, got {list(maps.shape)}")
    planes = maps.reshape(1, maps.shape[:-2].numel(), *maps.shape[-2:])
    return torch.ops.wsis.norm_planes(planes, "max_norm", eps, 0.0)[0].reshape(maps.shape)


def seed_scores(cams: Tensor, eps: float = EPS) -> Tensor:
    """Seed of cross-representation refinement, with background (ChunyanWang1/RTC).

    ``a = [[A]+ - eps]+ / (max_hw [A]+ + eps)`` and ``a_0 = 1 - max_c a_c``. Differentiable; classes
    that tie for the largest score share the gradient of the background.

    Args:
        cams: ``[B, K, h, w]`` float, raw class activation maps, K >= 1.
        eps: dead zone and guard of the division.

    Returns:
        ``[B, C, h, w]`` float in [0, 1], before the one-hot maximum.

    Raises:
        InputError: another rank, or empty maps.

    Example:
        >>> seed_scores(torch.rand(2, 20, 7, 5)).shape
        torch.Size([2, 21, 7, 5])
    """
    maps = _batched("cams", "[B, K, h, w]", cams)
    return torch.ops.wsis.norm_planes(maps, "seed", eps, 0.0)[0]


def ctr_scores(refined: Tensor, background: float = 0.2, clamp: bool = False) -> Tensor:
    """Scores that rank the positions of cross-transform regularisation (ChunyanWang1/RTC).

    ``r = [R]+``; ``r < min + eps`` becomes 0; ``S = (r - min - eps) / (max - min + eps)`` per image
    and class; ``S_0`` is a constant. Empty positions thus get a small negative value and an
    all-zero map gets -1, unless ``clamp``. Differentiable.

    Args:
        refined: ``[B, C, h, w]`` float, refined CAM with background in channel 0 (not read).
        background: constant of channel 0, 0.2 in RTC's training.
        clamp: raise negative scores to 0.

    Returns:
        ``[B, C, h, w]`` float, at most 1.

    Raises:
        InputError: another rank, or empty maps.

    Example:
        >>> ctr_scores(torch.zeros(1, 2, 1, 1)).flatten()
        tensor([ 0.2000, -1.0000])
    """
    maps = _batched("refined", "[B, C, h, w]", refined)
    kind = "ctr_clamped" if clamp else "ctr"
    return torch.ops.wsis.norm_planes(maps, kind, EPS, background)[0]


def one_hot_max(scores: Tensor) -> Tensor:
    """Keep background and, at each pixel, the largest foreground channel; zero elsewhere.

    Channels that tie for the largest value are all kept. A pure function: the input is not changed.

    Args:
        scores: ``[B, C, h, w]`` float, background in channel 0.

    Returns:
        ``[B, C, h, w]``, same dtype; the gradient passes where the value was kept.

    Example:
        >>> one_hot_max(torch.tensor([0.1, 0.5, 0.2]).view(1, 3, 1, 1)).flatten()
        tensor([0.1000, 0.5000, 0.0000])
    """
    foreground = scores[:, 1:]
    largest = foreground.detach() == foreground.detach().amax(dim=1, keepdim=True)
    return torch.cat([scores[:, :1], foreground * largest], dim=1)


def _batched(name: str, layout: str, maps: Tensor) -> Tensor:
    maps = as_float(maps)
    if maps.ndim != 4 or 0 in maps.shape[1:]:
        raise InputError(
            f"{name} must be {layout} with no axis but B empty, got {list(maps.shape)}"
        )
    return maps


# ---- torch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """A norm, and where the background channel is.

    ``skip_in`` channels of the maps and ``skip_out`` of the scores come before the classes.
    """

    norm: str
    skip_in: int = 0
    skip_out: int = 0
    background: str | None = None


_KINDS = {
    "max_norm": _Kind("dead_zone"),
    "seed": _Kind("seed", 0, 1, "complement"),
    "ctr": _Kind("shifted", 1, 1, "constant"),
    "ctr_clamped": _Kind("dead_zone", 1, 1, "constant"),
}


def _flat(maps: Tensor) -> Tensor:
    """``[B, C, h, w] -> [B, C, n]``, contiguous."""
    return maps.contiguous().flatten(2)


def _planes_parts(maps: Tensor) -> int:
    return max(1, min(num_parts(maps.numel()), maps.shape[0] * maps.shape[1]))


def _new_scores(maps: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Scores ``[B, skip_out + K, h, w]`` and extrema ``[B, K, 2]``, uninitialised."""
    rule, (batch, channels, height, width) = _KINDS[kind], maps.shape
    classes = channels - rule.skip_in
    scores = maps.new_empty(batch, rule.skip_out + classes, height, width)
    return scores, maps.new_empty(batch, classes, 2)


def _norm_planes_cpu(
    maps: Tensor, kind: str, eps: float, background: float
) -> tuple[Tensor, Tensor]:
    rule, (scores, extrema) = _KINDS[kind], _new_scores(maps, kind)
    if scores.numel() == 0:
        return scores, extrema
    scores_n, parts = scores.flatten(2), _planes_parts(maps)
    _C.norm_planes_cpu(
        *map(view, (_flat(maps), scores_n, extrema)),
        *(rule.skip_in, rule.skip_out, NORMS[rule.norm], eps, parts),
    )
    if rule.background:
        code = BACKGROUNDS[rule.background]
        _C.add_background_cpu(view(scores_n), None, code, background, 0.0, parts)
    return scores, extrema


def _norm_planes_cuda(
    maps: Tensor, kind: str, eps: float, background: float
) -> tuple[Tensor, Tensor]:
    kernel, rule = cuda_function("norm_planes_cuda"), _KINDS[kind]
    scores, extrema = _new_scores(maps, kind)
    if scores.numel() == 0:
        return scores, extrema
    maps_n, scores_n, queue = _flat(maps), scores.flatten(2), stream(maps)
    partial = maps.new_empty(extrema.shape[:2].numel(), _C.norm_planes_chunks(maps_n.shape[2]), 2)
    kernel(
        *map(view, (maps_n, partial, scores_n, extrema)),
        *(rule.skip_in, rule.skip_out, NORMS[rule.norm], eps, queue),
    )
    if rule.background:
        code = BACKGROUNDS[rule.background]
        _C.add_background_cuda(view(scores_n), None, code, background, 0.0, queue)
    return scores, extrema


def _new_gradient(maps: Tensor, kind: str) -> Tensor:
    gradient = torch.empty_like(maps, memory_format=torch.contiguous_format)
    if _KINDS[kind].skip_in:
        gradient[:, :1] = 0
    return gradient


def _norm_planes_backward_cpu(
    grad: Tensor, maps: Tensor, extrema: Tensor, scores: Tensor | None, kind: str, eps: float
) -> Tensor:
    rule, gradient = _KINDS[kind], _new_gradient(maps, kind)
    if gradient.numel() == 0:
        return gradient
    grad_n, gradient_n, parts = _flat(grad), gradient.flatten(2), _planes_parts(maps)
    skip_out = rule.skip_out
    if scores is not None:
        _C.share_background_cpu(*map(view, (grad_n, _flat(scores), gradient_n)), parts)
        grad_n, skip_out = gradient_n, 0
    _C.norm_planes_backward_cpu(
        *map(view, (grad_n, _flat(maps), extrema, gradient_n)),
        *(rule.skip_in, skip_out, NORMS[rule.norm], eps, parts),
    )
    return gradient


def _norm_planes_backward_cuda(
    grad: Tensor, maps: Tensor, extrema: Tensor, scores: Tensor | None, kind: str, eps: float
) -> Tensor:
    kernel, rule = cuda_function("norm_planes_backward_cuda"), _KINDS[kind]
    gradient, queue = _new_gradient(maps, kind), stream(maps)
    if gradient.numel() == 0:
        return gradient
    maps_n, grad_n, gradient_n = _flat(maps), _flat(grad), gradient.flatten(2)
    skip_out = rule.skip_out
    if scores is not None:
        _C.share_background_cuda(*map(view, (grad_n, _flat(scores), gradient_n)), queue)
        grad_n, skip_out = gradient_n, 0
    shape = (extrema.shape[:2].numel(), _C.norm_planes_chunks(maps_n.shape[2]), 2)
    partial, positions = maps.new_empty(shape), maps.new_empty(shape, dtype=torch.int32)
    kernel(
        *map(view, (grad_n, maps_n, extrema, partial, positions, gradient_n)),
        *(rule.skip_in, skip_out, NORMS[rule.norm], eps, queue),
    )
    return gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    maps, ctx.kind, ctx.eps, _ = inputs
    scores, extrema = output
    ctx.mark_non_differentiable(extrema)
    ctx.save_for_backward(maps, extrema, scores if ctx.kind == "seed" else None)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    maps, extrema, scores = ctx.saved_tensors
    gradient = torch.ops.wsis.norm_planes_backward(grad, maps, extrema, scores, ctx.kind, ctx.eps)
    return gradient, None, None, None


def _no_second_derivative(ctx: Any, grad: Tensor) -> Any:
    raise NotImplementedError("max_norm, seed_scores and ctr_scores have no second derivative")


def _register() -> Any:
    library = torch.library.Library("wsis", "FRAGMENT")
    library.define(
        "norm_planes(Tensor maps, str kind, float eps, float background) -> (Tensor, Tensor)"
    )
    library.define(
        "norm_planes_backward(Tensor grad, Tensor maps, Tensor extrema, Tensor? scores, str kind, "
        "float eps) -> Tensor"
    )
    library.impl("norm_planes", _norm_planes_cpu, "CPU")
    library.impl("norm_planes", _norm_planes_cuda, "CUDA")
    library.impl("norm_planes_backward", _norm_planes_backward_cpu, "CPU")
    library.impl("norm_planes_backward", _norm_planes_backward_cuda, "CUDA")
    fake = torch.library.register_fake
    fake("wsis::norm_planes", lambda maps, kind, eps, background: _new_scores(maps, kind),
         lib=library)  # fmt: skip
    fake("wsis::norm_planes_backward",
         lambda grad, maps, extrema, scores, kind, eps: maps.new_empty(maps.shape),
         lib=library)  # fmt: skip
    torch.library.register_autograd(
        "wsis::norm_planes", _backward, setup_context=_save, lib=library
    )
    torch.library.register_autograd(
        "wsis::norm_planes_backward", _no_second_derivative, lib=library
    )
    return library


_library = _register()
