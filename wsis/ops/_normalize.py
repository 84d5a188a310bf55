"""The operators ``torch.ops.wsis.normalize_cams`` and ``cams_to_labels``.

Their documentation and checks are in `wsis.ops.normalize`; here are the rules of the methods,
memory, devices and fake kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from wsis.errors import InputError
from wsis.ops._native import _C, cuda_function, num_parts, stream, view
from wsis.ops.norms import BACKGROUNDS, EPS, NORMS

if TYPE_CHECKING:
    from torch import Tensor

Variant = Literal["psa", "seam", "irn", "afa", "toco", "sipe", "rtc"]
Background = Literal["constant", "power", "complement"]

MOST_PASSES = 64  # csrc/cpu/normalize.h
MOST_SIDE = 32767  # csrc/kernels/normalize.h: positions are exact fractions of 31 bits


@dataclass(frozen=True)
class Rule:
    """How one method merges the maps of several passes and normalises their sum."""

    norm: str
    relu_each: bool = False  # before the resize: evidence of one pass cannot cancel another's
    flip_max: bool = False  # maximum of plain and flipped pass, then ReLU, instead of their sum


RULES = {
    "psa": Rule("over_max", relu_each=True),  # jiwoon-ahn/psa infer_cls.py
    "irn": Rule("over_max", relu_each=True),  # jiwoon-ahn/irn step/make_cam.py
    "sipe": Rule("over_max"),  # chenqi1126/SIPE
    "seam": Rule("shifted"),  # YudeWang/SEAM infer_SEAM.py; usr922/wseg (PPC) the same
    "rtc": Rule("shifted"),  # ChunyanWang1/RTC, refined CAMs of the training images
    "afa": Rule("over_range", flip_max=True),  # rulixiang/afa utils/camutils.py
    "toco": Rule("over_range", flip_max=True),  # rulixiang/ToCo utils/camutils.py
}


def _new_scores(maps: list[Tensor], crop: list[int], background: str | None) -> Tensor:
    batch, classes = maps[0].shape[:2]
    return maps[0].new_empty(batch, classes + (background is not None), *crop)


def _normalize_cams_cpu(
    maps: list[Tensor],
    flips: list[bool],
    label: Tensor | None,
    size: list[int],
    crop: list[int],
    variant: str,
    background: str | None,
    background_value: float,
) -> Tensor:
    _check_label(label)
    rule, scores = RULES[variant], _new_scores(maps, crop, background)
    skip, (batch, classes) = int(background is not None), maps[0].shape[:2]
    parts = max(1, min(num_parts(scores.numel()), batch * classes))
    if scores.numel() == 0:
        return scores
    grids = [tuple(m.shape[2:]) for m in maps]
    tables, weights, each = _C.normalize_cams_scratch(
        grids, rule.flip_max, *size, *crop, scores.dtype == torch.float64
    )
    extrema = scores.new_empty(batch, classes, 2)
    scratch = (
        scores.new_empty(tables, dtype=torch.int32),
        scores.new_empty(weights),
        scores.new_empty(parts, each),
    )
    present = None if label is None else label.contiguous()
    _C.normalize_cams_cpu(
        [view(m.contiguous()) for m in maps],
        flips,
        _view(present),
        *map(view, (scores, extrema, *scratch)),
        *(*size, rule.relu_each, rule.flip_max, NORMS[rule.norm], EPS, skip),
    )
    if not extrema.isfinite().all():
        image, k = extrema.isfinite().all(dim=2).logical_not().nonzero()[0].tolist()
        raise InputError(f"maps must be finite, got inf or NaN in class {k} of image {image}")
    if background is not None:
        _C.add_background_cpu(
            *(view(scores.flatten(2)), _view(present), BACKGROUNDS[background]),
            *(background_value, _absent(rule), num_parts(scores.numel())),
        )
    return scores


def _normalize_cams_cuda(
    maps: list[Tensor],
    flips: list[bool],
    label: Tensor | None,
    size: list[int],
    crop: list[int],
    variant: str,
    background: str | None,
    background_value: float,
) -> Tensor:
    kernel, rule = cuda_function("normalize_cams_cuda"), RULES[variant]
    scores, queue = _new_scores(maps, crop, background), stream(maps[0])
    if scores.numel() == 0:
        return scores
    planes = maps[0].shape[:2].numel()
    partial = scores.new_empty(planes, _C.normalize_cams_tiles(*crop), 2)
    present = None if label is None else label.contiguous()
    tensors = [m.contiguous() for m in maps]  # kept until the launch
    kernel(
        [view(m) for m in tensors],
        flips,
        *(_view(present), view(scores), view(partial)),
        *(*size, rule.relu_each, rule.flip_max, NORMS[rule.norm], EPS),
        *(int(background is not None), queue),
    )
    if background is not None:
        _C.add_background_cuda(
            *(view(scores.flatten(2)), _view(present), BACKGROUNDS[background]),
            *(background_value, _absent(rule), queue),
        )
    return scores


def _check_label(label: Tensor | None) -> None:
    """Looks at the values, which costs nothing on the CPU but would mean waiting on CUDA."""
    if label is None:
        return
    known = (label == 0) | (label == 1)
    if not known.all():
        raise InputError(f"label must be 0 or 1, got {label[~known][0].item():g}")


def _view(array: Tensor | None) -> Any:
    return None if array is None else view(array)


def _absent(rule: Rule) -> float:
    """Score of a class that the label does not name."""
    return -1.0 if rule.norm == "shifted" else 0.0


def _cams_to_labels_cpu(
    cams: Tensor,
    label: Tensor | None,
    boxes: Tensor | None,
    low: float,
    high: float,
    ignore_index: int,
) -> Tensor:
    _check_label(label)
    cams, labels = cams.contiguous(), _new_labels(cams)
    if labels.numel() == 0:
        return labels
    present, limits = (None if t is None else t.contiguous() for t in (label, boxes))
    _C.cams_to_labels_cpu(
        *(view(cams), _view(present), _view(limits), view(labels)),
        *(low, high, ignore_index, num_parts(cams.numel())),
    )
    return labels


def _cams_to_labels_cuda(
    cams: Tensor,
    label: Tensor | None,
    boxes: Tensor | None,
    low: float,
    high: float,
    ignore_index: int,
) -> Tensor:
    kernel = cuda_function("cams_to_labels_cuda")
    cams, labels = cams.contiguous(), _new_labels(cams)
    if labels.numel() == 0:
        return labels
    present, limits = (None if t is None else t.contiguous() for t in (label, boxes))
    kernel(
        *(view(cams), _view(present), _view(limits), view(labels)),
        *(low, high, ignore_index, stream(cams)),
    )
    return labels


def _new_labels(cams: Tensor) -> Tensor:
    return cams.new_empty(cams.shape[0], *cams.shape[2:], dtype=torch.int64)


def _register() -> Any:
    library = torch.library.Library("wsis", "FRAGMENT")
    library.define(
        "normalize_cams(Tensor[] maps, bool[] flips, Tensor? label, int[] size, int[] crop, "
        "str variant, str? background, float background_value) -> Tensor"
    )
    library.define(
        "cams_to_labels(Tensor cams, Tensor? label, Tensor? boxes, float low, float high, "
        "int ignore_index) -> Tensor"
    )
    library.impl("normalize_cams", _normalize_cams_cpu, "CPU")
    library.impl("normalize_cams", _normalize_cams_cuda, "CUDA")
    library.impl("cams_to_labels", _cams_to_labels_cpu, "CPU")
    library.impl("cams_to_labels", _cams_to_labels_cuda, "CUDA")

    @torch.library.register_fake("wsis::normalize_cams", lib=library)
    def _(
        maps: list[Tensor],
        flips: list[bool],
        label: Tensor | None,
        size: list[int],
        crop: list[int],
        variant: str,
        background: str | None,
        background_value: float,
    ) -> Tensor:
        return _new_scores(maps, crop, background)

    @torch.library.register_fake("wsis::cams_to_labels", lib=library)
    def _(
        cams: Tensor,
        label: Tensor | None,
        boxes: Tensor | None,
        low: float,
        high: float,
        ignore_index: int,
    ) -> Tensor:
        return _new_labels(cams)

    return library


_library = _register()
