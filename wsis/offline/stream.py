"""Many images through one network: reading, passes, and what follows from them, at the same time.

Threads read, decode and resize the next images while the network sees this one, and other threads
refine, score and write the ones before. The number of images in hand is fixed, so memory does not
grow with the list. Every image is worked on as in a plain loop, and results come in the order of
the list: they are the loop's bit for bit. (Images are therefore not batched with each other: a
convolution of two images need not equal two convolutions. An image and its mirror image are.)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from wsis.data.inference import Images, named, pick_reader, read_views
from wsis.data.threads import in_threads
from wsis.offline.predict import Pass, device_of, scaling_of, show

if TYPE_CHECKING:
    from PIL import Image

    from wsis.models.network import Network

R = TypeVar("R")


def stream_passes(
    model: Network,
    images: Images,
    indices: Sequence[int],
    conclude: Callable[[int, Image.Image, list[Pass], Any], R],
    *,
    scales: Sequence[float],
    flip: bool,
    base_long: int | None,
    decode: bool,
    beside: Callable[[int], Any] | None = None,
    loader: str = "torch",
    workers: int = 2,
    device: torch.device | str | None = None,
) -> Generator[R, None, None]:
    """Show images of a list to a network and conclude something from the passes of each.

    At most ``4 * workers + 2`` images are in hand. Close the generator where it is left early
    (`contextlib.closing`), so that its threads end.

    Args:
        model: the network; its passes run in the caller's thread.
        images: a data set, or what is read like one.
        indices: which of its images, in this order.
        conclude: index, image, its passes (see `wsis.offline.predict.run_passes`) and what `beside`
            returned -> a result; called in several threads at a time. It should return what is
            small: results wait for their turn.
        scales: of the passes.
        flip: also the mirror image.
        base_long: long side before scaling, or None.
        decode: run the decoder (predictions); False runs refinement instead (seeds).
        beside: what else to read of an image by its index, in the threads that read.
        loader: `torch`, `dali` or `auto`, see `wsis.data.inference`.
        workers: threads that read, and as many that conclude; 0 does everything in this one.
        device: where the passes run; by default where the network's parameters lie.

    Yields:
        What `conclude` returned, in the order of `indices`.

    Raises:
        InputError: an image cannot be read or used; names the file. The images before it have
            been concluded.
        RuntimeError: any other failure, with the file's name.
    """
    device = device_of(model) if device is None else torch.device(device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def passes() -> Generator[tuple[int, Image.Image, list[Pass], Any], None, None]:
        reading = read_views(
            images,
            indices,
            scaling_of(model, scales, base_long),
            reader=pick_reader(loader, images, device),
            workers=workers,
            device=device,
            beside=beside,
        )
        with closing(reading):
            for i, shown, other in reading:
                with named(images, i):
                    found = show(model, shown, flip=flip, device=device, decode=decode)
                yield i, shown.image, found, other

    def concluded(one: tuple[int, Image.Image, list[Pass], Any]) -> R:
        # Threads have streams of their own; the passes were queued on the caller's.
        with named(images, one[0]), nullcontext() if stream is None else torch.cuda.stream(stream):
            return conclude(*one)

    yield from in_threads(concluded, passes(), workers=workers)
