from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from wsis.data.color import HUE, adjust, hue_steps, shift_hsv

TORCHVISION = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def assert_torchvisions(image: np.ndarray, k: int, factor: float) -> None:
    expected = np.asarray(TORCHVISION[k](Image.fromarray(image), factor))
    np.testing.assert_array_equal(np.asarray(adjust(image, k, factor)), expected)


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.0, 0.7, 0.9137, 1.0, 1.0001, 1.3, 2.5])
def test_blends_are_torchvisions(k, factor):
    rng = np.random.default_rng(k)
    assert_torchvisions(rng.integers(0, 256, (90, 70, 3), np.uint8), k, factor)
    assert_torchvisions(rng.integers(90, 120, (1, 3, 3), np.uint8), k, factor)
    assert_torchvisions(np.full((4, 4, 3), 255, np.uint8), k, factor)


def colours(levels: np.ndarray) -> np.ndarray:
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)
    return grid.reshape(len(levels), -1, 3)


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.003, 0.0, 0.0421, 0.1, 0.5])
def test_hue_is_torchvisions(turns):
    levels = np.unique(np.r_[0:256:9, 0, 1, 127, 128, 254, 255]).astype(np.uint8)
    assert_torchvisions(colours(levels), HUE, turns)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    assert_torchvisions(noise, HUE, turns)
    assert_torchvisions(noise // 40 + 100, HUE, turns)  # low saturation


@pytest.mark.long
@pytest.mark.parametrize("turns", [0.0, 0.05, -0.37])
def test_hue_of_every_colour(turns):
    second, third = np.meshgrid(np.arange(256), np.arange(256))
    for first in range(256):
        image = np.stack([np.full_like(second, first), second, third], 2).astype(np.uint8)
        assert_torchvisions(image, HUE, turns)


def test_pictures_and_arrays_alike():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for k in range(4):
        found = np.asarray(adjust(Image.fromarray(image), k, 0.4))
        np.testing.assert_array_equal(found, np.asarray(adjust(image, k, 0.4)))


@pytest.mark.parametrize(("turns", "steps"), [(0, 0), (0.1, 25), (-0.1, 231), (0.5, 127)])
def test_hue_steps(turns, steps):
    assert hue_steps(turns) == steps


def test_no_shift_of_hsv_is_pillows_way_there_and_back():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    expected = np.asarray(Image.fromarray(noise).convert("HSV").convert("RGB"))
    np.testing.assert_array_equal(shift_hsv(noise, 0, 0, 0), expected)


@pytest.mark.parametrize(
    ("hue", "saturation", "value"), [(10, -7, 9), (-10, 250, -3), (90, 0, 255)]
)
def test_shifts_of_hsv_are_pillows_channels_plus_the_shift(hue, saturation, value):
    levels = np.unique(np.r_[0:256:15, 1, 127, 254]).astype(np.uint8)
    image = colours(levels)
    channels = np.asarray(Image.fromarray(image).convert("HSV")).astype(int)
    channels[..., 0] = (channels[..., 0] + round(hue / 180 * 256)) % 256
    channels[..., 1] = (channels[..., 1] + saturation).clip(0, 255)
    channels[..., 2] = (channels[..., 2] + value).clip(0, 255)
    shifted = Image.fromarray(channels.astype(np.uint8), "HSV").convert("RGB")
    np.testing.assert_array_equal(shift_hsv(image, hue, saturation, value), np.asarray(shifted))
