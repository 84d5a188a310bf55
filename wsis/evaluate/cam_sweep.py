"""Stored CAMs against ground truth: every power and background score from one walk per power.

The walk of `wsis.offline.spread` is run once for each image and power; all background scores of it
are counted in one pass over the pixels (`wsis.ops.threshold_curve`). The repositories walk, refine
or read every file again for each candidate.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wsis.data.threads import in_threads
from wsis.engine import distributed
from wsis.errors import InputError
from wsis.evaluate.cam_candidates import Sweep, background_words, describe
from wsis.evaluate.conventions import get_convention, scores
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.segmentation import (
    Curve,
    images_to_score,
    with_bar,
)
from wsis.offline.refine import Refinement, resized, stored_maps, with_background
from wsis.offline.refine_folder import by_stem
from wsis.offline.spread import Walker, read_guide, scaled
from wsis.offline.stored import read_maps

if TYPE_CHECKING:
    from wsis.data.dataset import Dataset


def sweep_cams(
    cams: StoredCams, *, convention: str = "voc", protocol: str = "", workers: int = 2
) -> dict[str, Any]:
    """Score stored CAMs, and their walks, under every candidate.

    Files are read ahead; processes that torchrun started share the images out and all return the
    same.

    The CAMs as they are stand beside the walks, for comparison; the best candidate is one of the
    walks where there are any.

    Args:
        cams: the images and the candidates.
        convention: name of the mean IoU convention.
        protocol: name of the protocol of CAMs that was asked for (`wsis.evaluate.named`).
        workers: threads that read; 0 has none.

    Returns:
        JSON-ready: ``protocol``; ``candidate``: name of what ``candidates`` are; ``rows``: per
        power ``beta`` (None: the CAMs as they are), ``miou`` of each candidate, ``best_miou`` and
        ``best``; ``best``: ``beta``, ``value``, ``miou`` and ``chosen``; ``scores`` and
        ``confusion`` of the best.

    Raises:
        InputError: a file is damaged or holds something else.
    """
    get_convention(convention)
    how, size = cams.how, len(cams.dataset.classes) + 1
    # Alphas are counted by rank, see `Case.count`.
    levels = range(len(how.alphas)) if how.by_alpha else how.backgrounds
    rows: list[float | None] = [None, *how.betas]
    curves = [Curve(size, levels) for _ in rows]

    def read(index: int) -> tuple[Case, np.ndarray]:
        return cams.read(index), cams.dataset.mask(index)

    def count() -> Generator[None, None, None]:
        reading = in_threads(read, distributed.share(cams.indices), workers=workers)
        with closing(reading):
            for case, truth in reading:
                for curve, beta in zip(curves, rows, strict=True):
                    case.count(curve, beta, truth)
                yield

    with closing(count()) as counting:
        for _ in with_bar(counting, len(cams.indices), "sweep"):
            pass
    for curve in curves:
        curve.merge()
    return _result(curves, rows, cams, convention, protocol)


class StoredCams:
    """Stored CAMs of a data set's images, and what they walk over.

    Classes that are not in an image's label are left out, as the repositories do.

    Args:
        maps: folder with a file of CAMs for every image; see `wsis.offline.stored`.
        dataset: images, image-level labels and masks.
        how: the candidates.
        limit: only so many images, spread evenly over the list.
        device: where to walk.

    Raises:
        InputError: a file is missing, no image has a mask, or candidates that mean nothing.
    """

    def __init__(
        self,
        maps: str | Path,
        dataset: Dataset,
        how: Sweep,
        *,
        limit: int | None = None,
        device: Any = "cpu",
    ) -> None:
        how.check()
        self.folder, self.dataset, self.how, self.device = Path(maps), dataset, how, device
        self.indices = images_to_score(dataset, limit)
        self._files = by_stem(self.folder, {".npy", ".npz"}, "CAMs")
        self._check(self._files, self.folder, "CAMs")
        self._guides = how.guides.files() if how.guides else {}
        if how.guides:
            self._check(self._guides, how.guides.folder, how.guides.kind)

    def read(self, index: int) -> Case:
        """One image; InputError names the file that does not fit."""
        how, name = self.how, self.dataset.ids[index]
        file, label = self._files[name], self.dataset.labels[index]
        size = self.dataset.image_size(index)
        stored = read_maps(file, coarse=how.guides is not None and how.guides.kind == "edges")
        try:
            if stored.maps is None:
                raise InputError("expected CAMs, got labels")
            ids, maps = stored_maps(stored, "cams", self.device)
            if any(k > len(label) for k in ids):
                raise InputError(f"class ids must be 1..{len(label)}, got {ids}")
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        kept = [place for place, k in enumerate(ids) if label[k - 1]]
        walker = None
        if how.guides:
            guide = read_guide(self._guides[name], how.guides.kind)
            walker = Walker(guide, size, radius=how.radius, device=self.device)
        return Case(how, size, [ids[k] for k in kept], maps[kept].clamp(0, 1), walker)

    def _check(self, found: dict[str, Path], folder: Path, what: str) -> None:
        names = [self.dataset.ids[index] for index in self.indices]
        missing = [name for name in names if name not in found]
        if missing:
            raise InputError(
                f"{folder}: no {what} for {len(missing)} of {len(names)} images, the first is "
                f"'{missing[0]}'"
            )


@dataclass(frozen=True)
class Case:
    """One image.

    Attributes:
        how: the candidates.
        size: its height and width.
        ids: class ids of the maps.
        maps: ``[K, h, w]`` in [0, 1], as stored.
        walker: the affinities of its guide, or None.
    """

    how: Sweep
    size: tuple[int, int]
    ids: list[int]
    maps: Tensor
    walker: Walker | None

    def planes(self, beta: float | None) -> tuple[Tensor, Tensor]:
        """Backgrounds of the alphas ``[A, H, W]`` and the foreground ``[K, H, W]``.

        Args:
            beta: power of the walk; None for the maps as they are.
        """
        how, walker = self.how, self.walker
        over_edges = walker is not None and not how.by_alpha
        if beta is not None and walker is not None and over_edges:
            walked = scaled(walker.walk(self.maps, beta=beta, log_steps=how.log_steps))
            return walked[:0], walked
        maps = resized(self.maps, self.size)
        levels = [with_background(maps, Refinement(alpha=alpha))[:1] for alpha in how.alphas]
        planes = torch.cat([*levels, maps])
        if beta is not None and walker is not None:
            planes = walker.walk(planes, beta=beta, log_steps=how.log_steps)
        return planes[: len(levels)], planes[len(levels) :]

    def mask(self, beta: float | None, value: float) -> np.ndarray:
        """``[H, W] uint8`` class ids of one candidate."""
        levels, maps = self.planes(beta)
        if self.how.by_alpha:
            level = levels[self.how.alphas.index(value)]
        else:
            level = torch.full(self.size, value, device=maps.device)
        best = torch.cat([level[None], maps]).argmax(dim=0)
        return np.array([0, *self.ids], np.uint8)[best.cpu().numpy()]

    def count(self, curve: Curve, beta: float | None, truth: np.ndarray) -> None:
        """Adds the image at all candidates to a curve; with alphas the largest is level 0."""
        levels, maps = (planes.cpu().numpy() for planes in self.planes(beta))
        ids = self.ids
        if not len(maps):
            maps, ids = np.full((1, *self.size), -1.0), [1]
        elif self.how.by_alpha:
            # (1 - max)^alpha falls with alpha, and a walk of non-negative weights keeps that: a
            # pixel is foreground for the largest alphas, and their number decides like a score.
            number = (maps.max(axis=0) > levels).sum(axis=0)
            best = np.arange(len(maps))[:, None, None] == maps.argmax(axis=0)
            maps = np.where(best, number, -1)
        curve.add(maps.astype(np.float32), truth, ids)


def _result(
    curves: list[Curve],
    rows: list[float | None],
    cams: StoredCams,
    convention: str,
    name: str,
) -> dict[str, Any]:
    how, table = cams.how, []
    for curve, beta in zip(curves, rows, strict=True):
        # The first level of alphas is the largest alpha: see `Case.count`.
        matrices = curve.confusion[::-1] if how.by_alpha else curve.confusion
        miou = [scores(matrix, convention).miou for matrix in matrices]
        best = int(np.argmax([-1.0 if value is None else value for value in miou]))
        table.append(
            {"beta": beta, "miou": miou, "best_miou": miou[best], "best": how.candidates[best]}
        )
    walked = table[1:] or table
    best_row = max(walked, key=lambda row: -1.0 if row["best_miou"] is None else row["best_miou"])
    row, place = table.index(best_row), how.candidates.index(best_row["best"])
    place = len(how.alphas) - 1 - place if how.by_alpha else place
    matrix = curves[row].confusion[place]
    best_of_all = {
        "beta": best_row["beta"],
        "value": best_row["best"],
        "miou": best_row["best_miou"],
        "chosen": how.chosen,
    }
    protocol = Protocol(
        scales=(),
        background=None if how.by_alpha or len(how.candidates) > 1 else how.candidates[0],
        background_choice=background_words(how),
        image_labels=True,
        convention=convention,
        name=name,
        subject=describe(how, best_of_all),
    ).on(cams.dataset, cams.indices)
    return {
        "protocol": protocol.as_dict(),
        "candidate": "alpha" if how.by_alpha else "background",
        "candidates": list(how.candidates),
        "rows": table,
        "best": best_of_all,
        "scores": scores(matrix, convention).as_dict(),
        "confusion": matrix.tolist(),
    }
