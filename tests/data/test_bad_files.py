"""Odd and bad image files: one declared outcome each, in every loader, always with the name."""

from __future__ import annotations

import json

import pytest
import torch

from tests.data.files import as_bytes, bad_files, odd_files, photo, write_folder
from wsis.data.loader import make_loader
from wsis.data.scan import scan
from wsis.data.subset import Subset
from wsis.data.unreadable import unreadable
from wsis.engine.quarantine import FILE, about, quarantine, without_quarantined
from wsis.errors import InputError

USUAL = {
    "batch_size": 2,
    "crop": 56,
    "resize_long": (40, 90),
    "flip": 0.5,
    "jitter": (0.0, 0.0, 0.0, 0.0),
    "seed": 7,
    "mean": (0.0, 0.0, 0.0),
    "std": (1 / 255, 1 / 255, 1 / 255),  # pixels stay 0..255
}
ODD, BAD = odd_files(), bad_files()


@pytest.fixture(params=["torch", "dali"])
def make(request):
    """A loader of each kind; DALI where it is installed."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return lambda data, **options: make_loader(request.param, data, **USUAL | options)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """All kinds in one data set, good and bad by turns."""
    names = [name for pair in zip(ODD, BAD, strict=False) for name in pair]
    names += [name for name in (*ODD, *BAD) if name not in names]
    return write_folder(
        tmp_path_factory.mktemp("mixed") / "data", {n: (ODD | BAD)[n] for n in names}
    )


def stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def test_there_are_enough_kinds():
    assert (len(ODD), len(BAD)) == (31, 30)


def test_odd_files_are_read_alike(tmp_path):
    pytest.importorskip("nvidia.dali")
    data = write_folder(tmp_path / "data", ODD)
    batches = [
        next(make_loader(kind, data, **USUAL | {"batch_size": len(data)}).epoch(0))
        for kind in ("torch", "dali")
    ]
    errors = (batches[0].image - batches[1].image).abs().amax((1, 2, 3))
    for i, error in zip(batches[0].index.tolist(), errors.tolist(), strict=True):
        assert error < 2.01, data.ids[i]


def test_each_bad_file_ends_its_batch_with_its_name(mixed, make):
    loader = make(mixed, batch_size=1)
    for step, (i,) in enumerate(loader._order(0, 0)):
        if mixed.ids[i] in set(map(stem, ODD)):
            assert next(loader.epoch(0, step)).index.tolist() == [i]
            continue
        with pytest.raises(InputError) as caught:
            next(loader.epoch(0, step))
        assert str(mixed.image_path(i)) in str(caught.value) and "\n" not in str(caught.value)


def test_the_scans_find_just_the_bad_ones(mixed):
    expected = {i for i, name in enumerate(mixed.ids) if name in set(map(stem, BAD))}
    for threads in (1, 3):
        found = unreadable(mixed, threads=threads)
        assert list(found) == sorted(expected)
        assert all(str(mixed.image_path(i)) in why for i, why in found.items())
    assert {p.image for p in scan(mixed, masks=False) if p.fatal} == {mixed.ids[i] for i in found}
    assert list(unreadable(mixed, positions=range(1, 20, 3))) == [
        i for i in range(1, 20, 3) if i in expected
    ]


SOME = [("truncated.jpg", 0), ("truncated.jpg", 2), ("deep.png", 2)]
REST = [(name, workers) for name in BAD for workers in (0, 2) if (name, workers) not in SOME]


@pytest.mark.parametrize(
    ("name", "workers"), [*SOME, *(pytest.param(*c, marks=pytest.mark.long) for c in REST)]
)
def test_every_batch_before_a_bad_file_comes(tmp_path, make, name, workers):
    files = {f"{k}.png": photo(50, 40, seed=k) for k in range(7)}
    data = write_folder(tmp_path / "data", files | {name: BAD[name]})
    bad = data.ids.index(stem(name))
    loader = make(data, workers=workers)
    before = [bad in batch for batch in loader._order(0, 0)].index(True)
    good = []
    with pytest.raises(InputError) as caught:
        good.extend(loader.epoch(0))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert len(good) == before
    assert len(list(loader.epoch(0, before + 1))) == 3 - before


def test_an_epoch_abandoned_before_a_bad_file_ends_quietly(tmp_path, make):
    files = {f"{k}.png": photo(50, 40, seed=k) for k in range(3)}
    data = write_folder(tmp_path / "data", files | {"truncated.jpg": BAD["truncated.jpg"]})
    seed = next(s for s in range(99) if make(data, batch_size=1, seed=s)._order(0, 0)[1] == [3])
    loader = make(data, batch_size=1, seed=seed)
    abandoned = loader.epoch(0)
    next(abandoned)
    abandoned.close()
    assert len(list(loader.epoch(0, 2))) == 2


# -- quarantine ----------------------------------------------------------------------------------


def test_both_loaders_run_through_what_is_left(mixed, make, tmp_path, capsys):
    left = quarantine(mixed, tmp_path, masks=False, threads=2, resume=False)
    said = capsys.readouterr().out
    assert f"left out 30 of 61 training images: {tmp_path / FILE}" in said
    assert said.count("\n  /") == 10 and "and 20 more" in said
    assert set(left.ids) == set(map(stem, ODD))
    loader = make(left, batch_size=1)
    seen = [int(batch.index) for batch in loader.epoch(0)]
    assert sorted(seen) == list(range(31))

    listed = about(tmp_path)
    assert (listed["images"], listed["left_out"], len(listed["bad"])) == (61, 30, 30)
    for bad in listed["bad"]:
        assert bad["file"] in bad["reason"] and bad["file"].rsplit("/", 1)[1] in BAD
        assert bad["image"] == stem(bad["file"].rsplit("/", 1)[1])


def test_what_is_left_is_as_if_the_bad_had_never_been_listed(mixed, make, tmp_path):
    left = quarantine(mixed, tmp_path / "run", masks=False, threads=1, resume=False)
    good = [name for name in map(str, left.ids)]
    files = {path.name: path.read_bytes() for path in map(left.image_path, range(len(left)))}
    clean = write_folder(tmp_path / "clean", files)
    assert clean.ids == tuple(good) and clean.fingerprint() == left.fingerprint()
    assert clean.fingerprint() != mixed.fingerprint()
    for a, b in zip(make(left).epoch(1), make(clean).epoch(1), strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.index, b.index)


def small(folder):
    files = {f"{k}.png": as_bytes(photo(20, 20, seed=k), "PNG") for k in range(5)}
    return write_folder(folder, files | {"bad.png": files["0.png"][:60]})


def test_a_resumed_run_keeps_its_list(tmp_path):
    data, run = small(tmp_path / "data"), tmp_path / "run"
    first = quarantine(data, run, masks=False, threads=1, resume=True)
    assert first.ids == ("0", "1", "2", "3", "4")
    kept = (run / FILE).read_bytes()
    (tmp_path / "data" / "bad.png").write_bytes((tmp_path / "data" / "0.png").read_bytes())
    (tmp_path / "data" / "3.png").write_bytes(b"")
    again = quarantine(data, run, masks=False, threads=1, resume=True)
    assert again.ids == first.ids and again.fingerprint() == first.fingerprint()
    assert without_quarantined(data, run).ids == first.ids
    assert (run / FILE).read_bytes() == kept
    with pytest.raises(InputError, match=r"3\.png"):  # gone bad since: the run ends with its name
        list(make_loader("torch", again, **USUAL | {"batch_size": 1}).epoch(0))
    anew = quarantine(data, run, masks=False, threads=1, resume=False)
    assert anew.ids == ("0", "1", "2", "4", "bad")


def test_a_list_of_another_data_set_is_not_used(tmp_path):
    data, run = small(tmp_path / "data"), tmp_path / "run"
    quarantine(data, run, masks=False, threads=1, resume=True)
    other = Subset(data, [5, 0, 1])
    assert quarantine(other, run, masks=False, threads=1, resume=True).ids == ("0", "1")
    assert json.loads((run / FILE).read_text())["images"] == 3
    assert without_quarantined(data, run) is data


def test_unreadable_masks_count_where_masks_supervise(tmp_path):
    files = {f"{k}.png": photo(20, 20, seed=k) for k in range(4)}
    data = write_folder(tmp_path / "data", files)
    mask = tmp_path / "data" / "masks" / "2.png"
    mask.write_bytes(mask.read_bytes()[:50])
    assert quarantine(data, tmp_path, masks=False, threads=1, resume=False) is data
    assert about(tmp_path)["left_out"] == 0
    left = quarantine(data, tmp_path, masks=True, threads=1, resume=False)
    assert left.ids == ("0", "1", "3")
    assert str(mask) in about(tmp_path)["bad"][0]["reason"]


def test_nothing_readable_and_nothing_writable(tmp_path):
    data = write_folder(tmp_path / "data", {n: BAD[n] for n in ("empty.jpg", "html.jpg")})
    with pytest.raises(InputError, match=r"none of the 2 images of 'train' .*empty\.jpg"):
        quarantine(data, tmp_path / "run", masks=False, threads=1, resume=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        quarantine(small(tmp_path / "s"), tmp_path / "file", masks=False, threads=1, resume=False)


@pytest.mark.parametrize("text", ['{"bad": 1}', '{"fingerprint": 0}', "[]", '{"fin'])
def test_a_damaged_list_is_refused(tmp_path, text):
    data = small(tmp_path / "data")
    (tmp_path / FILE).write_text(text.replace("0", json.dumps(data.fingerprint())))
    with pytest.raises(InputError, match=FILE):
        quarantine(data, tmp_path, masks=False, threads=1, resume=True)


def test_a_subset_is_a_data_set(tmp_path):
    data = write_folder(tmp_path / "data", {f"{k}.png": photo(20 + k, 9) for k in range(4)})
    part = Subset(data, [2, 0])
    assert (part.ids, len(part), part.name, part.split) == (("2", "0"), 2, "folder", "train")
    assert part.image_size(0) == (9, 22) and part.image(0) == data.image(2)
    assert part.image_path(1) == data.image_path(0) and part.mask_path(0) == data.mask_path(2)
    assert (part.mask(0) == data.mask(2)).all() and part.has_mask(1)
    assert (part.has_masks, part.mask_source) == (True, data.mask_source)
    assert part.fingerprint() != data.fingerprint() == Subset(data, range(4)).fingerprint()
    with pytest.raises(InputError, match="at least one"):
        Subset(data, [])
