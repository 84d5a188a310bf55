"""The field's plain loader, from the description of 1-stage-wseg's and ToCo's: the reference.

A `Dataset` of Pillow and torchvision steps on whole images, then a plain `DataLoader`: open and
convert to RGB, resize the long side (bicubic), mirror, ColorJitter, numpy, (x / 255 - mean) / std
per channel, padded random crop, HWC to CHW.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

Triple = tuple[float, float, float]


class Loop(torch.utils.data.Dataset):
    """One image after the other, as the repositories write it.

    Args:
        open_image: position -> an image as `Image.open` gives it.
        labels: `[N, K]`.
        crop: side of the result.
        resize_long: range of the longer side.
        jitter: of ColorJitter.
        mean: of the image in [0, 1].
        std: of the image in [0, 1].
    """

    def __init__(
        self,
        open_image: Callable[[int], Image.Image],
        labels: torch.Tensor,
        *,
        crop: int,
        resize_long: tuple[int, int],
        jitter: tuple[float, float, float, float],
        mean: Triple,
        std: Triple,
    ) -> None:
        self.open_image, self.labels = open_image, labels
        self.crop, self.resize_long = crop, resize_long
        self.mean, self.std = mean, std
        self.jitter = transforms.ColorJitter(*jitter)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        image = self.open_image(i).convert("RGB")
        long_side = random.randint(*self.resize_long)
        width, height = image.size
        if width < height:
            size = (round(width * long_side / height), long_side)
        else:
            size = (long_side, round(height * long_side / width))
        image = image.resize(size, resample=Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(self.jitter(image))
        normal = np.empty_like(pixels, np.float32)
        for c in range(3):
            normal[..., c] = (pixels[..., c] / 255.0 - self.mean[c]) / self.std[c]
        height, width = normal.shape[:2]
        side = self.crop
        kept_height, kept_width = min(side, height), min(side, width)
        top, left = random.randint(0, height - kept_height), random.randint(0, width - kept_width)
        y, x = random.randint(0, side - kept_height), random.randint(0, side - kept_width)
        crop = np.zeros((side, side, 3), np.float32)
        crop[y : y + kept_height, x : x + kept_width] = normal[
            top : top + kept_height, left : left + kept_width
        ]
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), self.labels[i]
