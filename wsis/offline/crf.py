"""Dense CRF of the scores of one image, by the name of a preset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wsis import _C
from wsis.errors import InputError
from wsis.ops.dense_crf import PRESETS, dense_crf
from wsis.types import IGNORE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LABEL_PRESETS = ("irn-label",)
"""Presets whose users give labels, not probabilities, to the CRF."""

GT_PROB = 0.7
"""How sure given labels are (jiwoon-ahn/irn misc/imutils.py, ChunyanWang1/RTC)."""

ITERATIONS = 10
"""Of the mean field, in every repository that the presets come from."""


def check_preset(name: str) -> str:
    """The name; InputError where there is no such preset."""
    if name not in PRESETS:
        raise InputError(f"unknown CRF preset '{name}', expected one of {', '.join(PRESETS)}")
    return name


def crf_of_scores(
    image: np.ndarray,
    scores: Tensor,
    preset: str,
    *,
    iterations: int = ITERATIONS,
    gt_prob: float = GT_PROB,
) -> Tensor:
    """Labels of one image from its scores.

    Presets of the kind ``irn-label`` take the argmax of the scores as labels that are right with
    probability `gt_prob`; the others take the scores as probabilities (clipped to [1e-5, 1], not
    renormalised: jiwoon-ahn/psa).

    Args:
        image: ``[H, W, 3] uint8`` RGB.
        scores: ``[C, H, W] float32`` in [0, 1], background first; ties go to the first.
        preset: constants of the CRF.
        iterations: of the mean field.
        gt_prob: of labels.

    Returns:
        ``[H, W] int64`` in 0..C-1, on the device of the scores.

    Raises:
        InputError: an unknown preset, or an image of another size.
    """
    if check_preset(preset) in LABEL_PRESETS:
        return crf_of_labels(
            image,
            scores.argmax(dim=0),
            len(scores),
            preset,
            iterations=iterations,
            gt_prob=gt_prob,
        )
    return _run(image, -scores.clamp(1e-5, 1).log(), preset, iterations)


def crf_of_labels(
    image: np.ndarray,
    labels: Tensor,
    count: int,
    preset: str,
    *,
    iterations: int = ITERATIONS,
    gt_prob: float = GT_PROB,
) -> Tensor:
    """Labels of one image from labels that are right with probability `gt_prob`.

    Args:
        image: ``[H, W, 3] uint8`` RGB.
        labels: ``[H, W]`` integer in 0..count-1; at 255 nothing is known.
        count: how many labels there are.
        preset: constants of the CRF.
        iterations: of the mean field.
        gt_prob: in (0, 1).

    Returns:
        ``[H, W] int64`` in 0..count-1.

    Raises:
        InputError: an unknown preset, or an image of another size.
    """
    check_preset(preset)
    labels = labels.long()
    if count == 1:
        return torch.zeros_like(labels)
    rest = torch.tensor((1 - gt_prob) / (count - 1)).log()
    energies = torch.full((count, *labels.shape), -float(rest), device=labels.device)
    known = labels != IGNORE
    own = torch.where(known, labels, 0)[None]
    energies.scatter_(0, own, -float(torch.tensor(gt_prob).log()))
    uniform = float(torch.tensor(float(count)).log())
    return _run(image, torch.where(known, energies, uniform), preset, iterations)


def _run(image: np.ndarray, energies: Tensor, preset: str, iterations: int) -> Tensor:
    if image.shape != (*energies.shape[1:], 3):
        raise InputError(
            f"the image must be {[*energies.shape[1:], 3]} like the scores, got {list(image.shape)}"
        )
    if energies.is_cuda and "cuda_archs" not in _C.build_info():
        energies = energies.cpu()  # a CPU build beside a CUDA torch
    pixels = torch.tensor(image).permute(2, 0, 1)[None].contiguous().to(energies.device)
    with torch.no_grad():
        labels = dense_crf(
            pixels,
            energies[None],
            preset=preset,
            iterations=iterations,
            unary_kind="energy",
            output="labels",
        )
    return labels[0].long()
