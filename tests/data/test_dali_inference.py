"""Views by DALI on the CPU, held against Pillow's; skipped where DALI is not there."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

if "dali" not in os.environ.get("WSIS_REQUIRE", "").split(","):
    pytest.importorskip("nvidia.dali")

from tests.data.files import bad_files, odd_files, photo, write_folder
from wsis.data.inference import Scaling, pick_reader, read_views
from wsis.errors import InputError, MissingExtraError

PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # they stay 0..255
SCALES = (0.5, 1.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs and PNGs: wide, tall, odd, one pixel."""
    sizes = [(90, 61), (60, 91), (33, 40), (120, 17), (64, 64), (300, 201), (1, 1)]
    files: dict[str, Image.Image | bytes] = {}
    for k, size in enumerate(sizes):
        files[f"{k}.jpg"] = photo(*size, seed=k)
        files[f"{k}p.png"] = photo(*size, seed=50 + k)
    return write_folder(tmp_path_factory.mktemp("photos"), files, quality=92)


def both(data, scaling, **options):
    """What the two readers make of a data set, images and order compared."""
    indices = range(len(data))
    ours = read_views(data, indices, scaling, reader="dali", beside=data.mask, **options)
    theirs = read_views(data, indices, scaling, workers=0, beside=data.mask)
    count = 0
    for (i, shown, mask), (k, expected, truth) in zip(ours, theirs, strict=True):
        assert i == k == count
        assert np.array_equal(mask, truth)  # class ids, not a palette's colours
        assert np.array_equal(np.asarray(shown.image), np.asarray(expected.image))
        assert [view.shape for view in shown.views] == [view.shape for view in expected.views]
        assert all(view.dtype == torch.float32 for view in shown.views)
        yield shown.views, expected.views
        count += 1


def levels(pairs) -> torch.Tensor:
    return torch.cat([(a - b).abs().flatten() for x, y in pairs for a, b in zip(x, y, strict=True)])


@pytest.mark.parametrize("base_long", [None, 56, 200])
def test_views_agree_within_a_level(photos, base_long):
    errors = levels(both(photos, Scaling(SCALES, **PIXELS, base_long=base_long)))
    assert (errors > 1.01).double().mean() < 2e-5
    assert errors.max() < 2.01
    assert (errors > 0.01).double().mean() < 0.02


def test_photographs_agree_within_a_level(shared_data):
    from wsis.data import open_dataset

    data = open_dataset("voc", shared_data / "voc-animals", "val")
    scaling = Scaling(SCALES, **PIXELS)
    ours = read_views(data, range(3), scaling, reader="dali", workers=1)
    theirs = read_views(data, range(3), scaling, workers=0)
    pairs = [(a[1].views, b[1].views) for a, b in zip(ours, theirs, strict=True)]
    errors = levels(pairs)
    assert errors.max() < 2.01
    assert (errors > 1.01).double().mean() < 1e-5


def test_the_size_as_stored_is_exact(photos):
    for ours, theirs in both(photos, Scaling((1.0,), **PIXELS)):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-4)


def test_normalised_with_the_backbones_numbers(photos):
    scaling = Scaling((1.0, 0.5), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert levels(both(photos, scaling, workers=3)).max() < 2.01 / 255 / 0.224


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(photos, workers):
    straight = list(both(photos, Scaling((0.5, 1.0), **PIXELS), workers=2))
    again = list(both(photos, Scaling((0.5, 1.0), **PIXELS), workers=workers))
    for (a, _), (b, _) in zip(straight, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_odd_files_are_read_as_pillow_reads_them(tmp_path):
    data = write_folder(tmp_path / "data", odd_files())
    scaling = Scaling((0.5, 1.0), **PIXELS)
    names = []
    ours = read_views(data, range(len(data)), scaling, reader="dali")
    theirs = read_views(data, range(len(data)), scaling)
    for (i, shown, _), (_, expected, _) in zip(ours, theirs, strict=True):
        names.append(data.ids[i])
        assert levels([(shown.views, expected.views)]).max() < 2.01, names[-1]
    assert names == list(data.ids)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["truncated.jpg", "html.jpg", "filter.png", "bomb.png"])
def test_a_bad_file_stops_with_its_name(tmp_path, name, workers):
    files: dict[str, Image.Image | bytes] = {f"{k}.png": photo(50, 40, seed=k) for k in range(5)}
    files[name] = bad_files()[name]
    data = write_folder(tmp_path / "data", files)
    bad = data.ids.index(name.rsplit(".")[0])
    order = [0, 1, 2, bad, 3, 4]
    for reader in ("torch", "dali"):
        good = []
        with pytest.raises(InputError) as caught:
            good.extend(
                read_views(data, order, Scaling((1.0,), **PIXELS), reader=reader, workers=workers)
            )
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert [i for i, _, _ in good] == order[:3]
    assert not any(thread.name.startswith("wsis") for thread in threading.enumerate())


def test_what_only_dali_refuses_is_read_by_pillow(photos, monkeypatch):
    from wsis.data import dali_inference

    encoded = dali_inference.encoded

    def broken(dataset, i):
        file, size = encoded(dataset, i)
        return (file[:30], size) if dataset.ids[i] == "2" else (file, size)

    monkeypatch.setattr(dali_inference, "encoded", broken)
    with pytest.warns(UserWarning, match="DALI failed on .*2"):
        errors = levels(both(photos, Scaling((1.0,), **PIXELS)))
    assert errors.max() < 0.01


def test_left_early_nothing_stays(photos):
    scaling = Scaling((1.0,), **PIXELS)
    for count in (0, 1, 3):
        reading = read_views(photos, range(len(photos)), scaling, reader="dali")
        with closing(reading):
            for _ in range(count):
                next(reading)
        assert not any(thread.name.startswith("wsis") for thread in threading.enumerate())


def test_which_reader(photos, monkeypatch):
    from wsis.data import open_dataset

    scenes = open_dataset("scenes", n_train=2, size=32)
    assert pick_reader("auto", photos, "cuda:0") == "dali"
    assert pick_reader("auto", photos, "cpu") == "torch"
    assert pick_reader("auto", scenes, "cuda:0") == "torch"
    assert pick_reader("dali", scenes, "cpu") == "dali"
    with pytest.raises(InputError, match="unknown loader 'dalli'"):
        pick_reader("dalli", photos, "cpu")
    for module in ("wsis.data.dali_inference", "wsis.data.dali", "wsis.data.dali_graph"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr("wsis.data.dali_inference", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert pick_reader("auto", photos, "cuda:0") == "torch"
    with pytest.raises(MissingExtraError, match=r"nvidia-dali.*\.\[dali-cu13\]"):
        pick_reader("dali", photos, "cpu")
