"""The DALI loader on the CPU, held against the torch loader.

Without DALI these tests are skipped, but not where WSIS_REQUIRE names it: there they fail.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

if "dali" not in os.environ.get("WSIS_REQUIRE", "").split(","):
    pytest.importorskip("nvidia.dali")

from nvidia.dali import backend

from tests.data.files import as_bytes, photo, write_folder
from wsis.data import TrainLoader, open_dataset
from wsis.data.dali import DaliLoader, encoded
from wsis.data.loader import make_loader
from wsis.errors import InputError, MissingExtraError

PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # they stay 0..255
STILL = (0.0, 0.0, 0.0, 0.0)
USUAL = {
    "batch_size": 4,
    "crop": 56,
    "resize_long": (40, 90),
    "flip": 0.5,
    "jitter": (0.3, 0.3, 0.3, 0.1),
    "seed": 7,
    **PIXELS,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs and PNGs larger and smaller than the crop, wide, tall, and one pixel."""
    sizes = [(90, 60), (60, 91), (33, 40), (120, 17), (64, 64), (300, 200), (1, 1), (56, 56)]
    files = {}
    for k, size in enumerate(sizes):
        files[f"{k}.jpg"] = photo(*size, seed=k)
        files[f"{k}p.png"] = photo(*size, seed=50 + k)
    files["grey.jpg"] = photo(70, 50).convert("L")
    files["grey2.png"] = photo(70, 50).convert("L")
    files["again.jpg"] = photo(80, 44, seed=5)
    files["odd.jpg"] = photo(57, 133, seed=6)
    return write_folder(tmp_path_factory.mktemp("photos"), files)


def both(dataset, epoch=0, **options):
    """Pairs of batches of the two loaders, all but the images compared."""
    torch_loader = TrainLoader(dataset, **USUAL | options)
    dali_loader = DaliLoader(dataset, **USUAL | options)
    for a, b in zip(torch_loader.epoch(epoch), dali_loader.epoch(epoch), strict=True):
        for name in ("label", "valid_box", "index"):
            left, right = getattr(a, name), getattr(b, name)
            assert left.dtype == right.dtype and torch.equal(left, right), name
        assert (a.mask is None) == (b.mask is None)
        assert a.mask is None or torch.equal(a.mask, b.mask)
        assert (a.image.shape, a.image.dtype) == (b.image.shape, b.image.dtype)
        padding = torch.ones_like(a.image, dtype=torch.bool)
        for k, (y0, y1, x0, x1) in enumerate(a.valid_box.tolist()):
            padding[k, :, y0:y1, x0:x1] = False
        assert (b.image[padding] == 0).all()
        yield a, b


def levels(pairs) -> torch.Tensor:
    """Differences of all pixels, in levels of 255."""
    return torch.cat([(a.image - b.image).abs().flatten() for a, b in pairs])


def assert_equal(left, right) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in ("image", "label", "valid_box", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("resize", [(40, 90), (16, 30), (200, 240)])
def test_without_jitter_pixels_agree_within_a_level(photos, resize):
    errors = [levels(both(photos, k, jitter=STILL, resize_long=resize)) for k in range(3)]
    errors = torch.cat(errors)
    assert (errors > 1.01).double().mean() < 2e-5
    assert errors.max() < 2.01


def test_a_photograph_agrees_within_a_level(tmp_path):
    files = {f"{k}.jpg": photo(375, 281, seed=k) for k in range(4)}
    data = write_folder(tmp_path / "data", files, quality=92)
    options = {"jitter": STILL, "crop": 448, "resize_long": (448, 768)}
    errors = levels(both(data, **options))
    assert (errors > 1.01).double().mean() < 1e-5
    assert errors.max() < 2.01


@pytest.mark.parametrize("jitter", [(0.4, 0, 0, 0), (0, 0.4, 0, 0), (0, 0, 0.4, 0), (0, 0, 0, 0.4)])
def test_one_adjustment_at_a_time(photos, jitter):
    # Without resizing nothing but the adjustment can differ; the images of 56 pixels have none.
    options = {"jitter": jitter, "resize_long": (56, 56)}
    still = [b.image[k] for _, b in both(photos, **options | {"jitter": STILL}) for k in range(4)]
    found = 0
    for a, b in both(photos, **options):
        for k, i in enumerate(b.index.tolist()):
            error = (a.image[k] - b.image[k]).abs()
            assert (error > 2.01).double().mean() < 5e-3 and error.mean() < 0.05
            if max(photos.image_size(i)) == 56:
                found += 1
                # A hue that lies on a step of 1/256 turn may fall to either side of it.
                assert error.max() < (8 if jitter[3] else 1.01)
                assert (error > 0.01).double().mean() < 0.01
    assert found == 2
    moved = [b.image[k] for _, b in both(photos, **options) for k in range(4)]
    assert sum(not torch.equal(x, y) for x, y in zip(still, moved, strict=True)) > 10


@pytest.mark.parametrize("jitter", [(0.3, 0.3, 0.3, 0.1), (0.2, 0.0, 1.2, 0.5)])
def test_with_jitter_pixels_nearly_agree(photos, jitter):
    errors = levels(pair for k in range(3) for pair in both(photos, k, jitter=jitter))
    assert (errors > 1.01).double().mean() < 0.02
    assert errors.double().mean() < 0.1


def test_masks_are_the_torch_loaders(photos):
    for a, _ in both(photos, masks=True):
        assert set(a.mask.unique().tolist()) == {0, 1, 255}


def test_generated_images_go_through():
    scenes = open_dataset("scenes", n_train=8, size=64)
    assert levels(both(scenes, jitter=STILL, masks=True)).max() < 2.01


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_change_nothing(photos, workers):
    straight = list(DaliLoader(photos, **USUAL).epoch(3))
    assert_equal(straight, list(DaliLoader(photos, workers=workers, **USUAL).epoch(3)))


def test_a_resumed_epoch_is_the_tail_of_the_straight_one(photos):
    loader = DaliLoader(photos, **USUAL)
    straight = list(loader.epoch(2))
    assert_equal(straight[3:], list(loader.epoch(2, 3)))
    assert_equal(straight[1:], list(DaliLoader(photos, workers=2, **USUAL).epoch(2, 1)))
    assert list(loader.epoch(2, 5)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_leaves_nothing_behind(photos, workers):
    loader = DaliLoader(photos, workers=workers, **USUAL)
    straight = list(loader.epoch(1))
    for count in (1, 2, 5):
        abandoned = loader.epoch(0)
        for _ in range(count):
            next(abandoned)
        abandoned.close()
        assert_equal(straight, list(loader.epoch(1)))


def test_ranks_share_each_global_batch(photos):
    whole = list(DaliLoader(photos, **USUAL).epoch(1))
    parts = [list(DaliLoader(photos, rank=r, world_size=2, **USUAL).epoch(1)) for r in (0, 1)]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([half.index for half in halves]), batch.index)
        assert torch.equal(torch.cat([half.image for half in halves]), batch.image)


def test_a_batch_stays_when_the_next_ones_come(photos):
    batches = list(DaliLoader(photos, **USUAL).epoch(0))
    copies = [b.image.clone() for b in DaliLoader(photos, **USUAL).epoch(0)]
    assert all(torch.equal(b.image, copy) for b, copy in zip(batches, copies, strict=True))


# -- damaged files: kinds and outcomes are in test_bad_files.py ------------------------------------


@pytest.mark.parametrize("count", [10, pytest.param(400, marks=pytest.mark.long)])
def test_damaged_files_never_end_without_a_name(tmp_path, count):
    """DALI decodes some damage that Pillow refuses; what it refuses itself has a name."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(as_bytes(photo(90, 70), "JPEG"), np.uint8)
    files: dict[str, Image.Image | bytes] = {}
    for k in range(count):
        damaged = whole.copy()
        places = rng.integers(2, len(whole), 1 + k % 9)
        damaged[places] = rng.integers(0, 256, len(places))
        files[f"{k}.jpg"] = damaged.tobytes()
    data = write_folder(tmp_path / "data", files)
    loader = DaliLoader(data, **USUAL | {"batch_size": 1})
    outcomes = []
    for step in range(count):
        try:
            outcomes.append(bool(torch.isfinite(next(loader.epoch(0, step)).image).all()))
        except InputError as error:
            file = f"{loader._order(0, step)[0][0]}.jpg"
            outcomes.append("named" if file in str(error) else str(error))
    assert set(outcomes) == {True, "named"}


def test_a_file_that_only_dali_refuses_is_read_by_pillow(photos, monkeypatch):
    def broken(dataset, i):
        file, size = encoded(dataset, i)
        return (file[:30], size) if dataset.ids[i] == "again" else (file, size)

    expected = list(DaliLoader(photos, **USUAL).epoch(0))
    monkeypatch.setattr("wsis.data.dali.encoded", broken)
    loader = DaliLoader(photos, **USUAL)
    assert_equal(expected, list(loader.epoch(0)))
    assert [photos.ids[i] for i in loader._by_pillow] == ["again"]


def test_a_missing_mask_is_named(tmp_path):
    data = write_folder(tmp_path / "data", {f"{k}.png": photo(30, 30) for k in range(4)})
    (tmp_path / "data" / "masks" / "2.png").unlink()
    with pytest.raises(InputError, match=r"no mask '2\.png'"):
        list(DaliLoader(data, masks=True, **USUAL).epoch(0))


# -- which loader --------------------------------------------------------------------------------


def test_auto_takes_dali_where_a_gpu_trains_on_files(photos):
    scenes = open_dataset("scenes", n_train=4, size=32)
    assert make_loader("auto", photos, device="cuda:0", **USUAL).kind == "dali"
    assert make_loader("auto", photos, device="cpu", **USUAL).kind == "torch"
    assert make_loader("auto", scenes, device="cuda:0", **USUAL).kind == "torch"
    assert make_loader("torch", photos, device="cuda:0", **USUAL).kind == "torch"
    assert make_loader("dali", scenes, **USUAL).kind == "dali"
    with pytest.raises(InputError, match="unknown loader 'dalli', expected one of auto, torch"):
        make_loader("dalli", photos, **USUAL)


def test_dali_that_is_not_installed(photos, monkeypatch):
    for module in ("wsis.data.dali", "wsis.data.dali_graph"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert make_loader("auto", photos, device="cuda:0", **USUAL).kind == "torch"
    with pytest.raises(MissingExtraError, match=r"nvidia-dali.*\.\[dali-cu13\]"):
        make_loader("dali", photos, **USUAL)


# -- distribution --------------------------------------------------------------------------------


def statistics(loader_class, dataset, count: int, seed: int) -> np.ndarray:
    """`[count, 9]`: what differs between crops, from colours to places."""
    options = {"crop": 16, "resize_long": (12, 24), "batch_size": 20, "seed": seed}
    loader = loader_class(dataset, **USUAL | options)
    rows: list[torch.Tensor] = []
    for epoch in range(count // len(dataset)):
        for batch in loader.epoch(epoch):
            x, box = batch.image.double(), batch.valid_box.double()
            area = ((box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]))[:, None]
            mean = x.sum((2, 3)) / area
            spread = (x.square().sum((2, 3)) / area - mean.square()).clamp(min=0).sqrt()
            lean = x[..., :8].sum((1, 2, 3)) - x[..., 8:].sum((1, 2, 3))
            rows.append(torch.cat([mean, spread, lean[:, None], area, box[:, :1]], 1))
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("count", [2000, pytest.param(20000, marks=pytest.mark.long)])
def test_crops_are_of_one_distribution(tmp_path, count):
    from scipy.stats import ks_2samp

    files = {f"{k:02}.png": photo(24 + k, 40 - k // 2, seed=k) for k in range(20)}
    data = write_folder(tmp_path / "data", files)
    ours = statistics(DaliLoader, data, count, seed=1)
    theirs = statistics(TrainLoader, data, count, seed=2)
    assert len(ours) == len(theirs) == count
    for column in range(ours.shape[1]):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, column
    brighter = ours[:, 0] * 1.05  # which the test must see
    assert ks_2samp(brighter, theirs[:, 0]).pvalue < 1e-3


def test_this_ran_with_dali():
    assert backend.__name__.startswith("nvidia.dali")
