"""A network whose answer can be worked out by hand, and a data set of painted images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from wsis.data.dataset import Dataset
from wsis.offline.masks import write_mask
from wsis.types import Maps

CLASSES = ("red thing", "green <b>thing</b>")
MASK_IDS = (8, 12)
COLOURS = np.array([[90, 90, 90], [220, 30, 30], [30, 220, 30]], np.uint8)


class ColourModel(nn.Module):
    """Class 1 is where red exceeds the other channels, class 2 where green does."""

    def __init__(self, *, crr: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.backbone = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        self.crr = nn.Identity() if crr else None
        self.inputs: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor, *, decode: bool = True, refine: bool = True) -> Maps:
        self.inputs.append(tuple(image.shape))
        red, green, blue = image.unbind(1)
        evidence = torch.stack(
            [red - torch.maximum(green, blue), green - torch.maximum(red, blue)], 1
        )
        cams = self._grid(evidence, 8) * self.scale
        background = torch.ones_like(evidence[:, :1])
        scores = torch.cat([background, evidence], 1)
        return Maps(
            cams=cams,
            class_logits=F.interpolate(cams, image.shape[-2:], mode="bilinear", align_corners=True)
            .flatten(2)
            .amax(-1),
            features=cams.relu(),
            refined=None if self.crr is None or not refine else self._grid(scores, 8).sigmoid(),
            logits=self._grid(scores, 4) * self.scale if decode else None,
        )

    @staticmethod
    def _grid(maps: torch.Tensor, stride: int) -> torch.Tensor:
        size = [-(-side // stride) for side in maps.shape[-2:]]
        return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def painted(folder, *, sizes=((40, 56), (33, 25)), void=True) -> Dataset:
    """Images with a red and (every second one) a green rectangle on grey, masks with a void row."""
    (folder / "images").mkdir(parents=True)
    labels = np.zeros((len(sizes), 2), np.uint8)
    ids, paths = [], []
    for index, (height, width) in enumerate(sizes):
        mask = np.zeros((height, width), np.uint8)
        mask[height // 8 : height // 2, width // 8 : width // 2] = 1
        if index % 2:
            mask[height // 2 :, width // 2 :] = 2
        pixels = COLOURS[mask]
        labels[index] = [(mask == c).any() for c in (1, 2)]
        if void:
            mask[0] = 255
        ids.append(f"image{index}")
        paths.append(folder / "images" / f"image{index}.png")
        Image.fromarray(pixels).save(paths[-1])
        write_mask(folder / "masks" / f"image{index}.png", mask, MASK_IDS)
    return Dataset(
        name="folder",
        root=folder,
        split="val",
        classes=CLASSES,
        mask_ids=MASK_IDS,
        ids=ids,
        labels=labels,
        image_paths=paths,
        mask_folders=[folder / "masks"],
    )
