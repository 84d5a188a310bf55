"""The native steps of two-threshold pseudo masks; :func:`wsis.pseudo.make_pseudo_masks` joins them.

Class scores are cut to the classes that are in the image, resized to the size of the refinement
and put beside two background constants (`pseudo_stack`); after the refinement the two halves are
resized back and decided upon (`pseudo_labels`). Which classes are present is found on the device:
nothing waits for it.

Sizes: ``B`` images, ``K`` foreground classes, ``R`` room for the present classes of an image,
``H W`` image, ``h w`` reduced size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wsis.ops._native import _C, cuda_function, num_parts, stream, view

if TYPE_CHECKING:
    from torch import Tensor


def pseudo_unit(cams: Tensor, present: Tensor, valid_box: Tensor) -> Tensor:
    """Mean score of each image: at a pixel the largest of its classes, averaged over the box.

    Args:
        cams: ``[B, K, H, W]`` float32 or float64.
        present: ``[B, K] bool``, classes of each image; others are not read.
        valid_box: ``[B, 4] int64``: y0, y1, x0, x1, half open, cut to the image.

    Returns:
        ``[B]`` like ``cams``; 0 without classes or pixels. The order of the additions is fixed.

    Example:
        >>> ones, box = torch.ones(1, 2, 4, 4), torch.tensor([[0, 4, 0, 2]])
        >>> pseudo_unit(ones, torch.tensor([[True, False]]), box)
        tensor([1.])
    """
    return torch.ops.wsis.pseudo_unit(cams, present, valid_box)


def pseudo_stack(
    cams: Tensor,
    present: Tensor,
    size: tuple[int, int],
    *,
    high: float,
    low: float,
    unit: Tensor | None = None,
    room: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of each image's present classes and a background constant, for two constants.

    The scores are resized (bilinear, align_corners=False). With P present classes the first
    ``2 (P + 1)`` planes of an image are background and classes at the high constant, then at the
    low one; planes past them are not written. An image without classes has no planes.

    Args:
        cams: ``[B, K, H, W]`` float32 or float64, finite scores.
        present: ``[B, K] bool``, classes of each image; others are not read.
        size: ``(h, w)``.
        high: first background constant, at most 1 (a larger one counts as 1).
        low: second background constant.
        unit: ``[B]`` like ``cams``: the constants are multiples of it.
        room: R, how many present classes there is room for; K by default. Classes past it are
            dropped, the last first.

    Returns:
        ``stack [B, 2 (R + 1), h, w]`` like ``cams``; ``counts [B] int32``, planes written; and
        ``ids [B, R + 1] int32``, the class id 1..K of each plane of a half, 0 for background.

    Example:
        >>> cams, present = torch.rand(1, 3, 8, 8), torch.tensor([[True, False, True]])
        >>> stack, counts, ids = pseudo_stack(cams, present, (4, 4), high=0.6, low=0.2)
        >>> counts.tolist(), ids.tolist(), stack.shape
        ([6], [[0, 1, 3, 0]], torch.Size([1, 8, 4, 4]))
    """
    room = cams.shape[1] if room is None else room
    return torch.ops.wsis.pseudo_stack(cams, present, unit, high, low, room, *size)


def pseudo_labels(
    stack: Tensor,
    counts: Tensor,
    ids: Tensor,
    valid_box: Tensor,
    size: tuple[int, int],
    *,
    ignore_index: int,
) -> Tensor:
    """Best plane of each half of a stack, at image size, and the rule that joins the two.

    Resize: bilinear, align_corners=False. Of equal planes the first wins, NaN never does. The class
    at the high constant is kept; its background becomes ``ignore_index`` unless the low constant
    says background too.

    Args:
        stack: ``[B, 2 (R + 1), h, w]`` float32 or float64, laid out as by :func:`pseudo_stack`.
        counts: ``[B] int32``, how many planes of each image are read; 0 makes it all background.
        ids: ``[B, R + 1] int32``.
        valid_box: ``[B, 4] int64``: y0, y1, x0, x1, half open, cut to the image.
        size: ``(H, W)``.
        ignore_index: value of undecided pixels and of those outside the box.

    Returns:
        ``[B, H, W] int64``.

    Example:
        >>> cams, present = torch.ones(1, 1, 8, 8), torch.tensor([[True]])
        >>> made = pseudo_stack(cams, present, (4, 4), high=0.6, low=0.2)
        >>> box = torch.tensor([[0, 8, 0, 8]])
        >>> pseudo_labels(*made, box, (8, 8), ignore_index=255).unique()
        tensor([1])
    """
    return torch.ops.wsis.pseudo_labels(stack, counts, ids, valid_box, *size, ignore_index)


# ---- registration ------------------------------------------------------------------------------

_library = torch.library.Library("wsis", "FRAGMENT")
_library.define("pseudo_unit(Tensor cams, Tensor present, Tensor valid_box) -> Tensor")
_library.define(
    "pseudo_stack(Tensor cams, Tensor present, Tensor? unit, float high, float low, SymInt room, "
    "SymInt height, SymInt width) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "pseudo_labels(Tensor stack, Tensor counts, Tensor ids, Tensor valid_box, SymInt height, "
    "SymInt width, int ignore_index) -> Tensor"
)


def _unit(cams: Tensor, present: Tensor, valid_box: Tensor) -> Tensor:
    cams = cams.contiguous()
    unit = cams.new_empty(len(cams))
    scratch = cams.new_empty((len(cams), cams.shape[2]), dtype=torch.float64)
    arrays = map(view, (cams, _bytes(present), valid_box.contiguous(), scratch, unit))
    if cams.is_cuda:
        cuda_function("pseudo_unit_cuda")(*arrays, stream(cams))
    else:
        _C.pseudo_unit_cpu(*arrays, num_parts(cams.numel()))
    return unit


def _stack(
    cams: Tensor,
    present: Tensor,
    unit: Tensor | None,
    high: float,
    low: float,
    room: int,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    cams = cams.contiguous()
    unit = cams.new_empty(0) if unit is None else unit.contiguous()
    made = _stack_outputs(cams, room, height, width)
    arrays = [view(x) for x in (cams, _bytes(present), unit)], list(map(view, made))
    if cams.is_cuda:
        kernel = cuda_function("pseudo_stack_cuda")
        kernel(*arrays[0], high, low, *arrays[1], stream(cams))
    else:
        _C.pseudo_stack_cpu(*arrays[0], high, low, *arrays[1], num_parts(made[0].numel()))
    return made


def _labels(
    stack: Tensor,
    counts: Tensor,
    ids: Tensor,
    valid_box: Tensor,
    height: int,
    width: int,
    ignore_index: int,
) -> Tensor:
    masks = stack.new_empty((len(stack), height, width), dtype=torch.int64)
    inputs = (stack, counts, ids, valid_box)
    arrays = map(view, (*(x.contiguous() for x in inputs), masks))
    if stack.is_cuda:
        cuda_function("pseudo_labels_cuda")(*arrays, ignore_index, stream(stack))
    else:
        _C.pseudo_labels_cpu(*arrays, ignore_index, num_parts(masks.numel() * 4))
    return masks


def _stack_outputs(
    cams: Tensor, room: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch = cams.shape[0]
    return (
        cams.new_empty((batch, 2 * (room + 1), height, width)),
        cams.new_empty(batch, dtype=torch.int32),
        cams.new_empty((batch, room + 1), dtype=torch.int32),
    )


def _bytes(flags: Tensor) -> Tensor:
    """Booleans as the bytes they are."""
    return flags.contiguous().view(torch.uint8)


for _name, _function in {
    "pseudo_unit": _unit,
    "pseudo_stack": _stack,
    "pseudo_labels": _labels,
}.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)


@torch.library.register_fake("wsis::pseudo_unit", lib=_library)
def _(cams: Tensor, present: Tensor, valid_box: Tensor) -> Tensor:
    return cams.new_empty(cams.shape[0])


@torch.library.register_fake("wsis::pseudo_stack", lib=_library)
def _(
    cams: Tensor,
    present: Tensor,
    unit: Tensor | None,
    high: float,
    low: float,
    room: int,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _stack_outputs(cams, room, height, width)


@torch.library.register_fake("wsis::pseudo_labels", lib=_library)
def _(
    stack: Tensor,
    counts: Tensor,
    ids: Tensor,
    valid_box: Tensor,
    height: int,
    width: int,
    ignore_index: int,
) -> Tensor:
    return stack.new_empty((stack.shape[0], height, width), dtype=torch.int64)
