"""Training augmentation: random scale, flip, colour jitter, normalisation, random crop.

The chain and its order are those of RTC's training (ChunyanWang1/RTC, tool/imutils.py, after
jiwoon-ahn/psa): RandomResizeLong(448, 768), flip 0.5, ColorJitter(.3, .3, .3, .1), normalise,
RandomCrop 448 padded with zeros after normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsis.data.color import jitter_window, shift_hsv
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
    resize_scale: tuple[float, float] | None = None,
    hsv: tuple[int, int, int] = (0, 0, 0),
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
        resize_scale: smallest and largest factor of both sides, drawn uniformly instead of the
            longer side; None draws the longer side.
        hsv: largest shifts of hue (in steps of 1/180 turn), saturation and value (in steps of
            1/255), drawn uniformly as integers and added after `jitter` (YudeWang/
            semantic-segmentation-codebase: 10 each, in OpenCV's 8-bit HSV).
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
    drawn = draw(
        rng,
        (image.height, image.width),
        crop=crop,
        resize_long=resize_long,
        flip=flip,
        jitter=jitter,
        resize_scale=resize_scale,
        hsv=hsv,
    )
    out = torch.zeros(3, crop, crop)
    write_crop(np.array(image), drawn, out, mean, std)
    out_mask = None if mask is None else crop_mask(mask, drawn, crop)
    return out, out_mask, torch.tensor(drawn.valid_box)


@dataclass(frozen=True)
class Draw:
    """All that is random about one training sample; both loaders follow the same one.

    Attributes:
        size: height and width after resizing.
        flip: whether the resized image is mirrored left to right.
        factors: of brightness, contrast and saturation, and the hue's shift in turns.
        order: which of the four are applied, by position in `factors`, in this order.
        place: for rows, then columns: offset in the crop, offset in the resized and mirrored
            image, length kept.
        hsv: shifts of hue (1/180 turn), saturation and value (1/255).
    """

    size: tuple[int, int]
    flip: bool
    factors: tuple[float, float, float, float]
    order: tuple[int, ...]
    place: tuple[tuple[int, int, int], tuple[int, int, int]]
    hsv: tuple[int, int, int] = (0, 0, 0)

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the crop that show the image; the rest is padding."""
        (y, _, height), (x, _, width) = self.place
        return slice(y, y + height), slice(x, x + width)

    @property
    def valid_box(self) -> tuple[int, int, int, int]:
        """`inside` as y0, y1, x0, x1."""
        (y, _, height), (x, _, width) = self.place
        return y, y + height, x, x + width

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the resized image, before it is mirrored, that are kept."""
        (_, top, height), (_, left, width) = self.place
        if self.flip:
            left = self.size[1] - left - width
        return slice(top, top + height), slice(left, left + width)


def draw(
    rng: torch.Generator,
    size: tuple[int, int],
    *,
    crop: int,
    resize_long: tuple[int, int],
    flip: float,
    jitter: tuple[float, float, float, float],
    square: bool = False,
    resize_scale: tuple[float, float] | None = None,
    hsv: tuple[int, int, int] = (0, 0, 0),
) -> Draw:
    """Draw one sample's augmentation; the arguments are those of `train_transform`.

    Args:
        rng: the only source of randomness.
        size: height and width of the image as stored.
        crop: side of the result.
        resize_long: range of the longer side.
        flip: probability of mirroring.
        jitter: largest changes of colour.
        square: resize both sides to the length drawn.
        resize_scale: range of the factor, or None.
        hsv: largest shifts.

    Example:
        >>> rng = torch.Generator().manual_seed(1)
        >>> drawn = draw(rng, (60, 80), crop=64, resize_long=(64, 96), flip=0.5, jitter=(0.3,) * 4)
        >>> drawn.valid_box[2:]
        (0, 64)
    """
    if resize_scale is None:
        scale = _randint(rng, *resize_long) / max(size)
    else:
        scale = _uniform(rng, *resize_scale)
    size = (max(size), max(size)) if square else size
    height, width = (max(1, round(side * scale)) for side in size)
    mirrored = _uniform(rng, 0, 1) < flip
    *ratios, hue = jitter
    brightness, contrast, saturation = (
        _uniform(rng, max(0.0, 1 - ratio), 1 + ratio) for ratio in ratios
    )
    return Draw(
        size=(height, width),
        flip=mirrored,
        factors=(brightness, contrast, saturation, _uniform(rng, -hue, hue)),
        order=tuple(k for k in torch.randperm(4, generator=rng).tolist() if jitter[k] > 0),
        place=(_place(rng, height, crop), _place(rng, width, crop)),
        hsv=_shifts(rng, hsv),
    )


def write_crop(image: np.ndarray, drawn: Draw, out: Tensor, mean: Triple, std: Triple) -> None:
    """Resize, jitter, cut and normalise an image into its place in `out`.

    Args:
        image: `[H, W, 3] uint8`, as stored; not changed.
        drawn: of the image.
        out: `[3, crop, crop] float32`; only the valid box is written.
        mean: of the image in [0, 1], per channel.
        std: of the image in [0, 1], per channel.
    """
    window = jitter_window(_resize(image, drawn), drawn)
    if any(drawn.hsv):
        window = shift_hsv(window, *drawn.hsv)
    planes = (window[:, ::-1] if drawn.flip else window).transpose(2, 0, 1)
    rows, columns = drawn.inside
    inside = out[:, rows, columns]
    inside.copy_(torch.from_numpy(np.ascontiguousarray(planes)))
    _normalize(inside, mean, std)


def crop_mask(mask: np.ndarray, drawn: Draw, crop: int) -> Tensor:
    """The mask of an image, resized (nearest), mirrored and cut as `drawn` says.

    Args:
        mask: `[H, W] uint8`, of the image as stored.
        drawn: of its image.
        crop: side of the result.

    Returns:
        `[crop, crop] int64`, 255 outside the valid box.
    """
    from PIL import Image as pil

    resized = pil.fromarray(mask).resize(drawn.size[::-1], pil.Resampling.NEAREST)
    kept = np.asarray(resized)[drawn.window]
    kept = (kept[:, ::-1] if drawn.flip else kept).copy()  # torch takes no negative strides
    out = torch.full((crop, crop), IGNORE, dtype=torch.int64)
    out[drawn.inside] = torch.from_numpy(kept).long()
    return out


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
    return _normalize(planes.contiguous(), mean, std)


def _normalize(planes: Tensor, mean: Triple, std: Triple) -> Tensor:
    return planes.div_(255).sub_(_column(mean)).div_(_column(std))


def _column(values: Triple) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def _randint(rng: torch.Generator, low: int, high: int) -> int:
    """Uniform integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def _shifts(rng: torch.Generator, largest: tuple[int, int, int]) -> tuple[int, int, int]:
    """Integers in [-largest, largest]; nothing is drawn where nothing may shift."""
    if not any(largest):
        return 0, 0, 0
    hue, saturation, value = (_randint(rng, -most, most) for most in largest)
    return hue, saturation, value


def _place(rng: torch.Generator, side: int, crop: int) -> tuple[int, int, int]:
    """Along one axis: offset in the result, offset in the image, length kept."""
    if side >= crop:
        return 0, _randint(rng, 0, side - crop), crop
    return _randint(rng, 0, crop - side), 0, side


def _resize(image: np.ndarray, drawn: Draw) -> np.ndarray:
    """`[h, w, 3] uint8` of the drawn size, bicubic."""
    functional = torchvision_functional()
    # The uint8 tensor path is antialiased like Pillow's and about five times as fast.
    pixels = functional.resize(
        torch.from_numpy(image).permute(2, 0, 1),
        list(drawn.size),
        interpolation=functional.InterpolationMode.BICUBIC,
        antialias=True,
    )
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
