"""Views of images for a trained network by DALI: decoded and resized on the GPU, or on the CPU.

Resizing follows Pillow as in training (`wsis.data.dali_graph`), so views are Pillow's within one
level of 255. DALI holds no state; `wsis.data.dali.encoded` says which files it decodes itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from wsis.data.dali import encoded
from wsis.data.dali_graph import as_arrays, decoded, inputs, resize_gains, resize_row, resized
from wsis.data.dataset import Dataset, Image
from wsis.data.inference import Images, Scaling, Shown, make_views, named
from wsis.data.threads import in_threads

if TYPE_CHECKING:
    from wsis.data.augment import Triple


@dataclass(frozen=True)
class _Sample:
    """One image on its way: encoded, its height and width, and what was read beside it."""

    i: int
    file: np.ndarray
    size: tuple[int, int]
    beside: Any


def read_views_by_dali(
    images: Images,
    indices: Sequence[int],
    scaling: Scaling,
    *,
    workers: int,
    device: torch.device | str,
    beside: Callable[[int], Any] | None,
) -> Generator[tuple[int, Shown, Any], None, None]:
    """`wsis.data.inference.read_views` by DALI.

    DALI works on `workers` images at a time, the next ones while the caller uses these. Images that
    it fails on are read by Pillow, with a warning, or with Pillow's error, which names the file.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    def read(i: int) -> _Sample:
        with named(images, i):
            file, size = encoded(cast("Dataset", images), i)
            return _Sample(i, file, size, None if beside is None else beside(i))

    reading = in_threads(read, indices, workers=workers)
    views = _Views(images, scaling, max(1, workers), device)
    with closing(reading), closing(views):
        running: list[_Sample] = []
        for batch, failed in _batches(reading, max(1, workers)):
            done = views.take(running) if running else iter(())
            if batch:
                views.start(batch)
            yield from done
            running = batch
            if failed is not None:
                if running:
                    yield from views.take(running)
                raise failed
        if running:
            yield from views.take(running)


def _batches(
    reading: Iterable[_Sample], size: int
) -> Generator[tuple[list[_Sample], Exception | None], None, None]:
    """Batches of what was read; with an error comes what was read before it."""
    batch: list[_Sample] = []
    try:
        for sample in reading:
            batch.append(sample)
            if len(batch) == size:
                yield batch, None
                batch = []
    except Exception as error:
        yield batch, error
    else:
        yield batch, None


class _Views:
    """A pipeline that makes the views of batches, one batch at a time."""

    def __init__(
        self, images: Images, scaling: Scaling, batch_size: int, device: torch.device
    ) -> None:
        self._images, self._scaling, self._device = images, scaling, device
        self._batch_size = batch_size
        self._pipeline: Any = None
        self._running = False

    def start(self, batch: list[_Sample]) -> None:
        """Hand a batch to DALI, which works on it in its own threads."""
        if self._pipeline is None:
            self._pipeline = _build(
                batch_size=self._batch_size,
                device_id=self._device.index if self._device.type == "cuda" else None,
                views=len(self._scaling.scales),
                mean=self._scaling.mean,
                std=self._scaling.std,
            )
        self._pipeline.feed_input("file", [sample.file for sample in batch])
        rows: list[dict[str, Any]] = [{} for _ in batch]
        gains: dict[str, Any] = {}
        sizes = [self._scaling.sizes(*sample.size) for sample in batch]
        for k in range(len(self._scaling.scales)):
            pairs = [(sample.size, new[k]) for sample, new in zip(batch, sizes, strict=True)]
            for row, pair in zip(rows, pairs, strict=True):
                row |= resize_row(*pair, f"view{k}_")
            gains |= resize_gains(pairs, f"view{k}_")
        for name, values in (as_arrays(rows) | gains).items():
            self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()
        self._running = True

    def take(self, batch: list[_Sample]) -> Generator[tuple[int, Shown, Any], None, None]:
        """The views of the batch that was started last; nothing of DALI's is waited for later."""
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
        try:
            pixels, *views = self._pipeline.share_outputs(stream)
        except RuntimeError as error:
            self._pipeline, self._running = None, False  # DALI's pipelines do not survive an error
            return self._by_pillow(batch, error)
        # No copies: the tensors keep DALI's memory alive, and its executor takes other memory.
        done = [
            (
                sample.i,
                Shown(
                    Image.fromarray(torch.from_dlpack(pixels[k]).numpy()),
                    tuple(torch.from_dlpack(view[k]) for view in views),
                ),
                sample.beside,
            )
            for k, sample in enumerate(batch)
        ]
        self._pipeline.release_outputs()
        self._running = False
        return (one for one in done)

    def close(self) -> None:
        """Let DALI end what it was given."""
        if self._running:
            self._running = False
            with suppress(RuntimeError):  # about a batch that nobody wants any more
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()

    def _by_pillow(
        self, batch: list[_Sample], error: RuntimeError
    ) -> Generator[tuple[int, Shown, Any], None, None]:
        for sample in batch:
            with named(self._images, sample.i):
                shown = make_views(self._images.image(sample.i), self._scaling)
            views = tuple(view.to(self._device) for view in shown.views)
            yield sample.i, replace(shown, views=views), sample.beside
        names = ", ".join(self._images.ids[sample.i] for sample in batch)
        reason = str(error).splitlines()[0]
        warnings.warn(f"DALI failed on {names}, read by Pillow instead: {reason}", stacklevel=2)


def _build(*, batch_size: int, device_id: int | None, views: int, mean: Triple, std: Triple) -> Any:
    """A built pipeline: the decoded image on the CPU, then the views."""
    on_gpu = device_id is not None
    given = inputs(on_gpu)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=batch_size,
        device_id=device_id,
        prefetch_queue_depth=1,
    )
    def graph():
        image = decoded(on_gpu)
        made = [
            fn.crop_mirror_normalize(
                resized(image, given, f"view{k}_"),
                mean=[255 * m for m in mean],
                std=[255 * s for s in std],
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            for k in range(views)
        ]
        return image.cpu(), *made

    pipeline = graph()
    pipeline.build()
    return pipeline
