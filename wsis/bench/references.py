"""What the operators are held against: the same results, written as one writes them in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def refine(
    image: Tensor, masks: Tensor, kind: str, iterations: int, dilations: Sequence[int]
) -> Tensor:
    """PAMR or PAR by shifted views of a padded image; see `wsis.ops.pamr`, `wsis.ops.par`."""
    near = torch.stack(list(_shifted(image, dilations)), 1)
    with_centre = [near] + [image[:, None]] * (len(dilations) if kind == "pamr" else 0)
    sigma = torch.cat(with_centre, 1).std(1)
    away = near - image[:, None]
    if kind == "pamr":
        weights = -(away.abs() / (1e-8 + 0.1 * sigma[:, None])).mean(2)
    else:
        weights = -(away / (1e-8 + sigma[:, None]) / 0.3).square().mean(2)
    weights = weights.softmax(1)
    if kind == "par":
        far = torch.tensor([d * float(np.hypot(*way)) for d in dilations for way in _DIRECTIONS])
        place = (-(far / (far.std() + 1e-8) / 0.3).square()).softmax(0)
        weights = weights + 0.01 * place.to(weights)[:, None, None]
    for _ in range(iterations):
        shifted = zip(weights.unbind(1), _shifted(masks, dilations), strict=True)
        refined = torch.zeros_like(masks)
        for weight, neighbour in shifted:
            refined.addcmul_(weight[:, None], neighbour)
        masks = refined
    return masks


def _shifted(image: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    pad = max(dilations)
    padded = F.pad(image, [pad] * 4, mode="replicate")
    height, width = image.shape[-2:]
    for d in dilations:
        for dy, dx in _DIRECTIONS:
            y, x = pad + d * dy, pad + d * dx
            yield padded[..., y : y + height, x : x + width]


def normalize_cams(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """PSA's rule: ReLU of each pass, summed, divided by the class's maximum + 1e-5."""
    resized = [
        F.interpolate(m[None].relu(), size, mode="bilinear", align_corners=False) for m in maps
    ]
    total = torch.stack(resized).sum(0)[0]
    return total / (total.amax((1, 2), keepdim=True) + 1e-5)


def confusion_matrix(pred: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """Rows truth, columns prediction; 255 is not counted."""
    counted = target != 255
    cells = target[counted].astype(np.int64) * classes + pred[counted]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def pydensecrf(image: np.ndarray, energy: np.ndarray, preset: str, iterations: int) -> np.ndarray:
    """Q of the dense CRF by pydensecrf; ImportError where it is not installed.

    Args:
        image: `[H, W, 3] uint8`.
        energy: `[C, H, W] float32`.
        preset: of `wsis.ops.dense_crf`.
        iterations: of mean field.
    """
    from pydensecrf import densecrf

    from wsis.ops.dense_crf import PRESETS, Bilateral, Gaussian

    classes, height, width = energy.shape
    crf = densecrf.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(energy.reshape(classes, -1))
    for term in PRESETS[preset]:
        if isinstance(term, Bilateral):
            crf.addPairwiseBilateral(sxy=term.sxy, srgb=term.srgb, rgbim=image, compat=term.compat)
        elif isinstance(term, Gaussian):
            crf.addPairwiseGaussian(sxy=term.sxy, compat=term.compat)
    return np.array(crf.inference(iterations)).reshape(energy.shape)
