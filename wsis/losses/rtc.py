"""The losses of RTC, combined (Wang et al., arXiv 2309.00871; ChunyanWang1/RTC contrast_train.py).

Sizes: ``B`` batch, ``K`` foreground classes, ``C = K + 1`` with background at 0, ``H W`` image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from wsis.errors import InputError
from wsis.global_batch import gather
from wsis.losses import compensator, contrast, equivariance
from wsis.losses.classification import min_pooling, multilabel_soft_margin, single_label
from wsis.losses.contrast import BackgroundPrototype
from wsis.losses.segmentation import segmentation_loss
from wsis.ops.normalize import as_float, ctr_scores
from wsis.ops.resize import resize

if TYPE_CHECKING:
    from torch import Tensor

    from wsis.types import Maps

CLASSIFICATION = {"multilabel": multilabel_soft_margin, "single": single_label}
CTR_TERMS = ("ctr_intra", "ctr_label", "ctr_prototype")


@dataclass(frozen=True)
class RtcWeights:
    """Weights and constants of the loss; the defaults are those of ChunyanWang1/RTC.

    A weight of 0 for ``ctr``, ``com`` or ``seg`` leaves these terms out altogether.

    Attributes:
        classification: ``multilabel`` (soft margin: the paper's), or ``single``, the cross-entropy
            of images with exactly one label, for localization. The paper's localization was never
            released: this is a reconstruction.
        cls: weight of the classification loss.
        min_pool: weight of minimum pooling.
        er: weight of the equivariance of CAMs.
        ecr: weight of the equivariance of refined CAMs.
        ctr: weight of the sum of the three contrastive terms.
        com: weight of the compensator.
        seg: weight of the segmentation loss.
        min_pool_fraction: part of the positions that is pushed to zero.
        ecr_keep: part of the entries kept as hardest.
        com_keep: the same for the compensator.
        nce_scale: factor inside each contrastive term.
        tau: temperature of the contrast.
        ctr_background: background constant of the scores.
        top_divisor: one position in ``top_divisor`` of one image's grid makes a prototype (256 // 8
            = 32 on the paper's 16 x 16 grid), out of the whole batch.
        attention_temperature: of the compensator.
        background_prototype: ``ties`` or ``confident``, see :func:`contrast.top_positions`.
        mask_topk_by_label: only images of a class offer positions for its prototype.
        clamp_scores: raise negative scores to 0.
        contrast_start: share of the epochs after which contrast and compensator join. 0 in the
            release; from random weights the contrast collapses the features before the CAMs mean
            anything, so training from scratch starts without it. Read by the training loop.
        seg_gate: only images whose pseudo mask shows all their classes.
        seg_balance: weigh classes by their rarity in the image.
    """

    classification: Literal["multilabel", "single"] = "multilabel"
    cls: float = 1.0
    min_pool: float = 1.0
    er: float = 1.0
    ecr: float = 1.0
    ctr: float = 1.0
    com: float = 1.0
    seg: float = 1.0
    min_pool_fraction: float = 0.25
    ecr_keep: float = 0.2
    com_keep: float = 0.8
    nce_scale: float = 0.1
    tau: float = 0.1
    ctr_background: float = 0.2
    top_divisor: int = 8
    attention_temperature: float = 1.0
    background_prototype: BackgroundPrototype = "ties"
    mask_topk_by_label: bool = False
    clamp_scores: bool = False
    contrast_start: float = 0.0
    seg_gate: bool = True
    seg_balance: bool = True

    @classmethod
    def official(cls) -> RtcWeights:
        """The released code, quirks included: background prototype by ties, unmasked top-k."""
        return cls()

    @classmethod
    def reconstructed(cls) -> RtcWeights:
        """What the released code means: confident background, top-k among images of the class."""
        return replace(
            cls(), background_prototype="confident", mask_topk_by_label=True, clamp_scores=True
        )


def rtc_losses(
    view1: Maps,
    view2: Maps,
    label: Tensor,
    *,
    image_size: tuple[int, int],
    view2_size: int | tuple[int, int],
    weights: RtcWeights | None = None,
    pseudo_masks: Tensor | None = None,
    counts: equivariance.ClassCounts | None = None,
    classes: Tensor | None = None,
) -> dict[str, Tensor]:
    """All loss terms of one training step, computed in float32.

    Args:
        view1: maps of the images.
        view2: maps of the second, smaller view. Its input size is the common grid of the
            equivariance losses, its feature grid that of the contrast.
        label: ``[B, K]``, multi-hot.
        image_size: ``(H, W)`` of view 1.
        view2_size: size of view 2, one number when square.
        weights: weights and constants; RTC's by default.
        pseudo_masks: ``[B, H, W] int64``, 0..K and 255; None leaves the segmentation loss out, as
            in the first epochs.
        counts: of `label`, where the caller has it on the CPU: then nothing waits for the device.
        classes: ``[M] int64``, the classes that CAMs and refined CAMs have, all of the batch's
            among them; None where they have all. Prototypes and contrast are then of these and
            background only. Means count K classes either way.

    Returns:
        Scalars before their weights: ``cls``, ``er``; with refined CAMs also ``min_pool``, ``ecr``,
        ``ctr_intra``, ``ctr_label``, ``ctr_prototype``, ``com``; with pseudo masks ``seg``; and the
        weighted sum ``total``.

    Raises:
        InputError: pseudo masks without decoder logits.
    """
    weights = RtcWeights() if weights is None else weights
    with torch.autocast(label.device.type, enabled=False):
        label = label.float()
        counts = equivariance.count_classes(label) if counts is None else counts
        grid = (view2_size, view2_size) if isinstance(view2_size, int) else view2_size
        views = (view1, view2)
        classify = CLASSIFICATION[weights.classification]
        terms = {"cls": _mean([classify(as_float(v.class_logits), label) for v in views])}
        chosen = label if classes is None else label[:, classes]
        sizes = ((image_size[0], image_size[1]), grid)
        terms |= _map_terms(views, chosen, label.shape[1], sizes, weights, counts)
        if pseudo_masks is not None and weights.seg:
            if view1.logits is None:
                raise InputError(
                    "pseudo masks were given but view 1 has no decoder logits, "
                    "expected [B, C, h, w]; run the model on view 1 with decode=True"
                )
            terms["seg"] = segmentation_loss(
                as_float(view1.logits),
                pseudo_masks,
                label,
                gate=weights.seg_gate,
                balance=weights.seg_balance,
            )
        total = sum(
            getattr(weights, "ctr" if name in CTR_TERMS else name) * term
            for name, term in terms.items()
        )
        return terms | {"total": total}


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _map_terms(
    views: tuple[Maps, Maps],
    label: Tensor,
    classes: int,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    weights: RtcWeights,
    counts: equivariance.ClassCounts,
) -> dict[str, Tensor]:
    """Terms between CAMs and refined CAMs; view 2's size is the common grid.

    `label` has the maps' channels; `classes` is K, over which means are taken.
    """
    grid = sizes[1]
    index, present = equivariance.present_classes(label, counts.image)

    cams = []
    for view, size in zip(views, sizes, strict=True):
        up = resize(equivariance.take_channels(as_float(view.cams), index), size)
        cams.append(equivariance.on_common_grid(up, present, grid))
    terms = {"er": equivariance.equivariance(cams[0], cams[1], classes)}
    if views[0].refined is None:
        return terms

    with_background = torch.cat([torch.zeros_like(index[:, :1]), index + 1], dim=1)
    present_all = torch.cat([torch.ones_like(present[:, :1]), present], dim=1)
    weakest, refined = [], []
    for view, size in zip(views, sizes, strict=True):
        assert view.refined is not None  # both views have one, or none
        up = equivariance.take_channels(as_float(view.refined), with_background)
        up = resize(up, size)
        weakest.append(min_pooling(up[:, 1:], present, weights.min_pool_fraction))
        refined.append(equivariance.on_common_grid(up, present_all, grid))
    terms["min_pool"] = _mean(weakest)
    directions = [
        equivariance.cross_refinement(cams[other], refined[v], classes, weights.ecr_keep)
        for v, other in ((0, 1), (1, 0))
    ]
    terms["ecr"] = torch.stack(directions).sum()

    if weights.ctr or weights.com:
        classes_present = equivariance.classes_of_batch(label, counts.batch)
        selection = (index, present, classes_present)
        terms |= _contrast_terms(views, label, classes, cams, selection, weights)
    return terms


def _contrast_terms(
    views: tuple[Maps, Maps],
    label: Tensor,
    count: int,
    cams: list[Tensor],
    selection: tuple[Tensor, Tensor, Tensor],
    weights: RtcWeights,
) -> dict[str, Tensor]:
    """Contrastive terms and compensator, on the feature grid of view 2; `count` is K."""
    height, width = views[1].features.shape[-2:]
    best = max(height * width // weights.top_divisor, 1)
    scores, labels, tops, features, pools = [], [], [], [], []
    for view in views:
        features.append(contrast.batch_positions(resize(as_float(view.features), (height, width))))
        pools.append(gather(features[-1]))
        assert view.refined is not None
        with torch.no_grad():
            refined = resize(as_float(view.refined), (height, width))
            scores.append(ctr_scores(refined, weights.ctr_background, weights.clamp_scores))
            labels.append(contrast.pixel_labels(scores[-1], label))
            tops.append(
                contrast.top_positions(
                    gather(scores[-1]),
                    gather(label),
                    best,
                    background=weights.background_prototype,
                    mask_by_label=weights.mask_topk_by_label,
                )
            )
    units = [F.normalize(x, dim=1) for x in features]

    terms = {}
    if weights.ctr:
        with torch.no_grad():  # of each view's positions, the other view's features
            anchors = [contrast.prototypes(tops[v], pools[other]) for v, other in ((0, 1), (1, 0))]
        pairings = {  # per view: whose prototypes, whose pixel labels
            "ctr_intra": ((0, 0), (1, 1)),
            "ctr_label": ((0, 1), (1, 0)),
            "ctr_prototype": ((1, 0), (0, 1)),
        }
        for name, pairing in pairings.items():
            per_view = [
                contrast.prototype_nce(units[v], *anchors[p], labels[t], weights.tau)
                for v, (p, t) in enumerate(pairing)
            ]
            terms[name] = weights.nce_scale * _mean(per_view)
    if weights.com:
        index, present, classes = selection
        per_view = []
        for v, other in ((0, 1), (1, 0)):
            completed = compensator.compensate(
                scores[v],
                tops[v],
                units[other].detach(),
                F.normalize(pools[other], dim=1),
                classes + 1,
                weights.attention_temperature,
            )
            per_view.append(
                compensator.compensation(
                    cams[v], completed, index, present, count, weights.com_keep
                )
            )
        terms["com"] = torch.stack(per_view).sum()
    return terms
