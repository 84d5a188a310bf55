"""Stored maps of one image -> its mask, by a dense CRF, PAMR, PAR or VARM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from wsis.errors import InputError
from wsis.offline.crf import GT_PROB, ITERATIONS, check_preset, crf_of_labels, crf_of_scores
from wsis.ops.local_affinity import DILATIONS, refine
from wsis.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

    from wsis.offline.stored import StoredMaps

Method = Literal["crf", "pamr", "par", "varm", "none"]
Kind = Literal["cams", "probs", "logits"]


@dataclass(frozen=True)
class Refinement:
    """How maps become masks.

    Attributes:
        method: ``crf``, ``pamr``, ``par``, ``varm``, or ``none`` (argmax alone).
        preset: constants of the CRF.
        kind: what the files hold, where they are no labels. ``cams``: foreground scores in [0, 1],
            map or key k is the class id k + 1. ``probs``: map or key 0 is background. ``logits``:
            the same before a softmax.
        background: constant score of the background beside ``cams``; None for
            ``(1 - max)^alpha``.
        alpha: its power; 4 is jiwoon-ahn/psa's lower one.
        iterations: of the refinement.
        gt_prob: how sure labels are, for the CRF.
        dilations: of PAMR, PAR and VARM.
    """

    method: Method = "crf"
    preset: str = "psa"
    kind: Kind = "cams"
    background: float | None = None
    alpha: float = 4.0
    iterations: int = ITERATIONS
    gt_prob: float = GT_PROB
    dilations: tuple[int, ...] = DILATIONS

    def check(self) -> None:
        """InputError for values that mean nothing."""
        if self.method == "crf":
            check_preset(self.preset)
        if self.background is not None and not 0 <= self.background <= 1:
            raise InputError(f"background must be in [0, 1], got {self.background}")
        if not self.alpha > 0:
            raise InputError(f"alpha must be positive, got {self.alpha}")
        if not 0 < self.gt_prob < 1:
            raise InputError(f"gt_prob must be in (0, 1), got {self.gt_prob}")
        if self.iterations < 0:
            raise InputError(f"iterations must be 0 or more, got {self.iterations}")


def refine_maps(image: np.ndarray, stored: StoredMaps, how: Refinement, device: Any) -> np.ndarray:
    """The mask of one image.

    Maps are resized to the image (bilinear, align_corners=False) and get a background in front;
    then the method, then the argmax, where ties go to the first.

    Args:
        image: ``[H, W, 3] uint8`` RGB.
        stored: its maps or labels.
        how: method and constants.
        device: where to compute.

    Returns:
        ``[H, W] uint8`` class ids.

    Raises:
        InputError: scores outside [0, 1], labels of another size than the image, no background
            among probabilities, or a class number that a mask cannot hold.
    """
    size = image.shape[:2]
    if stored.labels is not None:
        if stored.labels.shape != size:
            raise InputError(
                f"labels must have the size of their image, {list(size)}, "
                f"got {list(stored.labels.shape)}"
            )
        ids = [0, *sorted(set(np.unique(stored.labels).tolist()) - {0, IGNORE})]
        table = np.full(256, IGNORE, np.uint8)
        table[ids] = np.arange(len(ids))
        labels = torch.from_numpy(table[stored.labels]).to(device)
        if how.method == "crf":
            best = crf_of_labels(
                image,
                labels,
                len(ids),
                how.preset,
                iterations=how.iterations,
                gt_prob=how.gt_prob,
            )
        else:
            planes = torch.arange(len(ids), device=device)[:, None, None]
            best = _best(image, (labels[None] == planes).float(), how)
    else:
        ids, scores = _scores(stored, size, how, device)
        if how.method == "crf":
            best = crf_of_scores(
                image, scores, how.preset, iterations=how.iterations, gt_prob=how.gt_prob
            )
        else:
            best = _best(image, scores, how)
    return np.array(ids, np.uint8)[best.cpu().numpy()]


def _scores(
    stored: StoredMaps, size: tuple[int, ...], how: Refinement, device: Any
) -> tuple[list[int], Tensor]:
    """Class id of each plane and the planes ``[C, H, W]``, background first."""
    assert stored.maps is not None
    first = 1 if how.kind == "cams" else 0
    ids = [key + first for key in stored.keys]
    if len(set(ids)) < len(ids) or any(not first <= k < IGNORE for k in ids):
        raise InputError(f"class ids must be different and {first}..254, got {ids}")
    maps = torch.from_numpy(stored.maps).to(device)
    if how.kind == "logits":
        maps = maps.softmax(dim=0)
    elif maps.numel() and (float(maps.max()) > 1.001 or float(maps.min()) < -1.001):
        raise InputError(
            f"{how.kind} must be in [0, 1], got {float(maps.min()):g} to {float(maps.max()):g}; "
            "for scores before a softmax use --kind logits"
        )
    if not ids:
        maps = maps.new_zeros((0, *size))
    elif maps.shape[1:] != size:
        maps = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    maps = maps.clamp(0, 1)  # small negative values are left by SEAM's normalisation
    if how.kind != "cams":
        if 0 not in ids:
            raise InputError(f"{how.kind} must have the background under 0, got {ids}")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        return [ids[k] for k in order], maps[order]
    strongest = maps.amax(dim=0) if ids else maps.new_zeros(size)
    level = torch.full_like(strongest, how.background if how.background is not None else 0.0)
    if how.background is None:
        level = (1 - strongest) ** how.alpha
    return [0, *ids], torch.cat([level[None], maps])


def _best(image: np.ndarray, scores: Tensor, how: Refinement) -> Tensor:
    if how.method != "none" and how.iterations > 0:
        pixels = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]
        scores = refine(
            pixels.contiguous().to(scores.device),
            scores[None],
            how.method,  # type: ignore[arg-type]
            iterations=how.iterations,
            dilations=how.dilations,
        )[0]
    return scores.argmax(dim=0)
