from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from wsis.data import augment
from wsis.data.augment import draw, normalize, train_transform
from wsis.data.views import second_view
from wsis.errors import InputError, MissingExtraError

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # pixels stay 0..255
STILL = {"flip": 0.0, "jitter": (0.0, 0.0, 0.0, 0.0)}
USUAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, as photographs have."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_normalize_is_its_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    expected = (pixels / 255 - USUAL["mean"]) / USUAL["std"]
    for image in (pixels, Image.fromarray(pixels), pixels[::-1][::-1]):
        out = normalize(image, **USUAL)
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        np.testing.assert_allclose(out.permute(1, 2, 0), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 4), (3, 7, 5)])
def test_normalize_wants_three_8_bit_channels(shape):
    with pytest.raises(InputError, match=r"image must be \[H, W, 3\] uint8"):
        normalize(np.zeros(shape, np.uint8), **USUAL)
    with pytest.raises(InputError, match="float32"):
        normalize(np.zeros((7, 5, 3), np.float32), **USUAL)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (1, 300), (300, 1), (63, 129), (500, 375)])
def test_padding_is_zero_after_normalisation(size):
    image = Image.new("RGB", size, (255, 255, 255))
    mask = np.full(size[::-1], 3, np.uint8)
    for seed in range(6):
        out, out_mask, box = train_transform(
            image, mask, rng(seed), crop=96, resize_long=(60, 130), **USUAL
        )
        assert out.shape == (3, 96, 96)
        assert out.dtype == torch.float32
        assert (out_mask.dtype, box.dtype) == (torch.int64, torch.int64)
        y0, y1, x0, x1 = box.tolist()
        assert 0 <= y0 < y1 <= 96
        assert 0 <= x0 < x1 <= 96
        inside = torch.zeros(96, 96, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        assert (out[:, ~inside] == 0).all()
        assert (out[:, inside] != 0).all()
        assert (out_mask[inside] == 3).all()
        assert (out_mask[~inside] == 255).all()


def test_long_side_is_uniform_over_the_whole_range():
    image = photo(20, 40)
    sides = []
    for seed in range(400):
        _, _, box = train_transform(image, None, rng(seed), crop=64, resize_long=(30, 33), **USUAL)
        y0, y1, x0, x1 = box.tolist()
        assert x1 - x0 == round((y1 - y0) / 2)
        sides.append(y1 - y0)
    counts = np.bincount(sides, minlength=34)[30:]
    assert counts.sum() == 400
    assert counts.min() >= 70  # 100 expected, standard deviation 8.7


def test_smaller_images_lie_anywhere_in_the_crop():
    boxes = {
        tuple(train_transform(photo(6, 8), None, rng(seed), crop=10, resize_long=(8, 8), **USUAL)[2]
              .tolist())
        for seed in range(400)
    }  # fmt: skip
    assert boxes == {(y, y + 8, x, x + 6) for y in range(3) for x in range(5)}


def test_larger_images_are_cut_anywhere():
    rows, columns = np.mgrid[:8, :10]
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], 2).astype(np.uint8) * 9)
    corners = set()
    for seed in range(400):
        out, _, box = train_transform(
            image, None, rng(seed), crop=6, resize_long=(10, 10), **STILL, **PLAIN
        )
        assert box.tolist() == [0, 6, 0, 6]
        corner = out[:2, 0, 0] / 9
        corners.add(tuple(corner.round().int().tolist()))
        np.testing.assert_allclose(out[0, :, 0] / 9 - corner[0], np.arange(6), atol=1e-4)
    assert corners == {(y, x) for y in range(3) for x in range(5)}


@pytest.mark.parametrize(("long_side", "size"), [(50, (90, 61)), (130, (64, 97)), (33, (33, 33))])
def test_resize_is_pillows_bicubic(long_side, size):
    image = photo(*size)
    out, _, box = train_transform(
        image, None, rng(), crop=130, resize_long=(long_side, long_side), **STILL, **PLAIN
    )
    y0, y1, x0, x1 = box.tolist()
    expected = np.asarray(image.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC), np.float32)
    assert max(x1 - x0, y1 - y0) == long_side
    np.testing.assert_allclose(out[:, y0:y1, x0:x1].permute(1, 2, 0), expected, atol=1.01)


def test_flip_mirrors_image_and_mask():
    image = photo(40, 30)
    mask = np.random.default_rng(1).integers(0, 3, (30, 40)).astype(np.uint8)
    size = {"crop": 40, "resize_long": (40, 40), "jitter": (0.0,) * 4, **PLAIN}
    plain, plain_mask, box = train_transform(image, mask, rng(3), flip=0.0, **size)
    flipped, flipped_mask, _ = train_transform(image, mask, rng(3), flip=1.0, **size)
    assert torch.equal(flipped, plain.flip(-1))
    assert torch.equal(flipped_mask, plain_mask.flip(-1))
    y0, y1, _, _ = box.tolist()
    np.testing.assert_array_equal(plain_mask[y0:y1], mask)
    square = photo(40, 40)
    kept, _, _ = train_transform(square, None, rng(), flip=0.0, **size)
    halves = [
        torch.equal(train_transform(square, None, rng(seed), flip=0.5, **size)[0], kept)
        for seed in range(200)
    ]
    assert 70 <= sum(halves) <= 130


def test_mask_follows_the_image():
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (3, 4)), np.ones((20, 20))).astype(
        np.uint8
    )
    image = Image.fromarray(np.repeat(mask[..., None] * 200, 3, 2))
    for seed in range(20):
        out, out_mask, box = train_transform(
            image, mask, rng(seed), crop=64, resize_long=(50, 120), jitter=(0.0,) * 4, **PLAIN
        )
        y0, y1, x0, x1 = box.tolist()
        inside = out_mask[y0:y1, x0:x1]
        assert set(inside.unique().tolist()) <= {0, 1}
        assert ((out[0, y0:y1, x0:x1] > 100) == inside.bool()).float().mean() > 0.97


@pytest.mark.parametrize(
    ("k", "adjust"),
    [
        (0, tv.adjust_brightness),
        (1, tv.adjust_contrast),
        (2, tv.adjust_saturation),
        (3, tv.adjust_hue),
    ],
)
def test_each_jitter_is_torchvisions_within_its_range(k, adjust):
    image = photo(24, 24)
    strength = (0.3, 0.3, 0.3, 0.1)[k]
    jitter = tuple(strength if i == k else 0.0 for i in range(4))
    grid = np.linspace(-strength, strength, 241) + (k < 3)
    candidates = np.stack([np.asarray(adjust(image, float(f)), np.float32) for f in grid])
    found = []
    for seed in range(60):
        out, _, _ = train_transform(
            image, None, rng(seed), crop=24, resize_long=(24, 24), flip=0, jitter=jitter, **PLAIN
        )
        error = np.abs(candidates - out.permute(1, 2, 0).numpy()).mean((1, 2, 3))
        assert error.min() < 0.6
        found.append(grid[error.argmin()] - (k < 3))
    assert min(found) < -0.8 * strength
    assert max(found) > 0.8 * strength
    assert abs(np.mean(found)) < 0.3 * strength


def test_contrast_is_about_the_mean_of_the_whole_image():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = 200
    black_crops = []
    for seed in range(60):
        out, _, _ = train_transform(
            Image.fromarray(pixels), None, rng(seed), crop=8, resize_long=(40, 40), flip=0,
            jitter=(0.0, 0.3, 0.0, 0.0), **PLAIN,
        )  # fmt: skip
        if out.max() < 50:
            black_crops.append(float(out.max()))
    assert len(black_crops) > 10
    assert max(black_crops) > 10  # cropping first would leave them 0
    assert max(black_crops) <= 30


def test_jitters_come_in_random_order():
    options = {"crop": 16, "resize_long": (16, 16), "flip": 0, "jitter": (0.3, 0.3, 0.3, 0.1)}
    orders = {draw(rng(seed), (16, 16), **options).order for seed in range(100)}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(orders) > 20  # of 24
    options["jitter"] = (0.3, 0.0, 0.3, 0.0)
    assert {draw(rng(seed), (16, 16), **options).order for seed in range(30)} == {(0, 2), (2, 0)}


def plainly(image, mask, seed, *, crop, resize_long, flip, jitter, mean, std):
    """The chain on whole images, every step torchvision's or Pillow's own."""
    drawn = draw(
        rng(seed), image.size[::-1], crop=crop, resize_long=resize_long, flip=flip, jitter=jitter
    )
    pixels = tv.resize(
        tv.pil_to_tensor(image), list(drawn.size), tv.InterpolationMode.BICUBIC, antialias=True
    )
    image = tv.to_pil_image(pixels)
    mask = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
    if drawn.flip:
        image, mask = tv.horizontal_flip(image), tv.horizontal_flip(mask)
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for k in drawn.order:
        image = steps[k](image, drawn.factors[k])
    out, out_mask = torch.zeros(3, crop, crop), torch.full((crop, crop), 255)
    (y, top, height), (x, left, width) = drawn.place
    box = (left, top, left + width, top + height)
    rows, columns = slice(y, y + height), slice(x, x + width)
    out[:, rows, columns] = normalize(image.crop(box), mean, std)
    out_mask[rows, columns] = torch.from_numpy(np.array(mask.crop(box))).long()
    return out, out_mask, torch.tensor([y, y + height, x, x + width])


@pytest.mark.parametrize("size", [(60, 40), (33, 90), (1, 1), (7, 200), (64, 64)])
@pytest.mark.parametrize("jitter", [(0.3, 0.3, 0.3, 0.1), (0.0,) * 4, (0.5, 0.0, 1.2, 0.5)])
def test_what_is_cropped_early_is_what_would_be_cropped_late(size, jitter):
    image = photo(*size, seed=sum(size))
    mask = np.random.default_rng(1).integers(0, 5, size[::-1]).astype(np.uint8)
    options = {"crop": 48, "resize_long": (30, 90), "flip": 0.5, "jitter": jitter, **USUAL}
    for seed in range(8):
        got = train_transform(image, mask, rng(seed), **options)
        for a, b in zip(got, plainly(image, mask, seed, **options), strict=True):
            assert torch.equal(a, b)


def test_the_generator_is_the_only_source_of_randomness():
    image, size = photo(50, 40), {"crop": 32, "resize_long": (30, 60), **USUAL}
    state = torch.get_rng_state()
    first, again, other = (train_transform(image, None, rng(s), **size)[0] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with_mask = train_transform(image, np.zeros((40, 50), np.uint8), rng(1), **size)[0]
    assert torch.equal(first, with_mask)


def test_mask_of_another_size():
    with pytest.raises(InputError, match=r"mask must be \[4, 6\] like its image, got \[6, 4\]"):
        train_transform(
            photo(6, 4), np.zeros((6, 4), np.uint8), rng(), crop=8, resize_long=(8, 8), **USUAL
        )


def test_missing_torchvision(monkeypatch):
    augment.torchvision_functional.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(MissingExtraError, match=r"torchvision.*\.\[train\]"):
        train_transform(photo(6, 4), None, rng(), crop=8, resize_long=(8, 8), **USUAL)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 48)])
def test_second_view_keeps_corners(size):
    image = torch.randn(2, 3, *size, generator=rng(), dtype=torch.float64)
    view = second_view(image, 16)
    assert view.shape == (2, 3, 16, 16)
    torch.testing.assert_close(view[..., 0, 0], image[..., 0, 0])
    torch.testing.assert_close(view[..., -1, 0], image[..., -1 if size != (1, 1) else 0, 0])
    assert torch.equal(second_view(image, 16, flip=True), view.flip(-1))
    same = second_view(image[..., :5, :5], min(5, *size))
    torch.testing.assert_close(same, image[..., :5, :5])


def test_scale_is_uniform_over_its_range():
    image = photo(40, 20)
    heights = []
    for seed in range(300):
        _, _, box = train_transform(
            image, None, rng(seed), crop=64, resize_long=(1, 1), resize_scale=(0.5, 1.5), **USUAL
        )
        y0, y1, x0, x1 = box.tolist()
        assert abs((x1 - x0) - 2 * (y1 - y0)) <= 1
        heights.append(y1 - y0)
    assert (min(heights), max(heights)) == (10, 30)
    assert abs(np.mean(heights) - 20) < 1.2  # standard error 0.34
    thirds = np.histogram(heights, bins=(10, 16.5, 23.5, 31))[0]
    assert thirds.min() >= 70


def test_hsv_shifts_are_drawn_after_all_else():
    sizes = {"crop": 64, "resize_long": (60, 90), "flip": 0.5, "jitter": (0.3, 0.3, 0.3, 0.1)}
    still = [draw(rng(seed), (40, 50), **sizes) for seed in range(200)]
    shifted = [draw(rng(seed), (40, 50), **sizes, hsv=(10, 3, 1)) for seed in range(200)]
    for before, after in zip(still, shifted, strict=True):
        assert before.hsv == (0, 0, 0)
        assert (before.size, before.place, before.factors) == (
            after.size,
            after.place,
            after.factors,
        )
    for k, most in enumerate((10, 3, 1)):
        assert {drawn.hsv[k] for drawn in shifted} == set(range(-most, most + 1))


def test_hsv_shift_reaches_the_image_and_not_the_mask():
    image, mask = photo(40, 30), np.full((30, 40), 2, np.uint8)
    sizes = {"crop": 40, "resize_long": (40, 40), **STILL, **PLAIN}
    plain, same_mask, _ = train_transform(image, mask, rng(3), **sizes)
    shifted, shifted_mask, box = train_transform(image, mask, rng(3), **sizes, hsv=(10, 10, 10))
    assert torch.equal(same_mask, shifted_mask)
    change = (plain - shifted).abs()
    y0, y1, x0, x1 = box.tolist()
    assert change[:, y0:y1, x0:x1].mean() > 1
    change[:, y0:y1, x0:x1] = 0
    assert change.max() == 0
