"""CAM seeds of images whose labels are given, and pseudo masks made from them.

The seeds are those by which this field judges its CAMs on the training list (YudeWang/SEAM,
infer_SEAM.py): maps of all passes are summed, masked by the image-level label and normalised per
class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wsis.errors import InputError
from wsis.offline.predict import SCALES, Pass, enlarge, run_passes
from wsis.ops.normalize import normalize_cams
from wsis.pseudo import PseudoRule, make_pseudo_masks

if TYPE_CHECKING:
    from PIL import Image

    from wsis.models.network import Network


@dataclass(frozen=True)
class Seeds:
    """Normalised maps of one image, zero for classes that its label does not name.

    Attributes:
        cam: ``[K, H, W] float32`` in [0, 1], from the raw class activation maps A.
        refined: ``[K, H, W] float32`` in [0, 1], from the refined CAMs R; None for a model
            without cross-representation refinement.
    """

    cam: Tensor
    refined: Tensor | None

    @property
    def best(self) -> Tensor:
        """What pseudo masks are made from: the refined CAMs where the model has them."""
        return self.cam if self.refined is None else self.refined


def make_seeds(
    model: Network,
    image: Image.Image,
    label: np.ndarray | Tensor,
    *,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    base_long: int | None = None,
    device: torch.device | str | None = None,
) -> Seeds:
    """CAM and refined-CAM seeds of one image at its original size, with its label given.

    Args:
        model: the network.
        image: RGB image.
        label: ``[K]`` multi-hot image-level label.
        scales: sizes of the passes, as in `wsis.offline.predict.predict`.
        flip: also show the mirror image at every scale.
        base_long: long side before scaling, or None.
        device: where the passes run; by default where the network's parameters lie.

    Returns:
        The seeds, on the CPU.

    Raises:
        InputError: the image is not RGB, a scale is not positive, the label has the wrong length.
    """
    passes = run_passes(
        model, image, scales=scales, flip=flip, base_long=base_long, device=device, decode=False
    )
    return seeds_of(passes, image, label)


def seeds_of(passes: Sequence[Pass], image: Image.Image, label: np.ndarray | Tensor) -> Seeds:
    """What follows from the passes of one image; as `make_seeds`."""
    with torch.inference_mode():
        layout: dict[str, Any] = {
            "pass_sizes": [p.size for p in passes],
            "flips": [p.flipped for p in passes],
            "size": (image.height, image.width),
        }
        cam = merge_maps([p.maps.cams for p in passes], label, **layout).cpu()
        refined = None
        if passes[0].maps.refined is not None:
            foreground = [r[1:] for p in passes if (r := p.maps.refined) is not None]
            refined = merge_maps(foreground, label, **layout).cpu()
        return Seeds(cam, refined)


def merge_maps(
    maps: Sequence[Tensor],
    label: np.ndarray | Tensor,
    *,
    pass_sizes: Sequence[tuple[int, int]],
    flips: Sequence[bool],
    size: tuple[int, int],
) -> Tensor:
    """Sum the foreground maps of all passes at the image's size and normalise them per class.

    ``[s - min - e]_+ / (max - min + e)`` with ``s = [sum]_+`` and e = 1e-5. (The ``rtc`` variant of
    `wsis.ops.normalize.normalize_cams` without its small negative values: no argmax against a
    background score >= 0 sees the difference.)

    Args:
        maps: per pass ``[K, h, w]``.
        label: ``[K]`` multi-hot; the other classes stay zero (and cost nothing).
        pass_sizes: per pass height and width of the network input; maps are first enlarged to it
            with align_corners=True, then resized to the image with align_corners=False.
        flips: per pass whether the network saw the mirror image.
        size: height and width of the image.

    Returns:
        ``[K, H, W] float32`` in [0, 1].

    Raises:
        InputError: the label's length is not K.
    """
    label = _tensor(label).to(maps[0].device)
    if label.shape != maps[0].shape[:1]:
        raise InputError(f"label must be [{len(maps[0])}], got {list(label.shape)}")
    seed = torch.zeros(len(label), *size, device=maps[0].device)
    present = label.nonzero().flatten()
    if len(present):
        enlarged = [enlarge(m[present], s) for m, s in zip(maps, pass_sizes, strict=True)]
        scores = normalize_cams(enlarged, size, variant="rtc", flips=flips)
        seed[present] = scores.clamp(min=0)
    return seed


def pseudo_mask(
    seed: Tensor,
    image: Image.Image,
    label: np.ndarray | Tensor,
    rule: PseudoRule | None = None,
) -> np.ndarray:
    """Pseudo mask of one image by the two-threshold rule of training, at its original size.

    Args:
        seed: ``[K, H, W]`` in [0, 1], zero for classes outside the label.
        image: the RGB image.
        label: ``[K]`` multi-hot.
        rule: thresholds and refinement; RTC's by default.

    Returns:
        ``[H, W] uint8`` class ids 0..K, 255 where undecided.
    """
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
    masks = make_pseudo_masks(
        seed[None],
        pixels[None].to(seed.device),
        _tensor(label).to(seed.device, torch.float32)[None],
        torch.tensor([[0, image.height, 0, image.width]], device=seed.device),
        **(rule or PseudoRule()).arguments(),
    )
    return masks[0].to(torch.uint8).cpu().numpy()


def _tensor(label: np.ndarray | Sequence[int] | Tensor) -> Tensor:
    """A copy where it is no tensor: a data set's labels are read-only, which tensors cannot be."""
    return label if isinstance(label, Tensor) else torch.tensor(label)
