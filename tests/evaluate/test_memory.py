"""An evaluation of any length runs in constant memory: a simulated stream of images, 81 classes.

Images and masks are made when they are asked for, so nothing but the evaluation can grow. What may
grow is a few numbers per image: its row, and its class probabilities for the average precision.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from wsis.data.dataset import Dataset
from wsis.evaluate.cam_candidates import make_sweep
from wsis.evaluate.cam_quality import evaluate_cams
from wsis.evaluate.cam_sweep import StoredCams, sweep_cams
from wsis.evaluate.protocols import Protocol
from wsis.evaluate.segmentation import evaluate_folder, evaluate_segmentation
from wsis.offline.masks import write_mask
from wsis.pseudo import PseudoRule
from wsis.types import Maps

CLASSES = 80
SIDE = 16
ROW = 1536
"""Bytes that one image may leave: 5 K for its probabilities and label, about 600 for its row."""


class Generated(Dataset):
    """As many images and masks as wanted, none of them stored; notes the resident memory."""

    def __init__(self, count: int, marks: tuple[int, ...]) -> None:
        labels = np.zeros((count, CLASSES), np.uint8)
        labels[np.arange(count), np.arange(count) % CLASSES] = 1
        super().__init__(
            name="generated",
            root="",
            split="val",
            classes=[f"class {k}" for k in range(CLASSES)],
            ids=[f"{i:06d}" for i in range(count)],
            labels=labels,
        )
        self.resident: dict[int, int] = {}
        self._marks = marks

    @property
    def mask_source(self) -> str:
        return "generated"

    def image_path(self, i: int) -> None:
        return None

    def mask_path(self, i: int) -> None:
        return None

    def has_mask(self, i: int) -> bool:
        return True

    def image_size(self, i: int) -> tuple[int, int]:
        return SIDE, SIDE

    def image(self, i: int) -> Image.Image:
        colour = (i % 256, i // 256 % 256, 90)
        return Image.new("RGB", (SIDE, SIDE), colour)

    def mask(self, i: int) -> np.ndarray:
        if i in self._marks:
            self.resident[i] = resident()
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[: SIDE // 2] = 1 + i % CLASSES
        return mask

    def growth(self) -> float:
        """Bytes per image between the two marks."""
        first, last = self._marks
        return (self.resident[last] - self.resident[first]) / (last - first)


def resident() -> int:
    """Memory of this process, bytes."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


class Tiny(nn.Module):
    """81 maps from three channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        self.layer = nn.Conv2d(3, CLASSES + 1, 1)
        self.crr = None

    def forward(self, image: torch.Tensor, *, decode: bool = True, refine: bool = True) -> Maps:
        logits = self.layer(nn.functional.avg_pool2d(image, 4))
        cams = logits[:, 1:]
        return Maps(cams, cams.mean((2, 3)), cams[:, :1], None, logits if decode else None)


COUNTS = [
    pytest.param(240, 60, id="240"),
    pytest.param(40_000, 2_000, id="40000", marks=pytest.mark.long),
]
PROTOCOL = Protocol(scales=(1.0,), flip=False)


@pytest.mark.parametrize(("count", "first"), COUNTS)
def test_of_a_network(count, first):
    data = Generated(count, (first, count - 1))
    result = evaluate_segmentation(Tiny(), data, protocol=PROTOCOL)
    assert result["scores"]["pixels"] == count * SIDE * SIDE
    assert len(result["images"]) == count
    print(f"{count} images: {data.growth():.0f} bytes per image")
    assert data.growth() < ROW + SLACK / count


@pytest.mark.parametrize(("count", "first"), COUNTS)
def test_of_cams(count, first):
    data = Generated(count, (first, count - 1))
    result = evaluate_cams(Tiny(), data, protocol=PROTOCOL, rule=PseudoRule(refine="none"))
    assert result["protocol"]["images"] == count
    print(f"{count} images: {data.growth():.0f} bytes per image")
    assert data.growth() < SLACK / count


@pytest.mark.parametrize(("count", "first"), COUNTS)
def test_of_stored_masks(count, first, tmp_path):
    data = Generated(count, (first, count - 1))
    write_mask(tmp_path / "masks" / "000000.png", np.ones((SIDE, SIDE), np.uint8), data.mask_ids)
    for name in data.ids[1:]:
        (tmp_path / "masks" / f"{name}.png").hardlink_to(tmp_path / "masks" / "000000.png")
    result = evaluate_folder(tmp_path / "masks", data)
    assert result["scores"]["pixels"] == count * SIDE * SIDE
    print(f"{count} images: {data.growth():.0f} bytes per image")
    assert data.growth() < ROW + SLACK / count


@pytest.mark.parametrize(("count", "first"), COUNTS)
def test_of_stored_cams(count, first, tmp_path):
    data = Generated(count, (first, count - 1))
    np.save(tmp_path / "000000.npy", np.full((CLASSES, 4, 4), 0.3, np.float32))
    for name in data.ids[1:]:
        (tmp_path / f"{name}.npy").hardlink_to(tmp_path / "000000.npy")
    sweep_cams(StoredCams(tmp_path, data, make_sweep()))
    print(f"{count} images: {data.growth():.0f} bytes per image")
    assert data.growth() < SLACK / count


SLACK = 4e6
"""Bytes by which an allocator may differ between two moments of the same work."""
