"""Functions that other projects keep in ``camutils.py`` and ``visualization.py``.

Sizes: ``B`` batch, ``K`` foreground classes, ``H W`` image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wsis.compat.refiners import PAMR, PAR, VARM
from wsis.errors import InputError
from wsis.ops import normalize
from wsis.pseudo import make_pseudo_masks
from wsis.types import BACKGROUND, IGNORE

if TYPE_CHECKING:
    from torch import Tensor


@torch.no_grad()
def refine_cams_with_bkg_v2(
    ref_mod: Callable[[Tensor, Tensor], Tensor] | None = None,
    images: Tensor | None = None,
    cams: Tensor | None = None,
    cls_labels: Tensor | None = None,
    high_thre: Any = None,
    low_thre: Any = None,
    ignore_index: Any = False,
    img_box: Any = None,
    down_scale: int = 2,
    *,
    cfg: Any = None,
) -> Tensor:
    """Two-threshold pseudo masks, in both forms that are about.

    rulixiang/ToCo and its descendants give the thresholds: ``(ref_mod, images, cams, cls_labels,
    high_thre, low_thre, ignore_index, img_box, down_scale)``. rulixiang/afa and ExCEL give ``cfg``
    in the fifth place, or by name, and then ``img_box, down_scale``; read from it are
    ``cfg.cam.high_thre``, ``cfg.cam.low_thre`` and ``cfg.dataset.ignore_index``.

    With ``PAMR``, ``PAR`` or ``VARM`` of this package the whole batch is one call of
    :func:`wsis.pseudo.make_pseudo_masks`; any other ``ref_mod(images, cams)`` is called per image
    and threshold, as there.

    Args:
        ref_mod: the refinement, also inside ``DataParallel``.
        images: ``[B, 3, H, W]`` float, on the scale that ``ref_mod`` expects.
        cams: ``[B, K, H, W]`` float in [0, 1].
        cls_labels: ``[B, K]``, multi-hot.
        high_thre: background score below which a class is not trusted, or ``cfg``.
        low_thre: background score above which background is not trusted; after a positional
            ``cfg``, the boxes.
        ignore_index: value of undecided pixels; after a positional ``cfg``, ``down_scale``. The
            default ``False`` is 0, as there.
        img_box: ``[B, 4]`` integers or B boxes ``(y0, y1, x0, x1)``, half open; None: whole images.
        down_scale: divisor of the size at which masks are refined.
        cfg: the configuration of the second form.

    Returns:
        ``[B, H, W] float32`` on the device of ``cams``: 0 background, 1..K class ids, or
        ``ignore_index``. No gradient.

    Raises:
        InputError: no ``ref_mod``, shapes that do not fit, or ``low_thre > high_thre``.
    """
    if hasattr(high_thre, "cam"):
        cfg, high_thre = high_thre, None
        img_box = low_thre if img_box is None else img_box
        down_scale = ignore_index or down_scale
    if cfg is not None:
        high_thre, low_thre = cfg.cam.high_thre, cfg.cam.low_thre
        ignore_index = cfg.dataset.ignore_index
    if not callable(ref_mod):
        raise InputError(f"ref_mod must be a module or function, got {type(ref_mod).__name__}")
    if images is None or cams is None or cls_labels is None:
        raise InputError("images, cams and cls_labels must be given")
    if high_thre is None or low_thre is None:
        raise InputError(f"thresholds must be given, got high {high_thre} and low {low_thre}")
    size, batch = tuple(cams.shape[-2:]), len(cams)
    box = _boxes(img_box, batch, size).to(cams.device)
    thresholds = float(high_thre), float(low_thre)
    module: Any = ref_mod.module if isinstance(ref_mod, nn.DataParallel) else ref_mod
    if type(module) in (PAMR, PAR, VARM):
        masks = make_pseudo_masks(
            cams,
            images,
            cls_labels,
            box,
            high=thresholds[0],
            low=thresholds[1],
            refine=module.kind,
            iterations=module.num_iter,
            dilations=tuple(module.dilations),
            down_scale=down_scale,
        )
    else:
        masks = _each_image(ref_mod, images, cams, cls_labels, thresholds, down_scale)
        _ignore_outside(masks, box, IGNORE)
    return masks.float().masked_fill_(masks == IGNORE, float(ignore_index))


def _each_image(
    refine: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    cams: Tensor,
    label: Tensor,
    thresholds: tuple[float, float],
    down_scale: int,
) -> Tensor:
    """The same rule with a refinement that knows nothing of batches."""
    size = tuple(cams.shape[-2:])
    reduced = (max(size[0] // down_scale, 1), max(size[1] // down_scale, 1))
    small_images, small_cams = (
        F.interpolate(x, reduced, mode="bilinear", align_corners=False) for x in (images, cams)
    )
    masks = torch.empty(len(cams), *size, dtype=torch.int64, device=cams.device)
    for b in range(len(cams)):
        present = label[b].nonzero().flatten()
        ids = torch.cat([present.new_zeros(1), present + 1])
        maps = []
        for value in thresholds:
            background = torch.full_like(small_cams[b : b + 1, :1], value)
            stack = torch.cat([background, small_cams[b : b + 1, present]], dim=1).softmax(dim=1)
            refined = refine(small_images[b : b + 1], stack)
            refined = F.interpolate(refined, size, mode="bilinear", align_corners=False)
            maps.append(ids[refined[0].max(dim=0).indices])
        high, low = maps
        masks[b] = high.masked_fill((high == BACKGROUND) & (low != BACKGROUND), IGNORE)
    return masks


def cam_to_label(
    cam: Tensor,
    cls_label: Tensor,
    img_box: Any = None,
    bkg_thre: float | None = None,
    high_thre: float | None = None,
    low_thre: float | None = None,
    ignore_mid: bool = False,
    ignore_index: int | None = None,
    *,
    cfg: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Class activation maps to a label map by thresholds (rulixiang/afa, ToCo utils/camutils.py).

    The best labelled class where it is above ``bkg_thre``, else 0. With ``ignore_mid`` further:
    ``ignore_index`` up to ``high_thre``, and of that 0 up to ``low_thre``. As there, all
    comparisons put a tie below the threshold, and **without boxes only the label map is
    returned**, by ``bkg_thre`` whatever ``ignore_mid`` says.

    Args:
        cam: ``[B, K, H, W]`` float, foreground only, in [0, 1].
        cls_label: ``[B, K]``, multi-hot.
        img_box: ``[B, 4]`` integers or B boxes ``(y0, y1, x0, x1)``, half open, or None.
        bkg_thre: threshold of the single rule; with ``ignore_mid`` and boxes it may be left out.
        high_thre: upper threshold of ``ignore_mid``.
        low_thre: lower threshold of ``ignore_mid``.
        ignore_mid: use the pair of thresholds.
        ignore_index: value between them and outside the boxes.
        cfg: gives thresholds and ``ignore_index`` in AFA's form: ``cfg.cam.bkg_score``,
            ``cfg.cam.high_thre``, ``cfg.cam.low_thre``, ``cfg.dataset.ignore_index``.

    Returns:
        ``(valid_cam, label)``: ``[B, K, H, W]``, the maps times the label, and
        ``[B, H, W] int64``; only ``label`` if ``img_box`` is None.

    Raises:
        InputError: shapes that do not fit, or a threshold that is needed is missing.
    """
    if cfg is not None:
        bkg_thre, ignore_index = cfg.cam.bkg_score, cfg.dataset.ignore_index
        high_thre, low_thre = cfg.cam.high_thre, cfg.cam.low_thre
    if cam.ndim != 4 or cls_label.shape != cam.shape[:2]:
        raise InputError(
            f"cam must be [B, K, H, W] and cls_label [B, K], got {list(cam.shape)} and "
            f"{list(cls_label.shape)}"
        )
    if img_box is None:
        return normalize.cams_to_labels(cam, cls_label, low=_needed("bkg_thre", bkg_thre))
    outside = int(_needed("ignore_index", ignore_index))
    box = _boxes(img_box, len(cam), tuple(cam.shape[-2:])).to(cam.device)
    cut = partial(normalize.cams_to_labels, cam, cls_label, valid_box=box, ignore_index=outside)
    valid_cam = cam * cls_label[..., None, None]
    if not ignore_mid:
        return valid_cam, cut(low=_needed("bkg_thre", bkg_thre))
    high, low = _needed("high_thre", high_thre), _needed("low_thre", low_thre)
    label = cut(low=low, high=high)
    if bkg_thre is not None and bkg_thre > high:
        label = torch.where(label == outside, label, cut(low=bkg_thre))
    return valid_cam, label


def max_norm(p: Any, version: str = "torch", e: float = 1e-5) -> Any:
    """Min-max normalisation of positive evidence (SEAM and RTC, tool/visualization.py).

    ``torch``: ``[p+ - min - e]+ / (max - min + e)`` with ``p+ = [p]+``, differentiable. ``numpy``:
    ``(p' - min - e) / (max + e)`` with ``p' = p+`` but 0 below ``min + e``: zeros end slightly
    below 0, and the divisor is another.

    Args:
        p: ``[K, H, W]`` or ``[B, K, H, W]`` float, tensor or array; not changed.
        version: which formula, ``torch`` or ``numpy`` (also spelt ``np``).
        e: dead zone and guard of the division.

    Returns:
        Same shape and kind; per map, at most 1.

    Raises:
        InputError: rank or version.
    """
    if p.ndim not in (3, 4):
        raise InputError(f"p must be [K, H, W] or [B, K, H, W], got {list(p.shape)}")
    is_tensor = isinstance(p, torch.Tensor)
    if version == "torch":
        out = normalize.max_norm(p if is_tensor else torch.from_numpy(np.asarray(p)), e)
        return out.to(p.dtype) if is_tensor else out.numpy()
    if version not in ("numpy", "np"):
        raise InputError(f"version must be torch, numpy or np, got {version!r}")
    x = p.detach().cpu().numpy() if is_tensor else p
    x = np.maximum(x, 0)
    high, low = x.max((-2, -1), keepdims=True), x.min((-2, -1), keepdims=True)
    x[x < low + e] = 0
    x = (x - low - e) / (high + e)
    return torch.from_numpy(x).to(p) if is_tensor else x


def _needed(name: str, value: float | None) -> float:
    if value is None:
        raise InputError(f"{name} must be given, got None")
    return value


def _boxes(boxes: Any, batch: int, size: Sequence[int]) -> Tensor:
    """``[B, 4] int64``."""
    if boxes is None:
        return torch.tensor([0, size[0], 0, size[1]]).expand(batch, 4)
    if not isinstance(boxes, torch.Tensor):
        boxes = torch.tensor([[int(c) for c in box] for box in boxes], dtype=torch.int64)
        boxes = boxes.view(-1, 4)
    if tuple(boxes.shape) != (batch, 4):
        raise InputError(f"img_box must be [{batch}, 4], got {list(boxes.shape)}")
    return boxes.long()


def _ignore_outside(label: Tensor, box: Tensor, ignore_index: int) -> Tensor:
    """Sets ``label [B, H, W]`` outside the boxes ``[B, 4]``, without reading them on the host."""
    y = torch.arange(label.shape[1], device=label.device)[None, :, None]
    x = torch.arange(label.shape[2], device=label.device)[None, None, :]
    y0, y1, x0, x1 = box[:, :, None, None].unbind(dim=1)
    return label.masked_fill_(~((y >= y0) & (y < y1) & (x >= x0) & (x < x1)), ignore_index)
