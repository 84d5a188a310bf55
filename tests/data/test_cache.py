"""Decoded images on disk: the same batches, one build, damage found."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch

from tests.data.files import bad_files, odd_files, photo, write_folder
from wsis.data import open_dataset
from wsis.data.cache import CachedDataset
from wsis.data.loader import make_loader
from wsis.data.subset import Subset
from wsis.errors import InputError

USUAL = {
    "batch_size": 4,
    "crop": 40,
    "resize_long": (30, 60),
    "flip": 0.5,
    "jitter": (0.3, 0.3, 0.3, 0.1),
    "seed": 7,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}


@pytest.fixture
def photos(tmp_path):
    files = {f"{k}.jpg": photo(30 + k, 50 - 2 * k, seed=k) for k in range(6)}
    return write_folder(tmp_path / "data", files)


def cached(dataset, folder, limit_gb=1.0):
    return CachedDataset(dataset, folder, limit_gb=limit_gb, progress=False)


def refuse(self, i):
    raise AssertionError("an image file was decoded")


@pytest.mark.parametrize("kind", ["torch", "dali"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_without_a_cache(tmp_path, kind, workers):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    data = write_folder(tmp_path / "data", odd_files())
    plain = make_loader(kind, data, **USUAL).epoch(1)
    stored = make_loader(kind, cached(data, tmp_path / "c"), workers=workers, **USUAL).epoch(1)
    for a, b in zip(plain, stored, strict=True):
        for name in ("image", "label", "valid_box", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_cache_is_decoded_once(photos, tmp_path, monkeypatch):
    first = cached(photos, tmp_path / "c")
    assert (first.ids, first.fingerprint()) == (photos.ids, photos.fingerprint())
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".json", ".lock", ".rgb"]
    assert first.file.stat().st_size == sum(3 * w * h for h, w in map(photos.image_size, range(6)))
    expected = [np.array(photos.image(i)) for i in range(6)]
    monkeypatch.setattr(type(photos), "image", refuse)
    for data in (first, cached(photos, tmp_path / "c"), Subset(first, range(6))):
        for i, pixels in enumerate(expected):
            np.testing.assert_array_equal(data.pixels(i), pixels)
            np.testing.assert_array_equal(np.asarray(data.image(i)), pixels)
            assert data.image_size(i) == pixels.shape[:2]
    first.pixels(0)[:] = 0  # a copy
    np.testing.assert_array_equal(first.pixels(0), expected[0])


def test_a_changed_image_or_list_has_another_file(photos, tmp_path):
    files = {
        cached(photos, tmp_path / "c").file,
        cached(Subset(photos, [1, 0]), tmp_path / "c").file,
    }
    os.utime(photos.image_path(3), ns=(1, 1))
    files.add(cached(photos, tmp_path / "c").file)
    photo(9, 9).save(photos.image_path(3))
    changed = cached(photos, tmp_path / "c")
    assert len(files | {changed.file}) == 4
    assert changed.pixels(3).shape == (9, 9, 3)


def test_a_changed_byte_is_found_and_named(photos, tmp_path):
    file = cached(photos, tmp_path).file
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    data = cached(photos, tmp_path)
    data.pixels(0)
    with pytest.raises(InputError, match=rf"{file}: image '5' is damaged .*delete"):
        data.pixels(5)
    with pytest.raises(InputError, match="image '5' is damaged"):
        list(make_loader("torch", data, workers=1, **USUAL | {"batch_size": 1}).epoch(0))


@pytest.mark.parametrize("damage", ["short", "long", "no table", "torn table", "other table"])
def test_a_file_that_is_not_whole_is_written_anew(photos, tmp_path, damage):
    file = cached(photos, tmp_path).file
    whole, table = file.read_bytes(), file.with_suffix(".json")
    if damage in ("short", "long"):
        file.write_bytes(whole[:-1] if damage == "short" else whole + b"0")
    elif damage == "no table":
        table.unlink()
    elif damage == "torn table":
        table.write_bytes(table.read_bytes()[:50])
    else:
        content = json.loads(table.read_text())
        content["starts"][2] += 3
        table.write_text(json.dumps(content))
    data = cached(photos, tmp_path)
    assert file.read_bytes() == whole
    for i in range(6):
        np.testing.assert_array_equal(data.pixels(i), np.array(photos.image(i)))


def build(dataset, folder, queue):
    decoded = []
    image = type(dataset).image
    type(dataset).image = lambda self, i: decoded.append(i) or image(self, i)
    data = cached(dataset, folder)
    queue.put((len(decoded), int(data.pixels(5).sum())))


def test_processes_that_start_together_build_it_once(photos, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=build, args=(photos, tmp_path, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    total = int(np.array(photos.image(5)).sum())
    assert found == [(0, total)] * 3 + [(6, total)]


def test_what_cannot_be_cached(photos, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"take 0\.00 GB, data\.cache_gb allows 1e-06"):
        cached(photos, tmp_path / "c", limit_gb=1e-6)
    with pytest.raises(InputError, match="draws its images"):
        cached(open_dataset("scenes", n_train=2), tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        cached(photos, tmp_path / "file")
    bad = write_folder(tmp_path / "bad", {"truncated.jpg": bad_files()["truncated.jpg"]})
    with pytest.raises(InputError, match=r"truncated\.jpg"):
        cached(bad, tmp_path / "c")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"0\.00 GB free"):
        cached(photos, tmp_path / "c")
    assert {p.suffix for p in (tmp_path / "c").iterdir()} == {".lock"}  # no half-written file


def test_a_full_disk_leaves_nothing(photos, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        cached(photos, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir() if p.is_file()} == {".lock"}
