"""The built-in data set: procedurally drawn scenes with exact masks. No file, no network.

Six classes, each an outline with a texture of its own, on a cluttered background. Colours of
objects, clutter and background come from one distribution, so that colour says nothing about the
class; plain and noise-textured blobs distract; objects vary in scale, rotation, proportion and
texture frequency, overlap, are cut by the border and partly hidden by blobs. Some pairs of classes
occur together more often than others.

Image i of a split is a function of (seed, split, i): Philox keyed by (seed, split), counter i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from wsis.data.dataset import Dataset
from wsis.errors import InputError

CLASSES = ("disc", "square", "triangle", "ring", "star", "cross")
SPLITS = ("train", "val")
_BLOB = -1  # kind of a distractor; objects have their class's index
_CLASS_COUNT_ODDS = (0.50, 0.33, 0.17)  # one, two, three classes in an image
_PARTNER_ODDS = 0.5  # a second class is the first one's partner, else any
_MIN_DISTANCE = 0.7  # of two objects' centres, in units of the sum of their radii


@dataclass(frozen=True)
class Item:
    """One thing in a scene, in units of the image's side."""

    kind: int
    x: float
    y: float
    radius: float


class Scenes(Dataset):
    """Procedurally drawn images of six classes, see the module.

    Args:
        split: `train` or `val`.
        n_train: images of the train split.
        n_val: images of the val split.
        size: side of the square images in pixels, at least 32.
        seed: not negative; another seed is another data set.

    Raises:
        InputError: unknown split, or an option out of range.
    """

    def __init__(
        self, split: str, *, n_train: int = 1200, n_val: int = 200, size: int = 112, seed: int = 0
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"data set 'scenes' has the splits train and val, got '{split}'")
        if size < 32 or seed < 0:
            raise InputError(f"scenes need size >= 32 and seed >= 0, got {size} and {seed}")
        self.size = size
        self.seed = seed
        count = n_train if split == "train" else n_val
        labels = np.zeros((max(count, 0), len(CLASSES)), np.uint8)
        for i in range(count):
            rng = _generator(seed, split, i, stream=0)
            labels[i, [item.kind for item in plan_objects(rng)]] = 1
        super().__init__(
            name="scenes",
            root="",
            split=split,
            classes=CLASSES,
            ids=[f"{split}_{i:05d}" for i in range(count)],
            labels=labels,
        )

    @property
    def has_masks(self) -> bool:
        """Always: masks are drawn with the images."""
        return True

    @property
    def mask_source(self) -> str:
        """Exact outlines of the drawn objects."""
        return "drawn"

    def image_path(self, i: int) -> Path | None:
        """None: images are drawn."""
        return None

    def has_mask(self, i: int) -> bool:
        """Every image has one."""
        return self.has_masks

    def mask_path(self, i: int) -> Path | None:
        """None: masks are drawn."""
        return None

    def image(self, i: int) -> Image.Image:
        """Image i, RGB."""
        return Image.fromarray(self._draw(i)[0])

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width."""
        return self.size, self.size

    def mask(self, i: int) -> np.ndarray:
        """`[H, W] uint8` ids 0..6 of the frontmost thing at each pixel; no 255."""
        return self._draw(i)[1]

    def _draw(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        objects = plan_objects(_generator(self.seed, self.split, i, stream=0))
        return draw_scene(_generator(self.seed, self.split, i, stream=1), objects, self.size)


def _generator(seed: int, split: str, i: int, *, stream: int) -> np.random.Generator:
    key = np.array([seed, SPLITS.index(split)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, i, stream]))


def plan_objects(rng: np.random.Generator) -> list[Item]:
    """Classes, places and sizes of a scene's objects, largest first: the order of painting.

    Centres keep a distance and smaller objects lie in front, so a part of each stays visible and
    image-level labels are known without drawing.
    """
    first = int(rng.integers(len(CLASSES)))
    kinds = [first]
    for _ in range(int(rng.choice(3, p=_CLASS_COUNT_ODDS))):
        partner = (first + len(CLASSES) // 2) % len(CLASSES)
        others = [c for c in range(len(CLASSES)) if c not in kinds]
        likely = partner in others and rng.random() < _PARTNER_ODDS
        kinds.append(partner if likely else int(rng.choice(others)))
    if len(kinds) < 3 and rng.random() < 0.35:
        kinds.append(kinds[int(rng.integers(len(kinds)))])
    radii = np.sort(rng.uniform(0.24, 0.42, len(kinds)) / len(kinds) ** 0.45)[::-1]
    rng.shuffle(kinds)
    placed: list[Item] = []
    for kind, radius in zip(kinds, radii, strict=True):
        while True:
            x, y = rng.uniform(0.6 * radius, 1 - 0.6 * radius, 2)
            if all(
                np.hypot(x - item.x, y - item.y) >= _MIN_DISTANCE * (radius + item.radius)
                for item in placed
            ):
                break
            radius *= 0.97
        placed.append(Item(kind, float(x), float(y), float(radius)))
    return sorted(placed, key=lambda item: -item.radius)


def draw_scene(
    rng: np.random.Generator, objects: list[Item], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw background, clutter, objects and what hides parts of them, back to front.

    Returns:
        Image `[size, size, 3] uint8` and mask `[size, size] uint8`.
    """
    ground = _color(rng)
    clouds = 0.3 * _noise(rng, 3, size) + 0.25 * _noise(rng, 7, size) + 0.12 * _noise(rng, 19, size)
    canvas = _two_tone(clouds, ground, _tone(rng, ground))
    mask = np.zeros((size, size), np.uint8)
    angle = rng.uniform(0, 2 * math.pi)
    light = math.cos(angle), math.sin(angle)
    clutter = [
        Item(_BLOB, rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.17))
        for _ in range(rng.integers(3, 8))
    ]
    hiding = []
    for item in objects:
        if rng.random() < 0.3:
            angle = rng.uniform(0, 2 * math.pi)
            x, y = item.x + item.radius * math.cos(angle), item.y + item.radius * math.sin(angle)
            hiding.append(Item(_BLOB, x, y, item.radius * rng.uniform(0.25, 0.45)))
    for item in [*clutter, *objects, *hiding]:
        _paint(rng, canvas, mask, item, ground, light)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * 0.015
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8), mask


def _paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    mask: np.ndarray,
    item: Item,
    ground: np.ndarray,
    light: tuple[float, float],
) -> None:
    """Draw one thing and its soft shadow into canvas and mask."""
    size = len(mask)
    radius = item.radius * size
    shadow = 0.12 * radius
    x0, x1 = (int(np.clip(item.x * size + s * 1.35 * radius, 0, size)) for s in (-1, 1))
    y0, y1 = (int(np.clip(item.y * size + s * 1.35 * radius, 0, size)) for s in (-1, 1))
    rows, columns = np.ogrid[y0:y1, x0:x1]
    dy = (rows + 0.5 - item.y * size).astype(np.float32)
    dx = (columns + 0.5 - item.x * size).astype(np.float32)
    angle, aspect = rng.uniform(0, 2 * math.pi), rng.uniform(0.8, 1.0)
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    waves = rng.uniform((-0.13, 0), (0.13, 2 * math.pi), (4, 2)).tolist()
    spikes = int(rng.integers(5, 8))

    def outline(dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, v = cos * dx + sin * dy, (cos * dy - sin * dx) / aspect
        return u, v, _distance(item.kind, u, v, waves, spikes) * radius

    window, window_mask = canvas[y0:y1, x0:x1], mask[y0:y1, x0:x1]
    shaded = outline(dx - shadow * light[0], dy - shadow * light[1])[2]
    depth = (0.5 - shaded / (2 * shadow + 1)).clip(0, 1)
    window *= 1 - 0.35 * depth[..., None]
    u, v, distance = outline(dx, dy)
    alpha = (0.5 - distance).clip(0, 1)[..., None]
    # In units of the radius; never so fine that a network's first stride would blur it away.
    period = max(rng.uniform(0.20, 0.36), 0.065 / item.radius)
    paint = max((_color(rng) for _ in range(3)), key=lambda color: np.abs(color - ground).sum())
    if item.kind == _BLOB:
        grain = _noise(rng, int(rng.integers(3, 12)), max(u.shape))
        tone = _tone(rng, paint) if rng.random() < 0.5 else paint
        color = _two_tone(3 * grain[: u.shape[0], : u.shape[1]], paint, tone)
    else:
        color = _two_tone(_texture(item.kind, u, v, period), paint, _tone(rng, paint))
    color *= 1 - 0.12 * (dx * light[0] + dy * light[1])[..., None] / radius
    window += alpha * (color - window)
    window_mask[distance < 0] = item.kind + 1


def _distance(
    kind: int, x: np.ndarray, y: np.ndarray, waves: list[list[float]], spikes: int
) -> np.ndarray:
    """Rough signed distance to the outline, negative inside, in units of the radius."""
    if kind == _BLOB:
        theta = np.arctan2(y, x)
        wobble = sum(a * np.cos(k * theta + phase) for k, (a, phase) in enumerate(waves, 1))
        return np.hypot(x, y) - 0.8 - wobble
    match CLASSES[kind]:
        case "disc":
            return np.hypot(x, y) - 1
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.86
        case "triangle":
            return np.maximum(np.abs(x) * 0.866 - y * 0.5, y) - 0.6
        case "ring":
            return np.abs(np.hypot(x, y) - 0.7) - 0.3
        case "star":
            turns = np.arctan2(y, x) * (spikes / (2 * math.pi))
            reach = np.abs(turns - np.round(turns)) * 2
            return (np.hypot(x, y) - 1.1 + 0.55 * reach) * 0.7
        case _:
            a, b = np.abs(x), np.abs(y)
            return np.maximum(np.maximum(a, b) - 1, np.minimum(a, b) - 0.38)


def _texture(kind: int, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Pattern of a class, about -1..1: stripes, checks, dots, spokes, circles, zigzag."""
    w = 2 * math.pi / period
    match CLASSES[kind]:
        case "disc":
            return np.sin(w * x)
        case "square":
            return 1.6 * np.sin(w / 2 * x) * np.sin(w / 2 * y)
        case "triangle":
            return np.cos(w * x) + np.cos(w * y) - 0.6
        case "ring":
            return np.sin(round(4 / period) * np.arctan2(y, x))
        case "star":
            return np.sin(w * np.hypot(x, y))
        case _:
            bend = np.abs(x / (2 * period) - np.round(x / (2 * period))) * 2
            return np.sin(w * (y + period * bend))


def _two_tone(pattern: np.ndarray, dark: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """`[h, w, 3]` colours between two tones; the pattern decides, with soft edges around 0."""
    share = (0.5 + pattern).clip(0, 1)[..., None]
    return dark + share * (bright - dark)


def _color(rng: np.random.Generator) -> np.ndarray:
    """A colour of any hue, `[3] float32`: the one distribution for everything that is painted."""
    hue, saturation, value = rng.uniform((0, 0.15, 0.35), (1, 0.75, 0.95))
    wheel = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (value * (1 - saturation * (1 - wheel.clip(0, 1)))).astype(np.float32)


def _tone(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """A darker or brighter tone of a colour."""
    strength = rng.uniform(0.4, 0.65)
    return color * (1 - strength) if color.mean() > 0.5 else color + strength * (1 - color)


def _noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Smooth noise `[size, size]`, about -1..1, with `cells` bumps along a side."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    weights = _interpolation(cells, size)
    return weights @ grid @ weights.T


@cache
def _interpolation(cells: int, size: int) -> np.ndarray:
    """`[size, cells + 1]` weights of grid points at each pixel, eased between neighbours."""
    place = (np.arange(size) + 0.5) * cells / size
    left = place.astype(int)
    ease = (1 - np.cos((place - left) * np.pi)) / 2
    weights = np.zeros((size, cells + 1), np.float32)
    weights[np.arange(size), left] = 1 - ease
    weights[np.arange(size), left + 1] = ease
    return weights
