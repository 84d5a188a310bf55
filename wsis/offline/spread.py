"""Class maps of one image, spread by affinities: IRN's and AffinityNet's walks, SEAM's PCM.

What the affinities come from lies beside the maps, in a file of the same name: a boundary map
(jiwoon-ahn/irn) or the features of AffinityNet or SEAM's correlation module. wsis does not train
those networks; ``np.save`` in their inference loop is all it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from wsis.data.dataset import read_image
from wsis.errors import InputError
from wsis.models.features import IMAGENET_MEAN, IMAGENET_STD
from wsis.offline.stored import read_content
from wsis.ops.pixel_correlation import pixel_correlation
from wsis.ops.random_walk import random_walk
from wsis.ops.stencil_affinity import pair_affinity, path_affinity

if TYPE_CHECKING:
    from torch import Tensor

GuideKind = Literal["edges", "features"]

STRIDES = {"edges": 4, "features": 8}
"""Of the boundary map in jiwoon-ahn/irn and of the features in jiwoon-ahn/psa and YudeWang/SEAM."""

BETA = {"edges": 10.0, "features": 8.0}
"""Power of the affinities there (irn run_sample.py, psa infer_aff.py)."""

EDGE_BACKGROUND = 0.25
"""Background score after IRN's walk (``sem_seg_bg_thres`` in run_sample.py)."""

WALK_ALPHA = 16.0
"""Power of the background before AffinityNet's walk (psa infer_aff.py)."""

_SLACK = 1e-3  # float16 and bilinear resizing leave [0, 1] by less


@dataclass(frozen=True)
class Guide:
    """What the affinities of one image come from.

    Attributes:
        kind: ``edges``, a boundary map; ``features``, of a network.
        values: ``[1, h, w]`` in [0, 1], or ``[F, h, w]``; float32.
    """

    kind: GuideKind
    values: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """Its height and width."""
        return self.values.shape[1], self.values.shape[2]


def read_guide(path: str | Path, kind: GuideKind) -> Guide:
    """A boundary map or features from a file.

    Args:
        path: ``.npy`` or ``.npz`` with one array, alone or in a dictionary; edges also as ``.png``,
            grey, 255 the strongest. Edges are ``[h, w]``, with or without leading axes of 1;
            features ``[F, h, w]`` or ``[1, F, h, w]``.
        kind: what it is to be.

    Raises:
        InputError: no such file, damaged, several arrays, another shape, numbers that are not
            finite, or edges outside [0, 1].

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(path, np.zeros((1, 12, 16), np.float32))
        >>> read_guide(path, "edges").grid
        (12, 16)
    """
    path = Path(path)
    if path.suffix.lower() == ".png" and kind == "edges":
        return Guide(kind, np.asarray(read_image(path).convert("L"), np.float32)[None] / 255)
    content = read_content(path)
    if isinstance(content, dict):
        if len(content) != 1:
            names = ", ".join(map(str, content)) or "none"
            raise InputError(f"{path}: expected one array of {kind}, got {names}")
        content = next(iter(content.values()))
    values = np.asarray(content)
    if values.dtype.kind not in "fiub":
        raise InputError(f"{path}: {kind} must be numbers, got {values.dtype}")
    if kind == "edges" and values.ndim >= 2 and np.prod(values.shape[:-2]) == 1:
        values = values.reshape(1, *values.shape[-2:])
    elif kind == "features" and values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim != 3 or 0 in values.shape or (kind == "edges" and len(values) != 1):
        wanted = "[h, w] or [1, h, w]" if kind == "edges" else "[F, h, w]"
        raise InputError(f"{path}: {kind} must be {wanted}, got {list(values.shape)}")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: {kind} must be finite, got NaN or infinity")
    low, high = float(values.min()), float(values.max())
    if kind == "edges":
        if low < -_SLACK or high > 1 + _SLACK:
            raise InputError(
                f"{path}: edges must be in [0, 1], after the sigmoid, got {low:g} to {high:g}"
            )
        values = values.clip(0, 1)
    return Guide(kind, values)


class Walker:
    """The affinities of one image, made once; then any maps, powers and lengths.

    With edges it is the walk of jiwoon-ahn/irn, of all pairs on the grid, from maps that are 0 on
    edges; with features that of jiwoon-ahn/psa, whose pairs start where all partners are inside.

    Args:
        guide: of the image.
        size: its height and width.
        radius: of the half disc; 5 in both.
        device: where to compute.
    """

    def __init__(
        self, guide: Guide, size: tuple[int, int], *, radius: int = 5, device: Any = "cpu"
    ) -> None:
        self.kind = guide.kind
        self.grid, self.size, self.radius = guide.grid, size, radius
        self.stride = STRIDES[guide.kind]
        values = torch.from_numpy(guide.values)[None].to(device)
        if guide.kind == "edges":
            self.affinity = path_affinity(values, radius)
            self.keep: Tensor | None = 1 - values
        else:
            self.affinity = pair_affinity(values, radius, cropped=True)
            self.keep = None

    def walk(self, maps: Tensor, *, beta: float | None = None, log_steps: int = 8) -> Tensor:
        """The maps after ``2^log_steps`` steps, at the size of the image.

        Args:
            maps: ``[C, h', w']`` float of any size, averaged or enlarged to the grid.
            beta: power of the affinities; None for that of the method.
            log_steps: 8 in both.

        Returns:
            ``[C, H, W] float32``, not normalised.
        """
        planes = self._on_grid(maps.to(self.affinity.device, torch.float32))
        if self.keep is not None:
            planes = planes * self.keep[0]
        beta = BETA[self.kind] if beta is None else beta
        walked = random_walk(
            planes[None], self.affinity, self.radius, beta=beta, log_steps=log_steps
        )
        return self._enlarged(walked)[0]

    def _on_grid(self, maps: Tensor) -> Tensor:
        size = tuple(maps.shape[1:])
        if size == self.grid or not len(maps):
            return maps if size == self.grid else maps.new_zeros(0, *self.grid)
        if size == self.size and self._by_stride():
            # Zeros outside count in the mean, as in psa infer_aff.py.
            down, right = (-side % self.stride for side in size)
            return F.avg_pool2d(F.pad(maps, (0, right, 0, down)), self.stride)
        if size[0] >= self.grid[0] and size[1] >= self.grid[1]:
            return F.adaptive_avg_pool2d(maps, self.grid)
        return F.interpolate(maps[None], self.grid, mode="bilinear", align_corners=False)[0]

    def _enlarged(self, maps: Tensor) -> Tensor:
        if not maps.shape[1]:
            return maps.new_zeros(1, 0, *self.size)
        if self._by_stride():
            maps = F.interpolate(
                maps, scale_factor=self.stride, mode="bilinear", align_corners=False
            )
            return maps[..., : self.size[0], : self.size[1]]
        return F.interpolate(maps, self.size, mode="bilinear", align_corners=False)

    def _by_stride(self) -> bool:
        """Whether the grid is the image's at the method's stride, rounded up."""
        return self.grid == tuple(-(-side // self.stride) for side in self.size)


def scaled(maps: Tensor) -> Tensor:
    """``[K, H, W]`` divided by the largest value of all (irn make_sem_seg_labels.py)."""
    top = maps.amax() if maps.numel() else maps.new_zeros(())
    return maps / torch.where(top > 0, top, torch.ones_like(top))


def correlate(maps: Tensor, guide: Guide | None, image: np.ndarray) -> Tensor:
    """SEAM's pixel correlation: every pixel becomes the mean of the maps over similar pixels.

    Args:
        maps: ``[C, h', w']`` float of any size.
        guide: features; None takes the image's own colours, normalised as for a network, at a
            stride of 8: 3 of the 195 channels that SEAM's features come from.
        image: ``[H, W, 3] uint8`` RGB.

    Returns:
        ``[C, H, W] float32``, enlarged from the grid of the features (bilinear).
    """
    size = image.shape[:2]
    if guide is None:
        pixels = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
        grid = (-(-size[0] // STRIDES["features"]), -(-size[1] // STRIDES["features"]))
        features = F.adaptive_avg_pool2d((pixels - mean) / std, grid)[None]
    else:
        features = torch.from_numpy(guide.values)[None]
    if not len(maps):
        return maps.new_zeros(0, *size)
    spread = pixel_correlation(maps[None].float(), features.to(maps.device))
    return F.interpolate(spread, size, mode="bilinear", align_corners=False)[0]
