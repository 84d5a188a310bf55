"""What a trained network is shown: an image at several sizes, normalised."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from wsis.data.augment import Triple, normalize
from wsis.data.loader import LOADERS
from wsis.data.threads import in_threads
from wsis.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_BICUBIC = 3  # PIL's number of Resampling.BICUBIC: keeps Pillow out of this module's imports


class Images(Protocol):
    """What is read here; a `Dataset` is one."""

    @property
    def ids(self) -> Sequence[str]:
        """Name of each image."""

    def image_path(self, i: int) -> Path | None:
        """File of image i, or None."""

    def image(self, i: int) -> Image.Image:
        """Image i in RGB."""


@dataclass(frozen=True)
class Scaling:
    """The sizes at which images are shown, and how their pixels are normalised.

    Attributes:
        scales: relative to the image (or to `base_long`), each > 0.
        mean: of images in [0, 1], the backbone's.
        std: of images in [0, 1], the backbone's.
        base_long: long side, in pixels, to which an image is first resized; None keeps its size.

    Raises:
        InputError: no scale, one that is not positive, or a long side below 1.
    """

    scales: tuple[float, ...]
    mean: Triple
    std: Triple
    base_long: int | None = None

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise InputError(f"scales must be positive numbers, got {list(self.scales)}")
        if self.base_long is not None and self.base_long < 1:
            raise InputError(f"base_long must be at least 1 pixel, got {self.base_long}")

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of each view: ``int(side * scale)``, at least 1 (ChunyanWang1/RTC)."""
        if self.base_long is not None:
            ratio = self.base_long / max(width, height)
            height, width = max(1, round(height * ratio)), max(1, round(width * ratio))
        return [(max(1, int(height * s)), max(1, int(width * s))) for s in self.scales]


@dataclass(frozen=True)
class Shown:
    """One image, as the network is to see it.

    Attributes:
        image: RGB, as stored.
        views: per scale ``[3, h, w] float32``, normalised.
    """

    image: Image.Image
    views: tuple[Tensor, ...]


def make_views(image: Image.Image, scaling: Scaling) -> Shown:
    """Resize (bicubic, antialiased, as Pillow does) and normalise one image at every scale.

    Raises:
        InputError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise InputError(
            f"the image must be RGB, got mode {image.mode}; open it with .convert('RGB')"
        )
    sizes = scaling.sizes(image.height, image.width)
    resized = (image.resize((width, height), _BICUBIC) for height, width in sizes)
    return Shown(image, tuple(normalize(view, scaling.mean, scaling.std) for view in resized))


@contextmanager
def named(images: Images, i: int) -> Iterator[None]:
    """Errors of the block name image i; those that are no InputError become RuntimeErrors."""
    try:
        yield
    except MissingExtraError:
        raise
    except Exception as error:
        stem, text = images.ids[i], str(error)
        path = images.image_path(i)
        known = (f"{stem}.", f"'{stem}'", f"{stem}:", str(path or stem))
        if isinstance(error, InputError):
            if any(name in text for name in known):
                raise
            raise InputError(f"{path or stem}: {text}") from None
        raise RuntimeError(f"{path or stem}: {type(error).__name__}: {text}") from error


def pick_reader(kind: str, images: Images, device: torch.device | str) -> str:
    """`torch` or `dali` for a loader's name: the rule of `wsis.data.loader.make_loader`.

    Raises:
        InputError: unknown name.
        MissingExtraError: `dali`, which is not installed.
    """
    if kind not in LOADERS:
        raise InputError(f"unknown loader '{kind}', expected one of {', '.join(LOADERS)}")
    files = len(images.ids) > 0 and images.image_path(0) is not None
    if kind == "torch" or (kind == "auto" and not (files and torch.device(device).type == "cuda")):
        return "torch"
    try:
        import wsis.data.dali_inference  # noqa: F401
    except ImportError as error:
        if kind == "auto":
            return "torch"
        raise MissingExtraError("nvidia-dali", "dali-cu13", f"the loader '{kind}'") from error
    return "dali"


def read_views(
    images: Images,
    indices: Sequence[int],
    scaling: Scaling,
    *,
    reader: str = "torch",
    workers: int = 2,
    device: torch.device | str = "cpu",
    beside: Callable[[int], Any] | None = None,
) -> Generator[tuple[int, Shown, Any], None, None]:
    """Images of a list as the network is to see them, read ahead by threads.

    Args:
        images: where they come from.
        indices: which of them, in this order.
        scaling: sizes and normalisation.
        reader: `torch` (Pillow), or `dali`, which decodes and resizes on the GPU where `device` is
            one; both give the same views within one level of 255.
        workers: threads that read ahead, see `in_threads`; 0 reads when asked.
        device: where DALI works and leaves the views.
        beside: what else to read of an image, in the same thread (its mask); None reads nothing.

    Yields:
        Index, image and views, and what `beside` returned.

    Raises:
        InputError: an image cannot be read; names the file.
    """
    if reader == "dali":
        from wsis.data.dali_inference import read_views_by_dali

        yield from read_views_by_dali(
            images, indices, scaling, workers=workers, device=device, beside=beside
        )
        return

    def read(i: int) -> tuple[int, Shown, Any]:
        with named(images, i):
            shown = make_views(images.image(i), scaling)
            return i, shown, None if beside is None else beside(i)

    yield from in_threads(read, indices, workers=workers)
