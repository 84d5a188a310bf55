"""Stored maps of one image -> its mask: dense CRF, PAMR, PAR, VARM, random walk or PCM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from wsis.errors import InputError
from wsis.offline.crf import GT_PROB, ITERATIONS, check_preset, crf_of_labels, crf_of_scores
from wsis.offline.spread import (
    BETA,
    EDGE_BACKGROUND,
    WALK_ALPHA,
    Guide,
    GuideKind,
    Walker,
    correlate,
    scaled,
)
from wsis.ops.local_affinity import DILATIONS, refine
from wsis.ops.norms import max_norm
from wsis.ops.random_walk import MOST_LOG_STEPS
from wsis.ops.stencil_affinity import MOST_RADIUS
from wsis.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

    from wsis.offline.stored import StoredMaps

Method = Literal["crf", "pamr", "par", "varm", "walk", "pcm", "none"]
Kind = Literal["cams", "probs", "logits"]

ALPHA = 4.0
"""Power of the background, where a method has none of its own: jiwoon-ahn/psa's lower one."""


@dataclass(frozen=True)
class Refinement:
    """How maps become masks.

    Attributes:
        method: ``crf``, ``pamr``, ``par``, ``varm``; ``walk``, a random walk over boundary maps
            (jiwoon-ahn/irn) or AffinityNet features (jiwoon-ahn/psa); ``pcm``, SEAM's pixel
            correlation over features or the image's colours; or ``none`` (argmax alone).
        preset: constants of the CRF.
        kind: what the files hold, where they are no labels. ``cams``: foreground scores in [0, 1],
            map or key k is the class id k + 1. ``probs``: map or key 0 is background. ``logits``:
            the same before a softmax.
        background: constant score of the background beside ``cams``; None for
            ``(1 - max)^alpha``, and for 0.25 after a walk over boundaries, as in IRN.
        alpha: its power; None for 4, and for 16 before a walk over features, as in PSA.
        iterations: of the refinement.
        gt_prob: how sure labels are, for the CRF.
        dilations: of PAMR, PAR and VARM.
        radius: of the walk, pixels of the guide's grid.
        beta: power of the walk's affinities; None for 10 over boundaries, 8 over features.
        log_steps: the walk has ``2^log_steps`` steps.
    """

    method: Method = "crf"
    preset: str = "psa"
    kind: Kind = "cams"
    background: float | None = None
    alpha: float | None = None
    iterations: int = ITERATIONS
    gt_prob: float = GT_PROB
    dilations: tuple[int, ...] = DILATIONS
    radius: int = 5
    beta: float | None = None
    log_steps: int = 8

    def check(self) -> None:
        """InputError for values that mean nothing."""
        if self.method == "crf":
            check_preset(self.preset)
        if self.background is not None and not 0 <= self.background <= 1:
            raise InputError(f"background must be in [0, 1], got {self.background}")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"alpha must be positive, got {self.alpha}")
        if not 0 < self.gt_prob < 1:
            raise InputError(f"gt_prob must be in (0, 1), got {self.gt_prob}")
        if self.iterations < 0:
            raise InputError(f"iterations must be 0 or more, got {self.iterations}")
        if not 1 <= self.radius <= MOST_RADIUS:
            raise InputError(f"radius must be 1 to {MOST_RADIUS}, got {self.radius}")
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise InputError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.log_steps <= MOST_LOG_STEPS:
            raise InputError(f"log_steps must be 0 to {MOST_LOG_STEPS}, got {self.log_steps}")

    def filled(self, guide: GuideKind | None) -> Refinement:
        """With the values that None stands for.

        Args:
            guide: what lies beside the maps.
        """
        walk = guide if self.method == "walk" else None
        background = self.background
        if background is None and walk == "edges" and self.kind == "cams":
            background = EDGE_BACKGROUND
        alpha = WALK_ALPHA if walk == "features" else ALPHA
        return replace(
            self,
            background=background,
            alpha=alpha if self.alpha is None else self.alpha,
            beta=BETA[walk] if walk and self.beta is None else self.beta,
        )


def refine_maps(
    image: np.ndarray,
    stored: StoredMaps,
    how: Refinement,
    device: Any,
    guide: Guide | None = None,
) -> np.ndarray:
    """The mask of one image.

    Maps are resized to the image (bilinear, align_corners=False) and get a background in front;
    then the method, then the argmax, where ties go to the first. A walk over boundaries and PCM
    spread the foreground maps first, on the grid of the guide, and give the background after.

    Args:
        image: ``[H, W, 3] uint8`` RGB.
        stored: its maps or labels.
        how: method and constants.
        device: where to compute.
        guide: what a walk or PCM takes its affinities from.

    Returns:
        ``[H, W] uint8`` class ids.

    Raises:
        InputError: scores outside [0, 1], labels of another size than the image, no background
            among probabilities, a class number that a mask cannot hold, or no guide for a walk.
    """
    size = image.shape[:2]
    how = how.filled(guide.kind if guide else None)
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
            scores = (labels[None] == planes).float()
            best = _best(image, _spread(image, scores, how, guide), how)
    else:
        ids, maps = stored_maps(stored, how.kind, device)
        scores = _scores(image, maps, how, guide)
        ids = [0, *ids] if how.kind == "cams" else ids
        if how.method == "crf":
            best = crf_of_scores(
                image, scores, how.preset, iterations=how.iterations, gt_prob=how.gt_prob
            )
        else:
            best = _best(image, scores, how)
    return np.array(ids, np.uint8)[best.cpu().numpy()]


def stored_maps(stored: StoredMaps, kind: Kind, device: Any) -> tuple[list[int], Tensor]:
    """Class id of each map and the maps ``[n, h, w]`` as they were stored, after a softmax.

    Args:
        stored: maps, no labels.
        kind: what they are; see `Refinement`. Other than ``cams`` they come with the background
            first.
        device: where they are to be.

    Raises:
        InputError: scores outside [0, 1], class numbers that do not fit, or no background.
    """
    assert stored.maps is not None
    first = 1 if kind == "cams" else 0
    ids = [key + first for key in stored.keys]
    if len(set(ids)) < len(ids) or any(not first <= k < IGNORE for k in ids):
        raise InputError(f"class ids must be different and {first}..254, got {ids}")
    maps = torch.from_numpy(stored.maps).to(device)
    if kind == "logits":
        maps = maps.softmax(dim=0)
    elif maps.numel() and (float(maps.max()) > 1.001 or float(maps.min()) < -1.001):
        raise InputError(
            f"{kind} must be in [0, 1], got {float(maps.min()):g} to {float(maps.max()):g}; "
            "for scores before a softmax use --kind logits"
        )
    if kind != "cams":
        if 0 not in ids:
            raise InputError(f"{kind} must have the background under 0, got {ids}")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        return [ids[k] for k in order], maps[order]
    return ids, maps


def _scores(image: np.ndarray, maps: Tensor, how: Refinement, guide: Guide | None) -> Tensor:
    """``[C, H, W]``, background first, spread where the method spreads."""
    size = image.shape[:2]
    if how.kind != "cams":
        return _spread(image, resized(maps, size).clamp(0, 1), how, guide)
    if how.method == "pcm":
        # A mean over many pixels is lower than its largest value: SEAM normalises after it.
        spread = _spread(image, maps.clamp(0, 1), how, guide)
        return with_background(max_norm(spread) if len(spread) else spread, how)
    if how.method == "walk" and guide is not None and guide.kind == "edges":
        return with_background(scaled(_spread(image, maps.clamp(0, 1), how, guide)), how)
    planes = with_background(resized(maps, size).clamp(0, 1), how)
    return _spread(image, planes, how, guide)


def resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """``[n, h, w]`` at the size of the image (bilinear, align_corners=False)."""
    if not len(maps):
        return maps.new_zeros((0, *size))
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def with_background(maps: Tensor, how: Refinement) -> Tensor:
    """``[C, H, W]``: the constant, or ``(1 - max)^alpha``, in front of ``[K, H, W]``."""
    strongest = maps.amax(dim=0) if len(maps) else maps.new_zeros(maps.shape[1:])
    if how.background is not None:
        level = torch.full_like(strongest, how.background)
    else:
        level = (1 - strongest) ** (ALPHA if how.alpha is None else how.alpha)
    return torch.cat([level[None], maps])


def _spread(image: np.ndarray, maps: Tensor, how: Refinement, guide: Guide | None) -> Tensor:
    """The maps ``[n, h, w]`` after a walk or PCM, ``[n, H, W]``; unchanged by other methods."""
    if how.method == "pcm":
        return correlate(maps, guide, image)
    if how.method != "walk":
        return maps
    if guide is None:
        raise InputError("a walk needs boundary maps (--edges) or features (--features), got none")
    walker = Walker(guide, image.shape[:2], radius=how.radius, device=maps.device)
    return walker.walk(maps, beta=how.beta, log_steps=how.log_steps)


def _best(image: np.ndarray, scores: Tensor, how: Refinement) -> Tensor:
    if how.method in ("pamr", "par", "varm") and how.iterations > 0:
        pixels = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]
        scores = refine(
            pixels.contiguous().to(scores.device),
            scores[None],
            how.method,
            iterations=how.iterations,
            dilations=how.dilations,
        )[0]
    return scores.argmax(dim=0)
