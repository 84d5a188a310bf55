"""Training batches by DALI: decoding and augmentation on the GPU, or on the CPU without one.

Order and draws are the torch loader's, keyed by (seed, epoch, sample), and enter DALI as inputs
beside the encoded files. So DALI holds no state: a run resumes in the middle of an epoch exactly,
the number of threads and processes changes nothing, and both loaders make the same batches up to
rounding (`wsis.data.dali_graph` says how much).

What DALI decodes as Pillow does, 8-bit RGB and grey in JPEG and PNG, goes to its decoder as it
is. Everything else (GIF, CMYK, palettes, alpha, 16 bits, generated and cached images) is read by
`Dataset.pixels` like for the torch loader, errors included, and handed over as an uncompressed PPM;
so is a file that DALI's decoder turns out to refuse though Pillow reads it.

On the CPU this loader is there to be tested: DALI's bicubic resizing takes several times as long
there as torchvision's, and its arithmetic makes one pass over memory per sign; the torch loader is
about four times as fast (benchmarks/bench_loader.py). `auto` therefore takes it on GPUs only.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from wsis.data.augment import Draw, crop_mask, draw
from wsis.data.dali_graph import build_pipeline, feeds
from wsis.data.dataset import Dataset, Image
from wsis.data.loader import DRAWN_FROM, TrainLoader, sample_generator
from wsis.types import Batch

_PNG_DEPTH = 24  # position of the bit depth in a PNG file


class DaliLoader(TrainLoader):
    """`TrainLoader` by DALI; the images of its batches lie on `device`, the rest on the CPU.

    Args:
        dataset: images and labels; its masks are opened only with `masks`.
        device: a GPU, which then decodes and augments, or the CPU.
        options: of `TrainLoader`; `workers` are DALI's threads on the CPU and as many that read
            files, 0 is one thread of DALI and reading in this one.

    Raises:
        InputError: as `TrainLoader`.
    """

    kind = "dali"

    def __init__(
        self, dataset: Dataset, *, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._drawn_from = {name: self._transform[name] for name in DRAWN_FROM}
        self._stages = sum(strength > 0 for strength in self._transform["jitter"])
        self._pipeline: Any = None  # built by the first epoch
        self._by_pillow: set[int] = set()  # images whose files DALI has refused

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... of one epoch, equal to the tail of the whole epoch.

        DALI works on one batch while the caller uses the one before.

        Raises:
            InputError: an image or a mask cannot be used; the message names the file.
        """
        batches = self._prepared(epoch, self._order(epoch, start))
        running: list[_Sample] | None = None
        try:
            while True:
                failed = None
                try:
                    following = next(batches, None)
                except Exception as error:  # its turn comes after the batch that is running
                    following, failed = None, error
                done = None
                if running is not None:
                    done, running = self._take(running), None
                if following is not None:
                    self._start(following)
                    running = following
                if done is not None:
                    yield done
                if failed is not None:
                    raise failed
                if running is None:
                    return
        finally:
            batches.close()
            if running is not None and self._pipeline is not None:
                self._drop()

    def _prepared(self, epoch: int, order: list[list[int]]) -> Generator[list[_Sample], None, None]:
        """Read files and drawn augmentation of each batch, two batches ahead with workers."""
        if self.workers == 0:
            for batch in order:
                yield [self._sample(epoch, i) for i in batch]
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="wsis-read")
        try:
            pending: list[list[Future[_Sample]]] = []
            rest = iter(order)
            while True:
                for batch in islice(rest, 3 - len(pending)):
                    pending.append([pool.submit(self._sample, epoch, i) for i in batch])
                if not pending:
                    return
                yield [future.result() for future in pending.pop(0)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _sample(self, epoch: int, i: int) -> _Sample:
        file, size = (uncompressed if i in self._by_pillow else encoded)(self.dataset, i)
        mask = self.dataset.mask(i) if self._masks else None
        drawn = draw(sample_generator(self.seed, epoch, i), size, **self._drawn_from)
        target = None if mask is None else crop_mask(mask, drawn, self._transform["crop"])
        return _Sample(i, file, size, drawn, target)

    def _start(self, batch: list[_Sample]) -> None:
        """Hand a batch to DALI, which works on it in its own threads."""
        if self._pipeline is None:
            self._pipeline = build_pipeline(
                batch_size=self.batch_size // self.world_size,
                threads=max(1, self.workers),
                device_id=self.device.index if self.device.type == "cuda" else None,
                crop=self._transform["crop"],
                stages=self._stages,
                mean=self._transform["mean"],
                std=self._transform["std"],
            )
        inputs = feeds(
            [sample.file for sample in batch],
            [sample.size for sample in batch],
            [sample.drawn for sample in batch],
            crop=self._transform["crop"],
            stages=self._stages,
        )
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()

    def _take(self, batch: list[_Sample]) -> Batch:
        """The batch that DALI was given last."""
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
        failed = None
        try:
            (images,) = self._pipeline.share_outputs(stream)
        except RuntimeError as error:
            failed = error
        if failed is not None:
            self._pipeline = None  # DALI's pipelines do not survive an error
            self._start(self._decoded(batch, failed))
            (images,) = self._pipeline.share_outputs(stream)
        # No copy: the tensor keeps DALI's memory alive, and DALI's executor takes other memory.
        pixels = torch.from_dlpack(images.as_tensor())
        self._pipeline.release_outputs()
        positions = [sample.i for sample in batch]
        masks = [sample.mask for sample in batch if sample.mask is not None]
        return Batch(
            image=pixels,
            label=torch.from_numpy(self.dataset.labels[positions].astype(np.float32)),
            valid_box=torch.tensor([sample.drawn.valid_box for sample in batch]),
            index=torch.tensor(positions),
            mask=torch.stack(masks) if masks else None,
        )

    def _drop(self) -> None:
        """Forget the batch that DALI was given last; nobody asks for it, nor for its error."""
        try:
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()
        except RuntimeError:
            self._pipeline = None

    def _decoded(self, batch: list[_Sample], error: RuntimeError) -> list[_Sample]:
        """The batch with the files that made DALI fail decoded by Pillow.

        Raises:
            InputError: Pillow cannot decode one either; DALI does not always name it.
            RuntimeError: DALI's own error, which is not about a file.
        """
        for sample in batch:
            self.dataset.image(sample.i)
        refused = {sample.i for sample in batch if not _decodes(sample.file)}
        if not refused:
            raise error
        self._by_pillow |= refused
        return [
            replace(sample, file=uncompressed(self.dataset, sample.i)[0])
            if sample.i in refused
            else sample
            for sample in batch
        ]


@dataclass(frozen=True)
class _Sample:
    """One image on its way: encoded, with all that was drawn for it."""

    i: int
    file: np.ndarray
    size: tuple[int, int]
    drawn: Draw
    mask: torch.Tensor | None


def encoded(dataset: Dataset, i: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Image i as bytes that DALI decodes to what Pillow decodes, and its height and width.

    Returns:
        `[bytes] uint8`, and (height, width).

    Raises:
        InputError: the file is missing, damaged, no image, or has 16 bits per channel; damage
            behind the header of a JPEG or PNG is found by DALI only.
    """
    path = dataset.image_path(i)
    if path is not None and not dataset.is_decoded and path.is_file():
        file = np.fromfile(path, np.uint8)
        size = _plain_size(file)
        if size is not None:
            return file, size
    return uncompressed(dataset, i)


def uncompressed(dataset: Dataset, i: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Image i as Pillow decodes it, as the bytes of a PPM, and its height and width.

    Raises:
        InputError: the file is missing, damaged, no image, or has 16 bits per channel.
    """
    pixels = dataset.pixels(i)
    height, width, _ = pixels.shape
    header = b"P6 %d %d 255\n" % (width, height)
    return np.frombuffer(header + pixels.tobytes(), np.uint8), (height, width)


def _plain_size(file: np.ndarray) -> tuple[int, int] | None:
    """Height and width of an 8-bit RGB or grey JPEG or PNG; None for everything else."""
    try:
        with Image.open(io.BytesIO(file.data)) as image:
            deep = image.format == "PNG" and file[_PNG_DEPTH] != 8
            plain = image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L") and not deep
            plain = plain and "transparency" not in image.info
            return (image.height, image.width) if plain else None
    except Exception:  # whatever it is, Dataset.image says it with the file's name
        return None


def _decodes(file: np.ndarray) -> bool:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode():
        return fn.decoders.image(fn.external_source(name="file"), output_type=types.RGB)

    pipeline = decode()
    pipeline.build()
    try:
        for _ in range(2):  # as many as it prefetches
            pipeline.feed_input("file", [file])
        pipeline.run()
    except RuntimeError:
        return False
    return True
