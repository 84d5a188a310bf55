"""Training batches in an order that two integers determine: the seed and the epoch.

Every sample has its own random generator, Philox keyed by (seed, epoch) with the image's position
as the counter, and the order of an epoch comes from the same key. So a batch depends neither on
the number of workers nor of processes, and a run resumes in the middle of an epoch without any
state of the loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from wsis.data.augment import Triple, crop_mask, draw, torchvision_functional, write_crop
from wsis.data.dataset import Dataset
from wsis.data.workers import signals_held, start_worker
from wsis.errors import InputError, MissingExtraError
from wsis.types import Batch

LOADERS = ("auto", "torch", "dali")
# what `draw` wants to know
DRAWN_FROM = ("crop", "resize_long", "resize_scale", "square", "flip", "jitter", "hsv")


class TrainLoader:
    """Augmented batches of a data set, shuffled anew each epoch.

    Args:
        dataset: images and labels; its masks are opened only with `masks`.
        batch_size: size of the global batch, over all processes.
        crop: side of the images in a batch.
        resize_long: range of the longer side before cropping.
        flip: probability of mirroring.
        jitter: brightness, contrast, saturation, hue.
        resize_scale: range of the factor of both sides, instead of the longer side's.
        hsv: largest shifts of hue, saturation and value.
        mean: of images in [0, 1], the backbone's.
        std: of images in [0, 1], the backbone's.
        seed: not negative.
        workers: processes that prepare batches; 0 prepares them in this one.
        masks: also load masks, for training with full supervision.
        square: resize images to squares, their shape not kept.
        rank: number of this process.
        world_size: number of processes; each gets its slice of every global batch.

    Attributes:
        kind: `torch`, or `dali` for its subclass.
        steps_per_epoch: global batches per epoch; the last partial one is dropped.

    Raises:
        InputError: batch not divisible by world size or larger than the data set, negative seed.

    Example:
        >>> from wsis.data import open_dataset
        >>> loader = TrainLoader(open_dataset("scenes", n_train=8), batch_size=4, crop=64,
        ...     resize_long=(64, 96), flip=0.5, jitter=(0.3, 0.3, 0.3, 0.1),
        ...     mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), seed=1)
        >>> [batch.image.shape[0] for batch in loader.epoch(0)]
        [4, 4]
    """

    kind = "torch"

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        crop: int,
        resize_long: tuple[int, int],
        flip: float,
        jitter: tuple[float, float, float, float],
        mean: Triple,
        std: Triple,
        seed: int,
        workers: int = 0,
        masks: bool = False,
        square: bool = False,
        rank: int = 0,
        world_size: int = 1,
        resize_scale: tuple[float, float] | None = None,
        hsv: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise InputError(
                f"batch size must be a positive multiple of the number of processes {world_size}, "
                f"got {batch_size}"
            )
        if batch_size > len(dataset):
            raise InputError(
                f"batch size {batch_size} exceeds the {len(dataset)} images of the data set; "
                "choose a smaller one"
            )
        if not 0 <= seed < 2**64:
            raise InputError(f"seed must be in [0, 2^64), got {seed}")
        if not 1 <= resize_long[0] <= resize_long[1]:
            raise InputError(f"expected resize_long 1 <= low <= high, got {resize_long}")
        if resize_scale is not None and not 0 < resize_scale[0] <= resize_scale[1]:
            raise InputError(f"expected resize_scale 0 < low <= high, got {resize_scale}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = len(dataset) // batch_size
        self._masks = masks
        self._transform: dict[str, Any] = {
            "crop": crop,
            "resize_long": tuple(resize_long),
            "square": square,
            "flip": flip,
            "jitter": tuple(jitter),
            "resize_scale": None if resize_scale is None else tuple(resize_scale),
            "hsv": tuple(hsv),
            "mean": tuple(mean),
            "std": tuple(std),
        }
        torchvision_functional()  # once here, else every worker imports it
        self._batches = _Told(_Batches(dataset, seed, masks, self._transform), workers)
        self._turn = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... of one epoch, equal to the tail of the whole epoch.

        Beginning another epoch ends this one.

        Raises:
            InputError: an image or a mask cannot be used; the message names the file.
        """
        self._turn += 1
        turn = self._turn
        self._batches.told[:] = [[(epoch, i) for i in batch] for batch in self._order(epoch, start)]
        with signals_held():
            batches = iter(self._batches.loader())  # the same one each time, if there are workers
        while (fields := next(batches, None)) is not None:
            if "error" in fields:
                raise InputError(fields["error"])
            yield Batch(**fields)
            if turn != self._turn:
                raise RuntimeError("another epoch of this loader has begun since; use that one")

    def _order(self, epoch: int, start: int) -> list[list[int]]:
        """Positions of this process's images in batch `start` and those after it."""
        order = _philox(self.seed, epoch).permutation(len(self.dataset))
        per_rank = self.batch_size // self.world_size
        first = range(
            start * self.batch_size + self.rank * per_rank,
            self.steps_per_epoch * self.batch_size,
            self.batch_size,
        )
        return [order[k : k + per_rank].tolist() for k in first]


def make_loader(
    kind: str, dataset: Dataset, *, device: torch.device | str = "cpu", **options: Any
) -> TrainLoader:
    """The loader of a kind: batches of both are the same up to rounding.

    Args:
        kind: `torch`, `dali`, or `auto`: DALI where it is installed, a GPU trains and the images
            are files and `hsv` shifts nothing, which DALI cannot; else torch.
        dataset: images and labels.
        device: where the batches are used; DALI prepares them there.
        options: of `TrainLoader`.

    Raises:
        InputError: unknown kind, or a wrong option.
        MissingExtraError: `dali`, which is not installed.

    Example:
        >>> from wsis.data import open_dataset
        >>> loader = make_loader("torch", open_dataset("scenes", n_train=8), batch_size=4, crop=64,
        ...     resize_long=(64, 96), flip=0.5, jitter=(0.3, 0.3, 0.3, 0.1),
        ...     mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), seed=1)
        >>> loader.kind
        'torch'
    """
    if kind not in LOADERS:
        raise InputError(f"unknown loader '{kind}', expected one of {', '.join(LOADERS)}")
    device = torch.device(device)
    files = dataset.image_path(0) is not None
    shifted = any(options.get("hsv", ()))
    if kind == "torch" or (kind == "auto" and (shifted or not (files and device.type == "cuda"))):
        return TrainLoader(dataset, **options)
    if shifted:
        raise InputError(
            f"the loader 'dali' has no shifts in HSV, got hsv {tuple(options['hsv'])}; use "
            "--data.loader torch, or --data.hsv '[0,0,0]'"
        )
    try:
        from wsis.data.dali import DaliLoader
    except ImportError as error:
        if kind == "auto":
            return TrainLoader(dataset, **options)
        raise MissingExtraError("nvidia-dali", "dali-cu13", f"the loader '{kind}'") from error
    return DaliLoader(dataset, device=device, **options)


def sample_generator(seed: int, epoch: int, i: int) -> torch.Generator:
    """The generator of image i in an epoch, from which all its draws come."""
    # Philox counters differ in another word than the one that counts draws: no overlap.
    rng = torch.Generator()
    return rng.manual_seed(int(_philox(seed, epoch, i + 1).integers(2**63)))


class _Told:
    """A `DataLoader` that prepares the batches it is told, by workers that outlive an epoch.

    Starting them anew for each epoch costs a fork of the training process and their first files.

    Attributes:
        told: changed in place. A list of its own: if the `DataLoader` knew this object, only the
            garbage collector would find them, and ending a worker from there takes torch 5 s.
    """

    def __init__(self, batches: _Batches, workers: int) -> None:
        self._batches = batches
        self._workers = workers
        self._loader: DataLoader[dict[str, Any]] | None = None
        self.told: list[list[tuple[int, int]]] = []

    def loader(self) -> DataLoader[dict[str, Any]]:
        """Of `told`; built when first needed, so that a loader which is not used has no workers."""
        if self._loader is None:
            self._loader = DataLoader(
                self._batches,
                batch_sampler=self.told,
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                collate_fn=_as_it_is,
                worker_init_fn=start_worker,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else each epoch would draw from the global one
            )
        return self._loader


class _Batches(TorchDataset[dict[str, Any]]):
    """Augmented batches by (epoch, position); a bad file makes it {"error": message}.

    An exception raised in a worker would reach the caller wrapped in the worker's traceback.
    """

    def __init__(self, dataset: Dataset, seed: int, masks: bool, transform: dict[str, Any]) -> None:
        self.dataset = dataset
        self.seed = seed
        self.masks = masks
        self.crop = transform["crop"]
        self.mean, self.std = transform["mean"], transform["std"]
        self.drawn_from = {name: transform[name] for name in DRAWN_FROM}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Every image is written where it stays: samples would be copied into a batch."""
        positions = [i for _, i in batch]
        images = torch.zeros(len(positions), 3, self.crop, self.crop)
        boxes, masks = [], []
        for out, (epoch, i) in zip(images, batch, strict=True):
            try:
                image = self.dataset.pixels(i)
                mask = self.dataset.mask(i) if self.masks else None
            except (InputError, MissingExtraError) as error:
                return {"error": str(error)}
            size = (image.shape[0], image.shape[1])
            drawn = draw(sample_generator(self.seed, epoch, i), size, **self.drawn_from)
            write_crop(image, drawn, out, self.mean, self.std)
            boxes.append(drawn.valid_box)
            if mask is not None:
                masks.append(crop_mask(mask, drawn, self.crop))
        return {
            "image": images,
            "label": torch.from_numpy(self.dataset.labels[positions].astype(np.float32)),
            "valid_box": torch.tensor(boxes),
            "index": torch.tensor(positions),
        } | ({"mask": torch.stack(masks)} if masks else {})


def _philox(seed: int, epoch: int, stream: int = 0) -> np.random.Generator:
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, stream, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _as_it_is(batch: Any) -> Any:
    return batch
