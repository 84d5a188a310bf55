"""Dense CRF: mean field over all pairs of pixels, on permutohedral lattices.

Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials", NIPS 2011, as the densecrf library (and pydensecrf around it) computes it:
``Q_0 = softmax(-U)``, then ``Q <- softmax(-U + sum_k w_k K_k Q)`` with Gaussian filters ``K_k``,
symmetrically normalised, the pixel itself included.

Sizes: ``B`` images, ``C`` labels, ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from wsis._lattice import Term, mix_of
from wsis.errors import InputError
from wsis.ops import permutohedral
from wsis.ops._lattice import allocator, driver, mean_field_op
from wsis.ops._native import num_threads
from wsis.ops.norms import as_float

IGNORE = 255  # of label maps: a pixel of which nothing is known
GT_PROB = 0.7  # jiwoon-ahn/irn misc/imutils.py, ChunyanWang1/RTC
CLIP = 1e-5  # of probabilities: pydensecrf.utils.unary_from_softmax

Compat = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


@dataclass(frozen=True)
class Gaussian:
    """Neighbouring pixels agree.

    Attributes:
        sxy: width in pixels, or ``(sx, sy)``.
        compat: a weight (Potts), ``[C]`` or ``[C, C]`` (energies of label pairs, as pydensecrf).
        normalization: "symmetric", "before", "after" or "none".
    """

    sxy: float | tuple[float, float]
    compat: Compat
    normalization: str = "symmetric"


@dataclass(frozen=True)
class Bilateral:
    """Pixels that are near and look alike agree.

    Attributes:
        sxy: width in pixels, or ``(sx, sy)``.
        srgb: width in the image's units (0 to 255), or one per channel.
        compat: see `Gaussian`.
        normalization: see `Gaussian`.
    """

    sxy: float | tuple[float, float]
    srgb: float | Sequence[float]
    compat: Compat
    normalization: str = "symmetric"


@dataclass(frozen=True)
class Features:
    """Pixels with like features agree: edges, depth, embeddings.

    Attributes:
        features: ``[B or 1, d, H, W]`` floating point, divided by their widths.
        compat: see `Gaussian`.
        normalization: see `Gaussian`.
    """

    features: Tensor
    compat: Compat
    normalization: str = "symmetric"


Pairwise = Gaussian | Bilateral | Features

PRESETS: dict[str, tuple[Pairwise, ...]] = {
    # jiwoon-ahn/psa and SEAM tool/imutils.py, 1-stage-wseg, AFA's crf_inference
    "psa": (Gaussian(3, 3), Bilateral(80, 13, 10)),
    # jiwoon-ahn/irn misc/imutils.py crf_inference_label, RTC's final masks; from label maps
    "irn-label": (Gaussian(3, 3), Bilateral(50, 5, 10)),
    # DeepLab's, in CLIP-ES, ExCEL, CLIMS
    "deeplab": (Gaussian(1, 3), Bilateral(67, 3, 4)),
    # rulixiang/ToCo, DuPL, SeCo, MoRe utils/dcrf.py
    "toco": (Gaussian(1, 1), Bilateral(121, 5, 4)),
    # rulixiang/afa, WeCLIP
    "afa": (Gaussian(3, 3), Bilateral(64, 5, 4)),
    # zbf1991/RRM
    "rrm": (Gaussian(3, 3), Bilateral(83, 5, 4)),
    # xulianuwa/MCTformer seg
    "mct": (Gaussian(4, 3), Bilateral(83, 5, 3)),
    # usr922/wseg and RTC segmentation codebase
    "wseg-seg": (Gaussian(3, 3), Bilateral(32, 13, 10)),
}


def dense_crf(
    images: Tensor | Sequence[Tensor],
    unary: Tensor | Sequence[Tensor],
    *,
    preset: str | None = None,
    terms: Sequence[Pairwise] | None = None,
    iterations: int = 10,
    unary_kind: Literal["probs", "logits", "energy", "labels"] = "probs",
    num_labels: int | None = None,
    gt_prob: float = GT_PROB,
    zero_unsure: bool = False,
    clip: float = CLIP,
    output: Literal["probs", "labels", "both"] = "probs",
) -> Any:
    """Mean-field inference of a fully connected CRF.

    Differentiable in unaries that are probabilities, logits or energies: the exact adjoint, with
    the iterations computed again from the unaries (it holds ``iterations + 1`` maps meanwhile).

    Args:
        images: ``[B, c, H, W]`` uint8 or floating, 0 to 255; or a list of ``[c, H_i, W_i]``.
        unary: ``[B, C, H, W]`` floating, for label maps ``[B, H, W]`` integer; or a list of one
            image's each.
        preset: a name of `PRESETS`; this or ``terms``.
        terms: `Gaussian`, `Bilateral` and `Features` in any number up to 16; may be empty.
        iterations: 0 or more.
        unary_kind: "probs" (``U = -log clip(p, clip, 1)``), "logits" (``U = -z``), "energy", or
            "labels" (``-log gt_prob`` for the label, ``-log((1 - gt_prob) / (C - 1))`` else,
            uniform where it is 255).
        num_labels: ``C`` of label maps.
        gt_prob: how sure given labels are, in (0, 1).
        zero_unsure: label 0 of a map means unknown and labels 1 to C are the classes
            (pydensecrf.utils.unary_from_labels).
        clip: smallest probability.
        output: what to return.

    Returns:
        ``probs [B, C, H, W]`` float32 (float64 if the unary is), ``labels [B, H, W] int64`` (the
        first best), or the pair of them; lists of such for lists.

    Raises:
        InputError: shapes, devices, numbers of labels, names or widths that do not fit; unaries
            that are not finite (looked for on the CPU only: on CUDA it would wait for the device).

    Example:
        >>> image = torch.randint(256, (1, 3, 20, 30), dtype=torch.uint8)
        >>> probs = torch.rand(1, 4, 20, 30).softmax(dim=1)
        >>> dense_crf(image, probs, preset="psa", output="labels").shape
        torch.Size([1, 20, 30])
        >>> edges = Features(torch.rand(1, 3, 20, 30) * 5, compat=4)
        >>> dense_crf(image, probs, terms=[Gaussian(3, 3), edges], iterations=5).shape
        torch.Size([1, 4, 20, 30])
    """
    options: dict[str, Any] = {
        "preset": preset,
        "terms": terms,
        "iterations": iterations,
        "unary_kind": unary_kind,
        "num_labels": num_labels,
        "gt_prob": gt_prob,
        "zero_unsure": zero_unsure,
        "clip": clip,
        "output": output,
    }
    if not isinstance(unary, Tensor):
        if isinstance(images, Tensor) or len(images) != len(unary):
            raise InputError(
                f"images must be a list like the unaries, {len(unary)} long, got "
                f"{f'a tensor {list(images.shape)}' if isinstance(images, Tensor) else len(images)}"
            )
        results = [
            dense_crf(image[None], one[None], **options)
            for image, one in zip(images, unary, strict=True)
        ]
        if output == "both":
            return [probs[0] for probs, _ in results], [labels[0] for _, labels in results]
        return [result[0] for result in results]

    if output not in ("probs", "labels", "both"):
        raise InputError(f"output must be probs, labels or both, got {output!r}")
    if not isinstance(iterations, int) or iterations < 0:
        raise InputError(f"iterations must be 0 or more and an integer, got {iterations}")
    pairwise = _pairwise(preset, terms)
    energies = _energies(unary, unary_kind, num_labels, gt_prob, zero_unsure, clip)
    images = cast(Tensor, images)
    batch, classes, height, width = energies.shape
    if images.ndim != 4 or images.shape[0] != batch or images.shape[2:] != (height, width):
        raise InputError(
            f"images must be [{batch}, c, {height}, {width}] like the unary, got "
            f"{list(images.shape)}"
        )
    if images.device != energies.device:
        raise InputError(f"images must be on {energies.device}, got {images.device}")
    made = [_make_term(term, images, classes) for term in pairwise] if energies.numel() else []
    if output == "labels":
        energies = energies.detach()
    probs, labels = mean_field_op(
        energies.flatten(2), made, iterations, probs=output != "labels", labels=output != "probs"
    )
    if output != "labels":
        probs = probs.view(energies.shape)
    if output != "probs":
        labels = labels.view(batch, height, width).long()
    return {"probs": probs, "labels": labels, "both": (probs, labels)}[output]


def _pairwise(preset: str | None, terms: Sequence[Pairwise] | None) -> Sequence[Pairwise]:
    if (preset is None) == (terms is None):
        raise InputError("one of preset and terms must be given, got both or neither")
    if terms is not None:
        return terms
    if preset not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset]


def _make_term(term: Pairwise, images: Tensor, classes: int) -> Any:
    if isinstance(term, Gaussian):
        size = (images.shape[2], images.shape[3])
        if images.device.type == "cpu":
            basis = permutohedral.places(size, term.sxy, term.normalization)
            return Term(*basis, mix_of(term.compat, classes))
        lattice = permutohedral.gaussian_lattice(size, term.sxy, images.device)
    elif isinstance(term, Bilateral):
        lattice = permutohedral.bilateral_lattice(images, term.sxy, term.srgb)
    else:
        if term.features.ndim != 4 or term.features.shape[2:] != images.shape[2:]:
            raise InputError(
                f"features must be [B or 1, d, {images.shape[2]}, {images.shape[3]}] like the "
                f"images, got {list(term.features.shape)}"
            )
        lattice = permutohedral.feature_lattice(term.features.to(images.device))
    return driver(images.device).make_term(
        lattice,
        term.compat,
        term.normalization,
        classes,
        allocator(images.device),
        threads=num_threads(),
    )


def _energies(
    unary: Tensor,
    kind: str,
    num_labels: int | None,
    gt_prob: float,
    zero_unsure: bool,
    clip: float,
) -> Tensor:
    if kind == "labels":
        if num_labels is None:
            raise InputError("num_labels must be given with label maps, got None")
        return label_energies(unary, num_labels, gt_prob=gt_prob, zero_unsure=zero_unsure)
    if kind not in ("probs", "logits", "energy"):
        raise InputError(f"unary_kind must be probs, logits, energy or labels, got {kind!r}")
    if unary.ndim != 4 or not unary.is_floating_point():
        raise InputError(
            f"unary must be floating [B, C, H, W], got {unary.dtype} {list(unary.shape)}"
        )
    if num_labels not in (None, unary.shape[1]):
        raise InputError(f"unary must have {num_labels} channels, got {list(unary.shape)}")
    unary = as_float(unary)
    if kind == "probs":
        if not 0 < clip < 1:
            raise InputError(f"clip must be in (0, 1), got {clip}")
        return -unary.clamp(clip, 1).log()
    return -unary if kind == "logits" else unary


def label_energies(
    labels: Tensor, num_labels: int, *, gt_prob: float = GT_PROB, zero_unsure: bool = False
) -> Tensor:
    """Energies of label maps, ``[B, C, H, W] float32``; see `dense_crf`.

    Args:
        labels: ``[B, H, W]`` integer, 0 to C - 1 (with ``zero_unsure`` 1 to C, 0 unknown), 255
            where nothing is known.
        num_labels: ``C``.
        gt_prob: in (0, 1).
        zero_unsure: see `dense_crf`.

    Raises:
        InputError: another shape or dtype, labels outside (looked for on the CPU only), or a
            probability outside.

    Example:
        >>> label_energies(torch.zeros(1, 2, 2, dtype=torch.long), 3)[0, :, 0, 0]
        tensor([0.3567, 1.8971, 1.8971])
    """
    if labels.ndim != 3 or labels.is_floating_point() or labels.is_complex():
        raise InputError(
            f"labels must be integer [B, H, W], got {labels.dtype} {list(labels.shape)}"
        )
    if not 0 < gt_prob < 1 or num_labels < 1:
        raise InputError(
            f"gt_prob must be in (0, 1) and num_labels positive, got {gt_prob} and {num_labels}"
        )
    labels = labels.long()
    unknown = labels == IGNORE
    if zero_unsure:
        unknown = unknown | (labels == 0)
        labels = labels - 1
    labels = labels.masked_fill(unknown, 0)
    if labels.device.type == "cpu" and labels.numel():
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= num_labels:
            raise InputError(
                f"labels must be below {num_labels} (or 255), got {least} to {most}"
                + (" after the unsure 0 was taken off" if zero_unsure else "")
            )
    own, other, even = (
        torch.tensor([gt_prob, (1 - gt_prob) / max(num_labels - 1, 1), 1 / num_labels])
        .log()
        .neg()
        .tolist()
    )
    energies = torch.full(
        (labels.shape[0], num_labels, *labels.shape[1:]), other, device=labels.device
    )
    energies.scatter_(1, labels[:, None], own)
    return energies.masked_fill_(unknown[:, None], even)
