"""Training augmentation: random scale, flip, colour jitter, normalisation, random crop.

The chain and its order are those of RTC's training (ChunyanWang1/RTC, tool/imutils.py, after
jiwoon-ahn/psa): RandomResizeLong(448, 768), flip 0.5, ColorJitter(.3, .3, .3, .1), normalise,
RandomCrop 448 padded with zeros after normalisation.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsis.errors import InputError, MissingExtraError
from wsis.types import IGNORE

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Triple = tuple[float, float, float]


@cache
def torchvision_functional() -> ModuleType:
    """Return `torchvision.transforms.v2.functional`, imported when first needed.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise MissingExtraError("torchvision", "train", "training augmentation") from error
    return functional


def train_transform(
    image: Image,
    mask: np.ndarray | None,
    rng: torch.Generator,
    *,
    crop: int,
    resize_long: tuple[int, int],
    flip: float = 0.5,
    jitter: tuple[float, float, float, float] = (0.3, 0.3, 0.3, 0.1),
    mean: Triple,
    std: Triple,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Augment one training image, and its mask alike.

    Args:
        image: RGB, any size.
        mask: `[H, W] uint8` internal ids, of the image's size; None where labels supervise.
        rng: the only source of randomness.
        crop: side of the result.
        resize_long: smallest and largest length of the longer side, drawn uniformly as an integer.
        flip: probability of mirroring left to right.
        jitter: largest change of brightness, contrast, saturation (factors 1 - x to 1 + x, not
            below 0) and hue (shift in turns, at most 0.5), applied in random order.
        mean: of the image in [0, 1], per channel.
        std: of the image in [0, 1], per channel.

    Returns:
        Image `[3, crop, crop] float32`, exactly 0 outside the valid box; mask
        `[crop, crop] int64` with 255 outside, or None; valid box `[4] int64` y0, y1, x0, x1.

    Raises:
        InputError: the mask has another size than the image.

    Example:
        >>> rng = torch.Generator().manual_seed(1)
        >>> sizes = dict(crop=64, resize_long=(64, 96), mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> from PIL import Image
        >>> pixels, _, box = train_transform(Image.new("RGB", (80, 60)), None, rng, **sizes)
        >>> pixels.shape, box.tolist()[2:]
        (torch.Size([3, 64, 64]), [0, 64])
    """
    if mask is not None and mask.shape != (image.height, image.width):
        raise InputError(
            f"mask must be [{image.height}, {image.width}] like its image, got {list(mask.shape)}"
        )
    image, mask = _resize_long(image, mask, _randint(rng, *resize_long))
    if _uniform(rng, 0, 1) < flip:
        image = torchvision_functional().horizontal_flip(image)
        mask = None if mask is None else mask[:, ::-1]
    image = _color_jitter(image, rng, jitter)
    return _normalize_and_crop(image, mask, rng, crop=crop, mean=mean, std=std)


def normalize(image_u8: Image | np.ndarray, mean: Triple, std: Triple) -> Tensor:
    """(image / 255 - mean) / std.

    Args:
        image_u8: RGB image, or `[H, W, 3] uint8`.
        mean: of the image in [0, 1], per channel.
        std: of the image in [0, 1], per channel.

    Returns:
        `[3, H, W] float32`, contiguous.

    Raises:
        InputError: not three 8-bit channels.
    """
    pixels = np.array(image_u8)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise InputError(f"image must be [H, W, 3] uint8, got {list(pixels.shape)} {pixels.dtype}")
    planes = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32, copy=True)
    planes = planes.contiguous().div_(255)
    return planes.sub_(_column(mean)).div_(_column(std))


def _column(values: Triple) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def _randint(rng: torch.Generator, low: int, high: int) -> int:
    """Uniform integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def _resize_long(
    image: Image, mask: np.ndarray | None, long_side: int
) -> tuple[Image, np.ndarray | None]:
    from PIL import Image as pil

    functional = torchvision_functional()
    scale = long_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # The uint8 tensor path is antialiased like Pillow's and about five times as fast.
    pixels = functional.resize(
        functional.pil_to_tensor(image),
        [height, width],
        interpolation=functional.InterpolationMode.BICUBIC,
        antialias=True,
    )
    if mask is not None:
        mask = np.array(pil.fromarray(mask).resize((width, height), pil.Resampling.NEAREST))
    return functional.to_pil_image(pixels), mask


def _color_jitter(
    image: Image, rng: torch.Generator, jitter: tuple[float, float, float, float]
) -> Image:
    # On a Pillow image: its hue shift takes half the time of the tensor version.
    functional = torchvision_functional()
    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    *ratios, hue = jitter
    factors = [_uniform(rng, max(0.0, 1 - ratio), 1 + ratio) for ratio in ratios]
    factors.append(_uniform(rng, -hue, hue))
    for k in torch.randperm(4, generator=rng).tolist():
        if jitter[k] > 0:
            image = adjust[k](image, factors[k])
    return image


def _normalize_and_crop(
    image: Image,
    mask: np.ndarray | None,
    rng: torch.Generator,
    *,
    crop: int,
    mean: Triple,
    std: Triple,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Random window of a larger side, random place of a smaller one, each axis on its own.

    Normalisation acts per pixel, so only the pixels that are kept need it.
    """
    (y, top, height), (x, left, width) = (
        _place(rng, side, crop) for side in (image.height, image.width)
    )
    window = image.crop((left, top, left + width, top + height))
    out = torch.zeros(3, crop, crop)
    out[:, y : y + height, x : x + width] = normalize(window, mean, std)
    out_mask = None
    if mask is not None:
        kept = mask[top : top + height, left : left + width].copy()  # flipped strides are negative
        out_mask = torch.full((crop, crop), IGNORE, dtype=torch.int64)
        out_mask[y : y + height, x : x + width] = torch.from_numpy(kept).long()
    return out, out_mask, torch.tensor([y, y + height, x, x + width])


def _place(rng: torch.Generator, side: int, crop: int) -> tuple[int, int, int]:
    """Along one axis: offset in the result, offset in the image, length kept."""
    if side >= crop:
        return 0, _randint(rng, 0, side - crop), crop
    return _randint(rng, 0, crop - side), 0, side
