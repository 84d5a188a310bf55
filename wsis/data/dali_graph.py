"""The DALI pipeline of training images: what `wsis.data.augment` does, in DALI's operators.

The graph draws nothing. It is told, per sample, what `augment.draw` drew, so that its results are
the torch loader's up to rounding. Three things need care for that, each checked against the
torch path by the tests:

* Resizing goes along rows, then along columns, with 8 bits between, as torchvision and Pillow do;
  in one pass overshoots of the cubic survive that theirs clip (17 levels in photographs).
* At the border DALI repeats the outermost pixels where Pillow leaves out what is not there. The
  image is padded with zeros and the result divided by the weight that fell inside.
* Pillow cuts fractions off where DALI rounds.

Then 0.7 % of the values of photographs differ by one level of 255 and 3 in a million by two; with
all jitter on 1 % differ at all, 0.2 % by two levels or more and none by more than 10, since a hue
or saturation that lies on a step of its 8 bits may fall to either side. DALI's own colour
operators are of no use here: their hue turns the plane of YIQ, torchvision's goes over 8-bit HSV.
The hue is therefore plain arithmetic on planes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from wsis.data.color import BRIGHTNESS, CONTRAST, HUE, hue_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wsis.data.augment import Draw, Triple

_CUBIC = -0.5  # Pillow's, torchvision's and DALI's bicubic parameter
# Half a level less makes rounding cut off; a little more than that keeps whole numbers whole.
_CUT = 0.499


def build_pipeline(
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    crop: int,
    stages: int,
    mean: Triple,
    std: Triple,
) -> Any:
    """A built pipeline with one output, `[B, 3, crop, crop] float32`, and the inputs of `feeds`.

    Args:
        batch_size: samples in every batch.
        threads: of DALI on the CPU.
        device_id: GPU that decodes and does all the rest; None for the CPU.
        crop: side of the result.
        stages: how many adjustments of colour there are, 0 to 4.
        mean: of the image in [0, 1].
        std: of the image in [0, 1].
    """
    on_gpu = device_id is not None
    given = inputs(on_gpu)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def graph():
        image = resized(decoded(on_gpu), given)
        for k in range(stages):
            kind = given(f"kind{k}", here=True)
            image = _adjust(image, kind, given(f"factor{k}"))
        return fn.crop_mirror_normalize(
            image,
            crop=(crop, crop),
            crop_pos_y=given("place_y", here=True),
            crop_pos_x=given("place_x", here=True),
            mirror=given("flip", here=True),
            out_of_bounds_policy="pad",
            fill_values=0.0,
            mean=[255 * m for m in mean],
            std=[255 * s for s in std],
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    pipeline = graph()
    pipeline.build()
    return pipeline


def inputs(on_gpu: bool) -> Callable[..., Any]:
    """A function of a name that makes an input: where the images are, or `here` on the CPU.

    DALI takes arguments of operators from the CPU.
    """

    def given(name: str, *, here: bool = False) -> Any:
        node = fn.external_source(name=name)
        return node.gpu() if on_gpu and not here else node

    return given


def decoded(on_gpu: bool) -> Any:
    """The input `file` as `[H, W, 3] uint8` RGB, as Pillow decodes it."""
    return fn.decoders.image(
        fn.external_source(name="file"),
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def resized(image: Any, given: Callable[..., Any], name: str = "") -> Any:
    """The image at the size that `resize_row` and `resize_gains` were given under a name."""
    for axis in (f"{name}x", f"{name}y"):
        image = fn.slice(
            image,
            start=given(f"{axis}_start", here=True),
            shape=given(f"{axis}_shape", here=True),
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )
        image = fn.resize(
            image,
            size=given(f"{axis}_size", here=True),
            roi_start=given(f"{axis}_from", here=True),
            roi_end=given(f"{axis}_to", here=True),
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            dtype=types.FLOAT,
        )
        image = fn.cast(image * given(f"{axis}_gain"), dtype=types.UINT8)
    return image


def resize_row(old: tuple[int, int], new: tuple[int, int], name: str = "") -> dict[str, Any]:
    """Inputs of `resized` for one image, by name; heights and widths before and after."""
    (height, width), (new_height, new_width) = old, new
    x_pad, y_pad = _reach(width, new_width), _reach(height, new_height)
    return {
        f"{name}x_start": (0, -x_pad),
        f"{name}x_shape": (height, width + 2 * x_pad),
        f"{name}x_size": (height, new_width),
        f"{name}x_from": (0, x_pad),
        f"{name}x_to": (height, x_pad + width),
        f"{name}y_start": (-y_pad, 0),
        f"{name}y_shape": (height + 2 * y_pad, new_width),
        f"{name}y_size": (new_height, new_width),
        f"{name}y_from": (y_pad, 0),
        f"{name}y_to": (y_pad + height, new_width),
    }


def resize_gains(
    pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]], name: str = ""
) -> dict[str, Any]:
    """The other inputs of `resized`, for the images of a batch: sizes before and after."""
    return {
        f"{name}x_gain": [_gain(old[1], new[1])[None, :, None] for old, new in pairs],
        f"{name}y_gain": [_gain(old[0], new[0])[:, None, None] for old, new in pairs],
    }


def as_arrays(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one batch, one for each image, as DALI's inputs by name."""
    whole = ("start", "shape", "flip")
    return {
        name: np.array(
            [row[name] for row in rows],
            np.int32 if name.endswith(whole) or name.startswith("kind") else np.float32,
        )
        for name in rows[0]
    }


def feeds(
    files: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    draws: Sequence[Draw],
    *,
    crop: int,
    stages: int,
) -> dict[str, Any]:
    """The inputs of one batch by name.

    Args:
        files: encoded images, `[bytes] uint8` each.
        sizes: their heights and widths.
        draws: what was drawn for each.
        crop: side of the result.
        stages: as given to `build_pipeline`.
    """
    rows: list[dict[str, Any]] = []
    for size, drawn in zip(sizes, draws, strict=True):
        row: dict[str, Any] = {
            **resize_row(size, drawn.size),
            "flip": drawn.flip,
            "place_y": _position(drawn, 0, crop),
            "place_x": _position(drawn, 1, crop),
        }
        for k in range(stages):
            kind = drawn.order[k]
            factor = drawn.factors[kind]
            row |= {f"kind{k}": kind, f"factor{k}": hue_steps(factor) if kind == HUE else factor}
        rows.append(row)
    pairs = [(old, drawn.size) for old, drawn in zip(sizes, draws, strict=True)]
    return {"file": list(files), **as_arrays(rows), **resize_gains(pairs)}


def _reach(old: int, new: int) -> int:
    """Pixels that the cubic reaches beyond the border, rounded up."""
    return int(np.ceil(2 * max(1.0, old / new))) + 2


def _gain(old: int, new: int) -> np.ndarray:
    """`[new] float32`: 1 / the share of the cubic's weights that lies inside the image."""
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    first = np.floor(centre - 2 * stretch).astype(int) - 1
    taps = first[:, None] + np.arange(int(4 * stretch) + 4)
    t = np.abs(taps + 0.5 - centre[:, None]) / stretch
    inner = ((_CUBIC + 2) * t - (_CUBIC + 3)) * t * t + 1
    outer = (((t - 5) * t + 8) * t - 4) * _CUBIC
    weights = np.where(t < 1, inner, np.where(t < 2, outer, 0))
    inside = weights * ((taps >= 0) & (taps < old))
    return (weights.sum(1) / inside.sum(1)).astype(np.float32)


def _position(drawn: Draw, axis: int, crop: int) -> float:
    """Where DALI's window lies on the resized image, 0 to 1 of the room; it mirrors afterwards."""
    offset, _, length = drawn.place[axis]
    if axis == 1 and drawn.flip:
        offset = crop - offset - length
    room = drawn.size[axis] - crop
    return (drawn.window[axis].start - offset) / room if room else 0.0


def _adjust(image, kind, factor):
    """One adjustment of colour per sample; DALI's conditionals split the batch by `kind`."""
    if kind == HUE:
        adjusted = _shift_hue(image, factor)
    else:
        if kind == BRIGHTNESS:
            adjusted = _blend(image * factor)
        else:
            grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
            if kind == CONTRAST:
                level = dali_math.floor(fn.reductions.mean(grey) + 0.5)
                adjusted = _blend(image * factor + level * (1.0 - factor))
            else:
                adjusted = _blend(image * factor + grey * (1.0 - factor))
    return adjusted


def _blend(mixed):
    return fn.cast(mixed - _CUT, dtype=types.UINT8)


def _shift_hue(image, steps):
    """Pillow's way over 8-bit HSV (Convert.c), the three channels as planes."""
    red, green, blue = (fn.cast(image[:, :, c], dtype=types.FLOAT) for c in range(3))
    largest = dali_math.max(dali_math.max(red, green), blue)
    chroma = largest - dali_math.min(dali_math.min(red, green), blue)
    divisor = dali_math.max(chroma, 1.0)
    is_red = largest == red
    is_green = (largest == green) & (largest != red)
    is_blue = (largest != green) & (largest != red)
    sextants = (
        is_red * (green - blue)
        + is_green * (blue - red + 2.0 * chroma)
        + is_blue * (red - green + 4.0 * chroma)
    ) / divisor
    hue = dali_math.floor((sextants + 6.0 * (sextants < 0.0)) * 42.5) + steps
    hue = (hue - 256.0 * (hue >= 256.0)) * (6.0 / 255.0)
    saturation = dali_math.floor(chroma * 255.0 / dali_math.max(largest, 1.0))
    depth = largest * saturation * (1.0 / 255.0)
    planes = (
        largest - depth * dali_math.clamp(2.0 - dali_math.abs(hue - 3.0), 0.0, 1.0),
        largest - depth * dali_math.clamp(dali_math.abs(hue - 2.0) - 1.0, 0.0, 1.0),
        largest - depth * dali_math.clamp(dali_math.abs(hue - 4.0) - 1.0, 0.0, 1.0),
    )
    return fn.reinterpret(fn.cast(fn.stack(*planes, axis=2), dtype=types.UINT8), layout="HWC")
