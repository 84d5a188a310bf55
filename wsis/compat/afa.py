"""Affinity from attention: rulixiang/afa ``utils/camutils.py`` and ``utils/losses.py``, and ToCo's.

The attention is ``N x N`` by nature and small (``N`` is 400 at AFA's crop). Arguments are not
changed, where the originals zero masked entries in place. For the losses without label matrices see
`wsis.losses.afa_affinity_loss` and `wsis.losses.token_contrast_loss`.

Sizes: ``B`` batch, ``K`` foreground classes, ``h w`` grid of tokens, ``N = h w``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsis.errors import InputError
from wsis.ops.random_walk import attention_propagate, window_mask
from wsis.types import BACKGROUND


def get_mask_by_radius(h: int = 20, w: int = 20, radius: int = 8) -> np.ndarray[Any, Any]:
    """``[N, N]`` of 0 and 1: tokens at most ``radius`` rows and columns apart (dist_train_voc.py).

    Example:
        >>> get_mask_by_radius(1, 3, 1).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    """
    return window_mask(int(h), int(w), int(radius)).numpy().astype(np.float64)


def propagte_aff_cam(cams: Any, aff: Any = None, mask: Any = None) -> Any:
    """Class maps times ``a^2``, columns divided by their sum + 1e-4. The name is theirs.

    Args:
        cams: ``[B, K, h, w]`` float.
        aff: ``[B, N, N]`` float, attention; no gradient reaches it.
        mask: ``[N, N]``, entries where it is 0 take no part; None takes all.

    Returns:
        ``[B, K, h, w]``, differentiable in the maps; numpy for numpy.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> propagte_aff_cam(torch.rand(1, 20, 4, 5), torch.rand(1, 20, 20)).shape
        torch.Size([1, 20, 4, 5])
    """
    if not isinstance(cams, Tensor):
        return propagte_aff_cam(*map(_tensor, (cams, aff, mask))).numpy()
    return attention_propagate(cams, _masked(cams, aff, mask), eps=1e-4)


def propagte_aff_cam_with_bkg(
    cams: Any, aff: Any = None, mask: Any = None, cls_labels: Any = None, bkg_score: Any = None
) -> Any:
    """The same with a background map and a softmax over the image's classes; + 1e-1 instead.

    Args:
        cams: ``[B, K, h, w]`` float in [0, 1].
        aff: ``[B, N, N]`` float, attention; no gradient reaches it.
        mask: ``[N, N]``, entries where it is 0 take no part; None takes all.
        cls_labels: ``[B, K]``, multi-hot.
        bkg_score: constant score of the background.

    Returns:
        ``[B, K + 1, h, w]``, background first, 0 for absent classes; differentiable in the maps;
        numpy for numpy.

    Raises:
        InputError: shapes that do not fit, or an argument is missing.

    Example:
        >>> cams, aff = torch.rand(1, 20, 4, 5), torch.rand(1, 20, 20)
        >>> label = torch.eye(20)[:1]
        >>> propagte_aff_cam_with_bkg(cams, aff, cls_labels=label, bkg_score=0.35).shape
        torch.Size([1, 21, 4, 5])
    """
    if not isinstance(cams, Tensor):
        cams, aff, mask, cls_labels = map(_tensor, (cams, aff, mask, cls_labels))
        return propagte_aff_cam_with_bkg(cams, aff, mask, cls_labels, bkg_score).numpy()
    if cls_labels is None or bkg_score is None:
        raise InputError("cls_labels and bkg_score must be given")
    if cls_labels.shape != cams.shape[:2]:
        raise InputError(f"cls_labels must be {list(cams.shape[:2])}, got {list(cls_labels.shape)}")
    attention = _masked(cams, aff, mask)
    planes = F.pad(cams, (0, 0, 0, 0, 1, 0), value=float(bkg_score))
    present = F.pad(cls_labels.to(cams.device) != 0, (1, 0), value=True)[..., None, None]
    probs = planes.masked_fill(~present, float("-inf")).softmax(dim=1)
    return attention_propagate(probs, attention, eps=1e-1)


def _masked(cams: Tensor, aff: Any, mask: Any) -> Tensor:
    """The attention without gradient, 0 where masked."""
    if cams.dim() != 4 or aff is None:
        raise InputError("cams must be [B, K, h, w] and aff be given")
    batch, tokens = len(cams), cams.shape[2] * cams.shape[3]
    if aff.shape != (batch, tokens, tokens):
        raise InputError(
            f"aff must be [{batch}, {tokens}, {tokens}] for cams {list(cams.shape)}, "
            f"got {list(aff.shape)}"
        )
    if mask is None:
        return aff.detach()
    return aff.detach().masked_fill(torch.as_tensor(mask, device=aff.device) == 0, 0)


def _tensor(array: Any) -> Any:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array))


def cams_to_affinity_label(cam_label: Tensor, mask: Any = None, ignore_index: int = 255) -> Tensor:
    """Label map to labels of all pairs of tokens: 1 same class, 0 not, ``ignore_index``.

    ``[B, N, N] int64`` as there: 8 bytes a pair. `wsis.losses.afa_affinity_loss` needs none of it.

    Args:
        cam_label: ``[B, H, W]`` class ids; taken at every 16th pixel (nearest).
        mask: ``[N, N]``, pairs where it is 0 are ignored; None takes all. ``N`` is
            ``(H // 16) (W // 16)``.
        ignore_index: label of unknown pixels, and of pairs that take no part.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> cams_to_affinity_label(torch.zeros(1, 32, 48)).shape
        torch.Size([1, 6, 6])
    """
    return _pair_labels(token_labels(cam_label), mask, ignore_index)


def token_labels(cam_label: Tensor, stride: int = 16) -> Tensor:
    """``[B, H // 16, W // 16] int64``: the label of each token's first pixel."""
    if cam_label.dim() != 3 or min(cam_label.shape[1:]) < stride:
        raise InputError(
            f"cam_label must be [B, H, W] of at least {stride} pixels a side, "
            f"got {list(cam_label.shape)}"
        )
    size = [side // stride for side in cam_label.shape[1:]]
    return F.interpolate(cam_label[:, None].float(), size, mode="nearest")[:, 0].long()


def label_to_aff_mask(cam_label: Tensor, ignore_index: int = 255) -> Tensor:
    """The same from labels of tokens, a token with itself ignored (ToCo utils/camutils.py).

    Args:
        cam_label: ``[B, h, w]`` class ids of the tokens.
        ignore_index: label of unknown tokens, and of pairs that take no part.

    Returns:
        ``[B, N, N] int64``; `wsis.losses.token_contrast_loss` needs none of it.

    Example:
        >>> label_to_aff_mask(torch.tensor([[[0, 4]]])).tolist()
        [[[255, 0], [0, 255]]]
    """
    labels = _pair_labels(cam_label, None, ignore_index)
    labels.diagonal(dim1=1, dim2=2).fill_(ignore_index)
    return labels


def _pair_labels(label: Tensor, mask: Any, ignore_index: int) -> Tensor:
    flat = label.flatten(1)
    unknown = flat == ignore_index
    pairs = (flat[:, None, :] == flat[:, :, None]).long()
    pairs.masked_fill_(unknown[:, None, :] | unknown[:, :, None], ignore_index)
    if mask is not None:
        window = torch.as_tensor(mask, device=pairs.device)
        if window.shape != pairs.shape[1:]:
            raise InputError(f"mask must be {list(pairs.shape[1:])}, got {list(window.shape)}")
        pairs.masked_fill_(window == 0, ignore_index)
    return pairs


def get_aff_loss(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``½ Σ_pos (1 - a) / n_pos + ½ Σ_neg a / n_neg`` with counts + 1 (rulixiang/afa losses.py).

    Args:
        inputs: ``[B, N, N]`` float in [0, 1], differentiable.
        targets: the same shape: 1 same class, 0 not, anything else ignored.

    Returns:
        ``loss, pos_count, neg_count``, scalars; the counts are with their + 1.
    """
    positive, negative = targets == 1, targets == 0
    pos_count, neg_count = positive.sum() + 1, negative.sum() + 1
    pos_loss = torch.where(positive, 1 - inputs, 0).sum() / pos_count
    neg_loss = torch.where(negative, inputs, 0).sum() / neg_count
    return 0.5 * pos_loss + 0.5 * neg_loss, pos_count, neg_count


def get_masked_ptc_loss(inputs: Tensor, mask: Tensor) -> Tensor:
    """ToCo's token contrast from a matrix of pairs (rulixiang/ToCo model/losses.py).

    Args:
        inputs: ``[B, D, h, w]`` float, differentiable.
        mask: ``[B, N, N]`` of `label_to_aff_mask`.

    Returns:
        Scalar.
    """
    unit = F.normalize(inputs.flatten(2), dim=1, eps=1e-8)
    cosine = (unit.transpose(1, 2) @ unit).abs()
    positive, negative = mask == 1, mask == 0
    pos_mean = torch.where(positive, cosine, 0).sum() / (positive.sum() + 1)
    neg_mean = torch.where(negative, cosine, 0).sum() / (negative.sum() + 1)
    return 0.5 * (1 - pos_mean) + 0.5 * neg_mean


def get_seg_loss(pred: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Half the cross-entropy over background pixels, half that over foreground pixels.

    A batch without pixels of one kind gives 0 for it, where the original gives NaN.

    Args:
        pred: ``[B, C, H, W]`` float logits, differentiable.
        label: ``[B, H, W]`` class ids.
        ignore_index: label of unknown pixels; must not be a class id.

    Returns:
        Scalar.
    """
    label = label.long()
    known = label != ignore_index
    target = torch.where(known, label, -100)
    loss = F.cross_entropy(pred, target, ignore_index=-100, reduction="none")
    parts = []
    for chosen in (known & (label == BACKGROUND), known & (label != BACKGROUND)):
        parts.append(torch.where(chosen, loss, 0).sum() / chosen.sum().clamp(min=1))
    return 0.5 * (parts[0] + parts[1])
