"""The operators ``torch.ops.wsis.lattice_filter`` and ``mean_field``.

Documentation and checks are in `wsis.ops.permutohedral` and `wsis.ops.dense_crf`; here are
devices, memory, fake kernels and gradients. Lattices travel as flat lists of tensors, with their
sizes beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wsis import _lattice
from wsis._lattice import Lattice, Term
from wsis.errors import InputError
from wsis.ops._native import num_threads

# ---- devices -----------------------------------------------------------------------------------


def driver(device: torch.device) -> ModuleType:
    """What builds and uses lattices on a device: `wsis._lattice` or its twin for CUDA."""
    if device.type == "cpu":
        return _lattice
    if device.type == "cuda":
        return import_module("wsis.ops._lattice_cuda")
    raise InputError(f"tensors must be on cpu or cuda, got {device}")


def allocator(device: torch.device) -> Callable[[tuple[int, ...], str], Tensor]:
    """The driver's ``empty``."""
    return lambda shape, kind: torch.empty(shape, dtype=getattr(torch, kind), device=device)


# ---- lattices as lists -------------------------------------------------------------------------


def pack(lattice: Lattice) -> tuple[list[Tensor], list[int]]:
    """The tensors of a lattice, and the numbers that `unpack` needs."""
    per_image = len(lattice.images[0]) if lattice.images else 0
    sizes = [lattice.dims, lattice.height, lattice.width, len(lattice.images), per_image]
    arrays = [array for image in lattice.images for array in image]
    return arrays, [*sizes, len(lattice.vertices), *lattice.vertices]


def unpack(arrays: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Lattice, int, int]:
    """The lattice at the beginning of the lists, and how much of each it took."""
    dims, height, width, images, per_image, batch = sizes[:6]
    cut = [tuple(arrays[i * per_image : (i + 1) * per_image]) for i in range(images)]
    vertices = tuple(sizes[6 : 6 + batch])
    return Lattice(dims, height, width, vertices, tuple(cut)), images * per_image, 6 + batch


def filter_op(
    values: Tensor, lattice: Lattice, before: Tensor | None, after: Tensor | None, reverse: bool
) -> Tensor:
    """``[B, C, N]`` filtered; gradient to the values."""
    arrays, sizes = pack(lattice)
    return torch.ops.wsis.lattice_filter(values, arrays, before, after, sizes, reverse)


def mean_field_op(
    unary: Tensor,
    terms: Sequence[Term],
    iterations: int,
    *,
    start: Tensor | None = None,
    probs: bool = True,
    labels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Q ``[B, C, N]`` and labels ``[B, N]``, empty where not wanted; gradient to the unaries."""
    arrays: list[Tensor] = []
    factors: list[Tensor] = []
    sizes: list[int] = []
    mixes: list[float] = []
    for term in terms:
        more, numbers = pack(term.lattice)
        same = term.before is not None and term.before is term.after
        flags = [int(term.before is not None), int(term.after is not None), int(same)]
        arrays += more
        sizes += [*numbers, len(term.mix), *flags]
        mixes += term.mix
        factors += [term.before] * flags[0] + [term.after] * (flags[1] and not same)
    return torch.ops.wsis.mean_field(
        unary, start, arrays, factors, mixes, sizes, iterations, probs, labels
    )


def _terms_of(
    arrays: Sequence[Tensor],
    factors: Sequence[Tensor],
    mixes: Sequence[float],
    sizes: Sequence[int],
) -> list[Term]:
    """What `mean_field_op` packed."""
    arrays, factors, mixes, sizes = list(arrays), list(factors), list(mixes), list(sizes)
    terms = []
    while sizes:
        lattice, used, read = unpack(arrays, sizes)
        count, has_before, has_after, same = sizes[read : read + 4]
        before = factors.pop(0) if has_before else None
        after = before if same else factors.pop(0) if has_after else None
        terms.append(Term(lattice, before, after, mixes[:count]))
        arrays, mixes, sizes = arrays[used:], mixes[count:], sizes[read + 4 :]
    return terms


# ---- kernels -----------------------------------------------------------------------------------


def _lattice_filter(
    values: Tensor,
    arrays: list[Tensor],
    before: Tensor | None,
    after: Tensor | None,
    sizes: list[int],
    reverse: bool,
) -> Tensor:
    lattice, _, _ = unpack(arrays, sizes)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    if out.numel():
        driver(values.device).filter(
            lattice,
            values.detach().contiguous(),
            allocator(values.device),
            before=before,
            after=after,
            reverse=reverse,
            out=out,
            threads=num_threads(),
        )
    return out


def _new_results(unary: Tensor, probs: bool, labels: bool) -> tuple[Tensor, Tensor]:
    batch, classes, points = unary.shape
    kind = torch.uint8 if classes <= 256 else torch.int32
    return (
        unary.new_empty(unary.shape if probs else [0]),
        unary.new_empty([batch, points] if labels else [0], dtype=kind),
    )


def _mean_field(
    unary: Tensor,
    start: Tensor | None,
    arrays: list[Tensor],
    factors: list[Tensor],
    mixes: list[float],
    sizes: list[int],
    iterations: int,
    probs: bool,
    labels: bool,
) -> tuple[Tensor, Tensor]:
    out, best = _new_results(unary, probs, labels)
    if unary.numel():
        got, found = driver(unary.device).mean_field(
            unary.detach().contiguous(),
            _terms_of(arrays, factors, mixes, sizes),
            iterations,
            allocator(unary.device),
            start=None if start is None else start.detach().contiguous(),
            probs=probs,
            labels=labels,
            out=out if probs else None,
            threads=num_threads(),
        )
        out, best = got if probs else out, found if labels else best
    return out, best


# ---- registration ------------------------------------------------------------------------------

_library = torch.library.Library("wsis", "FRAGMENT")
_library.define(
    "lattice_filter(Tensor values, Tensor[] arrays, Tensor? before, Tensor? after, int[] sizes, "
    "bool reverse) -> Tensor"
)
_library.define(
    "mean_field(Tensor unary, Tensor? start, Tensor[] arrays, Tensor[] factors, float[] mixes, "
    "int[] sizes, int iterations, bool probs, bool labels) -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("lattice_filter", _lattice_filter, _device)
    _library.impl("mean_field", _mean_field, _device)


@torch.library.register_fake("wsis::lattice_filter", lib=_library)
def _(values: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.library.register_fake("wsis::mean_field", lib=_library)
def _(unary: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _new_results(unary, rest[-2], rest[-1])


# The filter is linear in the values: its gradient is the transposed filter.


def _keep_filter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, arrays, before, after, ctx.sizes, ctx.reverse = inputs
    ctx.save_for_backward(before, after, *arrays)


def _filter_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    before, after, *arrays = ctx.saved_tensors
    values = torch.ops.wsis.lattice_filter(
        gradient, arrays, after, before, ctx.sizes, not ctx.reverse
    )
    return values, [None] * len(arrays), None, None, None, None


# The gradient of the mean field walks back through the iterations. Only the unaries are kept; Q of
# every iteration is computed again, to the bit, and all of them are held at once.


def _keep_mean_field(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    unary, start, arrays, factors, *ctx.rest, ctx.probs, _ = inputs
    if not ctx.probs:
        raise RuntimeError("a gradient needs the probabilities: call with probs=True")
    ctx.counts = (len(arrays), len(factors))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(unary, output[0], start, *arrays, *factors)


def _softmax_backward(q: Tensor, gradient: Tensor) -> Tensor:
    return q * (gradient - (q * gradient).sum(1, keepdim=True))


def _mean_field_backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Any, ...]:
    # None for every tensor of a list; an empty list of numbers answers for itself.
    numbers: list[list[float] | None] = [None if values else [] for values in ctx.rest[:2]]
    rest: Any = [None] * ctx.counts[0], [None] * ctx.counts[1], *numbers, None, None, None
    if gradient is None:
        return None, None, *rest
    unary, last, start, *others = ctx.saved_tensors
    arrays, factors = others[: ctx.counts[0]], others[ctx.counts[0] :]
    mixes, sizes, iterations = ctx.rest
    terms = _terms_of(arrays, factors, mixes, sizes)

    def forward(first: Tensor | None, steps: int) -> Tensor:
        call = torch.ops.wsis.mean_field
        return call(unary, first, arrays, factors, mixes, sizes, steps, True, False)[0]

    states = [forward(start, 0)]
    while len(states) < iterations:
        states.append(forward(states[-1], 1))
    states[iterations:] = [last]
    total = torch.zeros_like(unary)
    for i in range(iterations, -1, -1):
        if i == 0 and start is not None:
            break
        logits = _softmax_backward(states.pop(), gradient)
        total -= logits
        if i:
            gradient = sum(
                (_term_backward(term, logits) for term in terms), torch.zeros_like(unary)
            )
    return total, None if start is None else gradient, *rest


def _term_backward(term: Term, logits: Tensor) -> Tensor:
    mix = torch.tensor(term.mix, dtype=logits.dtype, device=logits.device)
    classes = logits.shape[1]
    if len(term.mix) == classes:
        mixed = logits * mix[:, None]
    else:
        mixed = torch.einsum("ij,bin->bjn", mix.view(classes, classes), logits)
    return filter_op(mixed, term.lattice, term.after, term.before, True)


torch.library.register_autograd(
    "wsis::lattice_filter", _filter_backward, setup_context=_keep_filter, lib=_library
)
torch.library.register_autograd(
    "wsis::mean_field", _mean_field_backward, setup_context=_keep_mean_field, lib=_library
)
