"""Colour jitter of training images: Pillow's adjustments to the last bit, in less time.

The hue's way over 8-bit HSV (Pillow's Convert.c) is a function of few 8-bit values at a time, so it
is three look-ups in tables. What is done pixel by pixel is done to the pixels that the crop keeps;
only the contrast looks at the whole image.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from wsis.errors import MissingExtraError

try:
    from PIL import Image
except ImportError as error:
    raise MissingExtraError("pillow", "train", "augmenting images") from error

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from wsis.data.augment import Draw

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_BLOCK = 16384  # pixels whose temporaries stay in the cache: half the time of whole images


def jitter_window(image: np.ndarray, drawn: Draw) -> np.ndarray:
    """Jitter an image as drawn and keep its window of the crop, not yet mirrored.

    Args:
        image: `[h, w, 3] uint8`, contiguous, resized.
        drawn: the sample's draw.

    Returns:
        `[height, width, 3] uint8`, equal to torchvision's adjustments of the Pillow image.
    """
    pixels: np.ndarray | Picture = image
    order, level = drawn.order, 0
    before = order.index(CONTRAST) if CONTRAST in order else 0
    for k in order[:before]:
        pixels = adjust(pixels, k, drawn.factors[k])
    if CONTRAST in order:
        level = _mean_grey(_picture(pixels))
    pixels = _cut(pixels, *drawn.window)
    for k in order[before:]:
        factor = drawn.factors[k]
        pixels = _toward(pixels, level, factor) if k == CONTRAST else adjust(pixels, k, factor)
    return np.asarray(pixels)


def adjust(pixels: np.ndarray | Picture, k: int, factor: float) -> np.ndarray | Picture:
    """One adjustment, as torchvision's `adjust_brightness`, `_contrast`, `_saturation`, `_hue`.

    Args:
        pixels: `[h, w, 3] uint8`, contiguous, or an RGB image of Pillow's.
        k: 0 brightness, 1 contrast, 2 saturation, 3 hue.
        factor: >= 0, 1 changes nothing; for the hue a shift in turns, from -0.5 to 0.5.

    Returns:
        The pixels in whichever form they came to be; `np.asarray` makes an array of both.

    Example:
        >>> np.asarray(adjust(np.full((1, 1, 3), 100, np.uint8), BRIGHTNESS, 1.5)).tolist()
        [[[150, 150, 150]]]
    """
    if k == HUE:
        return _shift(np.asarray(pixels), hue_steps(factor))
    picture = _picture(pixels)
    if k == SATURATION:
        return Image.blend(picture.convert("L").convert("RGB"), picture, factor)
    return _toward(picture, _mean_grey(picture) if k == CONTRAST else 0, factor)


def _picture(pixels: np.ndarray | Picture) -> Picture:
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels


def _cut(pixels: np.ndarray | Picture, rows: slice, columns: slice) -> np.ndarray | Picture:
    if isinstance(pixels, np.ndarray):
        return np.ascontiguousarray(pixels[rows, columns])
    return pixels.crop((columns.start, rows.start, columns.stop, rows.stop))


def _mean_grey(picture: Picture) -> int:
    counts = np.array(picture.convert("L").histogram())
    return int(counts @ np.arange(256) / counts.sum() + 0.5)


def _toward(pixels: np.ndarray | Picture, level: int, factor: float) -> Picture:
    """Pillow's blend with one grey level: every value goes where its table says."""
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    table = Image.blend(Image.new("L", ramp.size, level), ramp, factor).tobytes()
    return _picture(pixels).point(list(table) * 3)


def hue_steps(turns: float) -> int:
    """A shift of the hue in steps of 1/256 turn, 0..255, truncated as torchvision does."""
    return int(np.int32(turns * 255).astype(np.uint8))


def shift_hsv(image: np.ndarray, hue: int, saturation: int, value: int) -> np.ndarray:
    """Shift an image in HSV; saturation and value stay within 0..255.

    Args:
        image: `[h, w, 3] uint8`.
        hue: in steps of 1/180 turn (OpenCV's 8-bit HSV), -180 to 180.
        saturation: in steps of 1/255.
        value: in steps of 1/255.

    Returns:
        `[h, w, 3] uint8`.

    Example:
        >>> shift_hsv(np.full((1, 1, 3), 100, np.uint8), 10, 0, 5).tolist()
        [[[105, 105, 105]]]
    """
    return _shift(image, round(hue * 256 / 180) % 256, saturation, value)


def _shift(
    image: np.ndarray, hue_shift: int, saturation_shift: int = 0, value_shift: int = 0
) -> np.ndarray:
    """Pillow's way over HSV with `hue_shift` added to the hue modulo 256, the others clipped."""
    pixels = image.reshape(-1, 3)
    shifted = np.empty_like(pixels)
    shifts = hue_shift, saturation_shift, value_shift
    for start in range(0, len(pixels), _BLOCK):
        block = slice(start, start + _BLOCK)
        _shift_block(pixels[block], shifts, shifted[block])
    return shifted.reshape(image.shape)


def _shift_block(pixels: np.ndarray, shifts: tuple[int, int, int], shifted: np.ndarray) -> None:
    """`_shift` of `[n, 3] uint8` pixels."""
    hue_shift, saturation_shift, value_shift = shifts
    tables = _tables()
    red, green, blue = np.ascontiguousarray(pixels.T)
    largest = np.maximum(np.maximum(red, green), blue)
    chroma = largest - np.minimum(np.minimum(red, green), blue)
    # Modulo 256 as all of uint8: largest - middle = 2 largest + smallest - sum.
    fall = largest + largest - chroma + largest - red - green - blue
    order = (red >= green).view(np.uint8) * 4 + (green >= blue).view(np.uint8) * 2
    order += (blue >= red).view(np.uint8)
    hue = tables.hue.take(_join(order, chroma, fall), mode="clip")
    hue += np.uint8(hue_shift)
    saturation = tables.saturation.take(_join(largest, chroma), mode="clip")
    saturation = _add(saturation, saturation_shift)
    largest = _add(largest, value_shift)
    key = _join(saturation, hue)
    whole = largest.astype(np.float32)
    for c, ratio in enumerate(tables.ratios):
        level = ratio.take(key, mode="clip")
        level *= whole
        level += np.float32(0.5)
        shifted[:, c] = level.astype(np.uint8)


def _add(channel: np.ndarray, shift: int) -> np.ndarray:
    """`uint8` plus a shift, kept within 0..255."""
    if shift == 0:
        return channel
    return (channel.astype(np.int16) + shift).clip(0, 255).astype(np.uint8)


def _join(*parts: np.ndarray) -> np.ndarray:
    """8-bit values to one index, the first the highest; of numpy's own index type, 3 x as fast."""
    index = np.zeros(len(parts[0]), "<u2" if len(parts) == 2 else "<u4")
    octets = index.view(np.uint8).reshape(len(index), -1)
    for k, part in enumerate(reversed(parts)):
        octets[:, k] = part
    return index.astype(np.intp)


class _Tables(NamedTuple):
    """Pillow's conversions, tabulated.

    Attributes:
        hue: `[2^19] uint8`, of the channels' order, chroma, largest - middle.
        saturation: `[2^16] uint8`, of largest and chroma.
        ratios: `[3, 2^16] float32`, each channel / largest, of saturation and hue; a test shows
            that fewer digits than Pillow's change no colour.
    """

    hue: np.ndarray
    saturation: np.ndarray
    ratios: np.ndarray


@cache
def _tables() -> _Tables:
    # float32 where Pillow stores a float or multiplies two, float64 between.
    byte = np.arange(256, dtype=np.float64)
    first, second = np.meshgrid(byte, byte, indexing="ij")
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.float32(second) / np.float32(first)
    share = np.where((first == 0) | (second > first), 0, share).astype(np.float64)
    saturation = (share * 255).astype(np.uint8)  # of largest and chroma
    orders = {
        0b110: 1 - share,  # red >= green >= blue; share of chroma and largest - middle
        0b100: share - 1,
        0b010: 2 + share - 1,
        0b011: 2 + 1 - share,
        0b001: 4 + share - 1,
        0b101: 4 + 1 - share,
    }
    hue = np.zeros((8, 256, 256), np.uint8)
    for order, sextant in orders.items():
        turns = np.fmod(np.float64(np.float32(sextant)) / 6 + 1, 1)
        hue[order] = np.float64(np.float32(turns)) * 255
    hue[:, 0] = 0  # grey
    vividness = np.float32(byte / 255)
    sextant = byte * 6 / 255
    sector = np.floor(sextant)
    rest = np.float32(sextant - sector)
    smallest = 1 - np.float64(vividness)[:, None] + 0 * rest
    falling = 1 - np.float64(vividness[:, None] * rest)
    rising = 1 - np.float64(vividness)[:, None] * (1 - np.float64(rest))
    levels = np.stack([np.ones((256, 256)), rising, falling, smallest])
    roles = np.array([[0, 2, 3, 3, 1, 0], [1, 0, 0, 2, 3, 3], [3, 3, 1, 0, 0, 2]])
    at_hue = roles[:, sector.astype(int) % 6]
    ratios = levels[at_hue, :, np.arange(256)].transpose(0, 2, 1)
    return _Tables(hue.ravel(), saturation.ravel(), np.float32(ratios).reshape(3, -1))
