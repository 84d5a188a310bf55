"""The cases of `wsis bench`: operators, loader, a training step in parts, evaluation.

Every case first compares its result with the reference's, where there is one, then times both.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from wsis.bench import references
from wsis.bench.loop import Loop
from wsis.bench.measure import Measured, measure, wait
from wsis.data.dataset import Dataset
from wsis.data.loader import make_loader
from wsis.data.subset import Subset
from wsis.data.views import second_view
from wsis.engine.build import build_model
from wsis.engine.step import Siamese, pseudo_masks
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.segmentation import evaluate_segmentation
from wsis.losses.rtc import rtc_losses
from wsis.offline.predict import predict
from wsis.ops import confusion_matrix, normalize_cams, pamr, par
from wsis.ops.dense_crf import dense_crf
from wsis.recipes import get_recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP, RANGE, JITTER = 448, (448, 768), (0.3, 0.3, 0.3, 0.1)
_SIZE, _CLASSES, _CRF = 160, 21, (240, 320)


class Differs(AssertionError):
    """A result is not that of its reference; nothing is timed."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was done.
        ms: of one call.
        peak_mib: memory above what was held before; None where nobody tells.
        speed: what that is in a unit of its own, or empty.
        reference: against what, or empty.
        ratio: reference's time / ours.
        parts: milliseconds of the parts, for the training step.
    """

    name: str
    ms: float
    peak_mib: float | None = None
    speed: str = ""
    reference: str = ""
    ratio: float | None = None
    parts: dict[str, float] | None = None


def _row(name: str, ours: Measured, reference: str = "", theirs: Measured | None = None) -> Row:
    ratio = None if theirs is None else theirs.seconds / ours.seconds
    return Row(name, 1e3 * ours.seconds, ours.peak_mib, reference=reference, ratio=ratio)


def _same(name: str, found: Any, expected: Any, tolerance: float) -> None:
    error = float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())
    if not error <= tolerance:
        raise Differs(f"{name}: {error:g} away from its reference, expected at most {tolerance:g}")


def operators(device: torch.device) -> Iterator[Row]:
    """PAMR, PAR, CAM normalisation, confusion, dense CRF."""
    g = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 20, 20, generator=g), _SIZE, mode="bicubic")
    image = (image + 0.02 * torch.rand(image.shape, generator=g)).clamp(0, 1).to(device)
    masks = torch.rand(1, _CLASSES, _SIZE, _SIZE, generator=g).softmax(1).to(device)
    dilations, iterations = (1, 2, 4, 8, 12, 24), 10
    for name, operator in (("pamr", pamr), ("par", par)):

        def ours(operator: Callable[..., Any] = operator) -> Any:
            return operator(image, masks, iterations=iterations, dilations=dilations)

        def theirs(name: str = name) -> Any:
            return references.refine(image, masks, name, iterations, dilations)

        _same(name, ours().cpu(), theirs().cpu(), 1e-4)
        label = f"{name.upper()} 1 x {_CLASSES} x {_SIZE} x {_SIZE}"
        yield _row(label, measure(ours, device), "plain torch", measure(theirs, device))

    maps = [torch.randn(20, 14 * s, 14 * s, generator=g).to(device) for s in (1, 2, 3, 4)]
    size = (448, 448)
    _same(
        "CAM normalisation",
        normalize_cams(maps, size, variant="psa").cpu(),
        references.normalize_cams(maps, size).cpu(),
        1e-5,
    )
    yield _row(
        "CAM normalisation, 4 scales to 448",
        measure(lambda: normalize_cams(maps, size, variant="psa"), device, budget=1),
        "plain torch",
        measure(lambda: references.normalize_cams(maps, size), device, budget=1),
    )
    yield from _on_the_cpu(g)


def _on_the_cpu(g: torch.Generator) -> Iterator[Row]:
    cpu = torch.device("cpu")
    target = torch.randint(0, _CLASSES, (375, 500), generator=g).to(torch.uint8).numpy()
    pred = np.roll(target, 3)
    target[::25] = 255
    _same(
        "confusion",
        confusion_matrix(pred, target, _CLASSES),
        references.confusion_matrix(pred, target, _CLASSES),
        0,
    )
    yield _row(
        "confusion matrix, 375 x 500",
        measure(lambda: confusion_matrix(pred, target, _CLASSES), cpu, budget=0.5),
        "numpy",
        measure(lambda: references.confusion_matrix(pred, target, _CLASSES), cpu, budget=0.5),
    )
    height, width = _CRF
    image = F.interpolate(torch.rand(1, 3, 6, 8, generator=g), _CRF, mode="bicubic").clamp(0, 1)
    image = (255 * image).to(torch.uint8)
    coarse = 4 * torch.randn(1, _CLASSES, height // 16, width // 16, generator=g)
    energy = -F.interpolate(coarse, _CRF, mode="bilinear").log_softmax(1).contiguous()

    def ours() -> torch.Tensor:
        return dense_crf(image, energy, preset="psa", iterations=10, unary_kind="energy")

    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())

    def theirs() -> np.ndarray:
        return references.pydensecrf(pixels, energy[0].numpy(), "psa", 10)

    name = f"dense CRF, {_CLASSES} x {height} x {width}"
    try:
        expected = theirs()
    except ImportError:
        yield _row(name, measure(ours, cpu), "pydensecrf is not installed")
        return
    differing = float((ours()[0].numpy().argmax(0) != expected.argmax(0)).mean())
    _same(name, differing, 0, 1e-3)
    yield _row(name, measure(ours, cpu), "pydensecrf", measure(theirs, cpu))


def loader(data: Dataset, device: torch.device) -> Iterator[Row]:
    """The loader that training would take, in this process, against the plain loop."""
    count = min(len(data), 24)
    data = Subset(data, range(0, len(data), len(data) // count)[:count])
    batch = min(8, len(data))
    options: dict[str, Any] = {
        "crop": CROP,
        "resize_long": RANGE,
        "jitter": JITTER,
        "mean": MEAN,
        "std": STD,
    }
    ours = make_loader("auto", data, device=device, batch_size=batch, flip=0.5, seed=1, **options)

    def open_image(i: int) -> Any:
        from PIL import Image

        path = data.image_path(i)
        return data.image(i) if path is None else Image.open(path)

    loop = Loop(open_image, torch.from_numpy(np.array(data.labels[:])), **options)
    plain = torch.utils.data.DataLoader(loop, batch, shuffle=True, drop_last=True)
    random.seed(0)
    mine = measure(lambda: [len(b.image) for b in ours.epoch(0)], device, budget=3)
    theirs = measure(lambda: [len(images) for images, _ in plain], device, budget=3)
    images = ours.steps_per_epoch * batch
    row = _row(f"loader ({ours.kind}), {images} images to {CROP}", mine, "Pillow loop", theirs)
    yield replace(row, speed=f"{images / mine.seconds:.1f} images/s")


def training_step(data: Dataset, device: torch.device) -> Iterator[Row]:
    """A step of the recipe `demo` on the built-in scenes, all terms on, in parts."""
    config = get_recipe("demo")
    size, view2 = config.data.crop, config.data.view2
    torch.manual_seed(0)
    model = build_model(config.model, len(data.classes)).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    siamese = Siamese(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    batches = make_loader(
        "torch",
        data,
        batch_size=config.optim.batch_size,
        crop=size,
        resize_long=config.data.resize_long,
        flip=config.data.flip,
        jitter=config.data.jitter,
        mean=model.backbone.mean,
        std=model.backbone.std,
        seed=1,
    )
    turn = [0]
    parts: dict[str, list[float]] = {}
    began = [0.0]

    def mark(name: str, *, count: bool = True) -> None:
        wait(device)
        now = time.perf_counter()
        if count:
            parts.setdefault(name, []).append(1e3 * (now - began[0]))
        began[0] = now

    refining: list[float] = []

    def before(*_: Any) -> None:
        wait(device)
        refining.append(-time.perf_counter())

    def after(*_: Any) -> None:
        wait(device)
        refining[-1] += time.perf_counter()

    refinement: Any = model.crr
    if refinement is not None:
        refinement.register_forward_pre_hook(before)
        refinement.register_forward_hook(after)

    def step() -> None:
        refining.clear()
        mark("", count=False)
        batch = next(batches.epoch(turn[0])).to(device)
        turn[0] += 1
        mark("load")
        first, second = siamese(batch.image, second_view(batch.image, view2), True)
        mark("forward")
        spent = 1e3 * sum(refining)
        parts.setdefault("CRR", []).append(spent)
        parts["forward"][-1] -= spent
        masks = pseudo_masks(model, batch, first, config.pseudo)
        mark("refine")
        losses = rtc_losses(
            first,
            second,
            batch.label,
            image_size=(size, size),
            view2_size=view2,
            weights=config.loss,
            pseudo_masks=masks,
        )
        mark("losses")
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        mark("backward")
        optimizer.step()
        mark("optimiser")

    measured = measure(step, device, budget=4)
    middle = {name: float(np.median(times[1:])) for name, times in parts.items()}
    count = config.optim.batch_size
    yield Row(
        f"training step, demo, {count} x {size} x {size}",
        1e3 * measured.seconds,
        measured.peak_mib,
        f"{count / measured.seconds:.1f} images/s",
        parts=middle,
    )


def evaluation(data: Dataset, device: torch.device) -> Iterator[Row]:
    """Predict and score, two scales with mirroring, against one image after the other."""
    config = get_recipe("demo")
    torch.manual_seed(0)
    model = build_model(config.model, len(data.classes)).to(device)
    model = model.to(memory_format=torch.channels_last).eval()
    protocol = Protocol(scales=(1.0, 1.5), flip=True)
    classes = len(data.classes) + 1

    def ours() -> list[list[int]]:
        with redirect_stderr(io.StringIO()):  # its bar would cross ours
            return evaluate_segmentation(model, data, protocol=protocol)["confusion"]

    def theirs() -> np.ndarray:
        total = np.zeros((classes, classes), np.int64)
        for i in range(len(data)):
            mask = predict(model, data.image(i), scales=protocol.scales, flip=True).mask.cpu()
            total += references.confusion_matrix(mask.numpy(), data.mask(i), classes)
        return total

    _same("evaluation", ours(), theirs(), 0)
    mine = measure(ours, device, budget=3)
    row = _row(
        f"evaluation, {len(data)} images, 2 scales, mirrored",
        mine,
        "one image at a time",
        measure(theirs, device, budget=3),
    )
    yield replace(row, speed=f"{len(data) / mine.seconds:.1f} images/s")
