"""How good CAM seeds and pseudo masks are, on training images whose labels are given."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wsis.engine import distributed
from wsis.evaluate.conventions import Tally
from wsis.evaluate.protocols import DEFAULT, Protocol
from wsis.evaluate.segmentation import (
    THRESHOLDS,
    WITH_TRUTH,
    Coverage,
    Curve,
    images_to_score,
    with_bar,
)
from wsis.offline.cams import pseudo_mask, seeds_of
from wsis.offline.predict import Pass
from wsis.offline.stream import stream_passes
from wsis.pseudo import PseudoRule

if TYPE_CHECKING:
    from PIL import Image

    from wsis.data.dataset import Dataset
    from wsis.models.network import Network

FIXED = (0.17, 0.2)
"""Background scores at which seeds are also scored: RTC's at test time, and its training's."""


def evaluate_cams(
    model: Network,
    dataset: Dataset,
    *,
    protocol: Protocol = DEFAULT,
    rule: PseudoRule | None = None,
    limit: int | None = None,
    device: torch.device | str | None = None,
    loader: str = "torch",
    workers: int = 2,
) -> dict[str, Any]:
    """Score the CAM seeds and the two-threshold pseudo masks of a training list.

    In a stream and shared out over processes like `wsis.evaluate.segmentation`.

    Args:
        model: the network, see `wsis.offline.predict.predict`.
        dataset: images, image-level labels (given to the method) and masks (for scoring only).
        protocol: its scales, flip, base_long, convention and checkpoint are used; background,
            gate and image labels are set to what happens here.
        rule: thresholds and refinement of the pseudo masks; RTC's by default.
        limit: only so many images, spread evenly over the list.
        device: where the passes run; by default where the network's parameters lie.
        loader: what decodes and resizes the images: `torch`, `dali` or `auto`.
        workers: threads that read, and as many that make masks and score; 0 has none.

    Returns:
        JSON-ready: ``protocol``; ``cam`` and ``refined`` (None for a model without refinement),
        each the curve over background scores 0..0.59, whose best value is chosen with ground
        truth, and ``fixed``: mean IoU at 0.17 and 0.20; ``pseudo``: ``scores`` with 255 counted
        ``wrong`` and with 255 ``ignored``, ``coverage`` in percent, and the rule's constants.

    Raises:
        InputError: the data set has no masks, or one is missing.
    """
    rule = rule or PseudoRule()
    indices = images_to_score(dataset, limit)
    size = len(dataset.classes) + 1
    protocol = replace(
        protocol.on(dataset, indices),
        subject="CAM seeds and pseudo masks",
        background=None,
        background_choice=f"swept 0 to 0.59, {WITH_TRUTH}",
        gate=False,
        fuse="sum, then normalised per class",
        class_cut=None,
        name="",
        image_labels=True,
    )
    curves = {"cam": Curve(size), "refined": Curve(size)}
    wrong = Tally(size, protocol.convention, unsure="wrong")
    ignored = Tally(size, protocol.convention, unsure="ignored")
    coverage = Coverage()

    def score(
        index: int, image: Image.Image, passes: list[Pass], truth: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        label, name = dataset.labels[index], dataset.ids[index]
        seeds = seeds_of(passes, image, label)
        curves["cam"].add(seeds.cam.numpy(), truth)
        if seeds.refined is not None:
            curves["refined"].add(seeds.refined.numpy(), truth)
        mask = pseudo_mask(seeds.best, image, label, rule)
        coverage.add(mask, truth)
        counts = [tally.count(mask, truth, name) for tally in (wrong, ignored)]
        return counts[0], counts[1], seeds.refined is not None

    has_refined = False
    scoring = stream_passes(
        model,
        dataset,
        distributed.share(indices),
        score,
        **protocol.passes(),
        decode=False,
        beside=dataset.mask,
        loader=loader,
        workers=workers,
        device=device,
    )
    with closing(scoring):
        for missed, left_out, refined in with_bar(scoring, len(indices), "CAM seeds"):
            wrong.take(missed)
            ignored.take(left_out)
            has_refined |= refined
    for curve in curves.values():
        curve.merge()
    coverage.merge()
    return {
        "protocol": protocol.as_dict(),
        "cam": _seed_result(curves["cam"], protocol.convention),
        "refined": (_seed_result(curves["refined"], protocol.convention) if has_refined else None),
        "pseudo": {
            "wrong": wrong.scores().as_dict(),
            "ignored": ignored.scores().as_dict(),
            "coverage": coverage.percent(),
            "rule": rule.arguments() | {"dilations": list(rule.dilations)},
        },
    }


def _seed_result(curve: Curve, convention: str) -> dict[str, Any]:
    result = curve.as_dict(convention)
    position = {round(value, 4): index for index, value in enumerate(THRESHOLDS.tolist())}
    fixed = {f"{value:.2f}": result["miou"][position[value]] for value in FIXED}
    return {**result, "fixed": fixed}
