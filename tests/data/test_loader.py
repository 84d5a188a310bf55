from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image

from wsis.data import TrainLoader, open_dataset
from wsis.data.workers import start_worker
from wsis.errors import InputError
from wsis.types import Batch

SIZES = {
    "crop": 24,
    "resize_long": (20, 40),
    "flip": 0.5,
    "jitter": (0.3, 0.3, 0.3, 0.1),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("scenes", n_train=26, size=32)


def make(dataset, **options) -> TrainLoader:
    return TrainLoader(dataset, **{"batch_size": 4, "seed": 7} | SIZES | options)


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in ("image", "label", "valid_box", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.mask is None) == (b.mask is None)
        assert a.mask is None or torch.equal(a.mask, b.mask)


def test_importing_the_package_is_light():
    code = "import sys, wsis.data; assert not {'torch', 'PIL', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_batches(scenes):
    loader = make(scenes)
    assert loader.steps_per_epoch == 6
    batches = list(loader.epoch(0))
    assert len(batches) == 6
    for batch in batches:
        assert (batch.image.shape, batch.image.dtype) == ((4, 3, 24, 24), torch.float32)
        assert (batch.valid_box.shape, batch.valid_box.dtype) == ((4, 4), torch.int64)
        assert (batch.index.shape, batch.index.dtype) == ((4,), torch.int64)
        assert batch.label.dtype == torch.float32
        np.testing.assert_array_equal(batch.label.numpy(), scenes.labels[batch.index.numpy()])
        assert batch.mask is None
    indices = torch.cat([batch.index for batch in batches]).tolist()
    assert len(set(indices)) == 24


def test_order_follows_seed_and_epoch(scenes):
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = make(scenes, seed=seed, batch_size=13).epoch(epoch)
        return tuple(torch.cat([batch.index for batch in batches]).tolist())

    orders = {order(seed, epoch) for seed in (0, 2**63) for epoch in (0, 24)}
    assert len(orders) == 4
    assert all(sorted(one) == list(range(26)) for one in orders)
    assert order(7, 1) == order(7, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(scenes, workers):
    straight = list(make(scenes, masks=True).epoch(3))
    assert_same(straight, list(make(scenes, masks=True, workers=workers).epoch(3)))


@pytest.mark.parametrize(("start", "workers"), [(0, 0), (1, 0), (5, 2), (6, 0), (6, 2)])
def test_starting_late_gives_the_tail(scenes, start, workers):
    straight = list(make(scenes).epoch(2))
    assert_same(straight[start:], list(make(scenes, workers=workers).epoch(2, start)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_global_batch(scenes, world_size):
    ranks = [
        list(make(scenes, rank=rank, world_size=world_size).epoch(1)) for rank in range(world_size)
    ]
    for whole, *parts in zip(make(scenes).epoch(1), *ranks, strict=True):
        assert all(len(part.index) == 4 // world_size for part in parts)
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        assert torch.equal(torch.cat([part.image for part in parts]), whole.image)


def test_the_tail_of_an_epoch_is_dropped_alike_for_any_number_of_processes():
    """19 images in batches of 8: three are left out of each epoch, other ones each time."""
    few, epochs = open_dataset("scenes", n_train=19), 2000
    parts = {
        count: [make(few, batch_size=8, rank=r, world_size=count) for r in range(count)]
        for count in (1, 2, 4, 8)
    }
    seen = np.zeros(19)
    for epoch in range(epochs):
        (whole,) = (np.array(loader._order(epoch, 0)) for loader in parts[1])
        assert whole.shape == (2, 8) and len(np.unique(whole)) == 16
        seen[whole] += 1
        for loaders in parts.values() if epoch < 20 else ():
            shares = [loader._order(epoch, 0) for loader in loaders]
            np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)
    expected = epochs * 16 / 19
    assert np.abs(seen - expected).max() < 4 * np.sqrt(expected * 3 / 19)  # binomial, 4 sigma


def test_a_sample_depends_on_seed_epoch_and_position_only(scenes):
    def samples(**options) -> dict[int, torch.Tensor]:
        epoch = options.pop("epoch", 0)
        batches = make(scenes, **options).epoch(epoch)
        return {
            int(i): x for batch in batches for i, x in zip(batch.index, batch.image, strict=True)
        }

    known = samples(batch_size=13)
    for i, image in samples(batch_size=5).items():
        assert torch.equal(image, known[i])
    for other in (samples(batch_size=13, seed=8), samples(batch_size=13, epoch=1)):
        assert not any(torch.equal(other[i], known[i]) for i in known)


def test_workers_outlive_epochs(scenes):
    loader = make(scenes, workers=2)
    pids = []
    for epoch in range(3):
        assert_same(list(loader.epoch(epoch)), list(make(scenes).epoch(epoch)))
        workers = loader._batches.loader()._iterator._workers
        pids.append([worker.pid for worker in workers])
        assert all(worker.is_alive() for worker in workers)
    assert len(pids[0]) == 2 and pids[0] == pids[1] == pids[2]


def test_workers_leave_signals_to_their_parent(scenes):
    """From their first moment on; the parent can still end them."""
    loader = make(scenes, workers=2)

    def begin(worker):
        assert {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        start_worker(worker)

    loader._batches.loader().worker_init_fn = begin
    epoch = loader.epoch(0)
    batches = [next(epoch)]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    workers = loader._batches.loader()._iterator._workers
    for number in ("INT", "TERM", "TERM"):  # from another process
        subprocess.run(["kill", f"-{number}", *(str(w.pid) for w in workers)], check=True)
    assert_same(batches + list(epoch), list(make(scenes).epoch(0)))
    assert all(worker.is_alive() for worker in workers)
    begun = time.monotonic()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=10)
        assert worker.exitcode == 0
    assert time.monotonic() - begun < 4  # before their loader would have told them


@pytest.mark.parametrize("whole", [True, False])
def test_workers_end_with_their_loader(scenes, whole):
    loader = make(scenes, workers=2)
    epoch = loader.epoch(0)
    next(epoch)
    if whole:
        list(epoch)
    workers = loader._batches.loader()._iterator._workers
    begun = time.monotonic()
    del epoch, loader
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert time.monotonic() - begun < 4  # told to, not terminated after 5 s


def test_workers_left_over_end_with_the_program():
    """Where nobody has put the loader away, whose workers the program's end terminates."""
    code = """
        import torch
        from wsis.data import TrainLoader, open_dataset

        class Kept(torch.utils.data.dataloader._MultiProcessingDataLoaderIter):
            def _shutdown_workers(self):
                pass

        torch.utils.data.dataloader._MultiProcessingDataLoaderIter = Kept
        loader = TrainLoader(
            open_dataset("scenes", n_train=8, size=32), batch_size=2, crop=24,
            resize_long=(20, 40), flip=0.5, jitter=(0.3, 0.3, 0.3, 0.1), mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25), seed=1, workers=2,
        )
        next(loader.epoch(0))
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(line, check=True, timeout=60, stdout=subprocess.PIPE)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_ends_when_another_begins(scenes, workers):
    loader = make(scenes, workers=workers)
    abandoned = loader.epoch(0)
    next(abandoned)
    assert_same(list(loader.epoch(1, 2)), list(make(scenes).epoch(1, 2)))
    with pytest.raises(RuntimeError, match="another epoch of this loader has begun"):
        next(abandoned)
    assert_same(list(loader.epoch(0)), list(make(scenes).epoch(0)))


@pytest.mark.parametrize("gpu", [False, True])
def test_batches_are_prepared_ahead_and_pinned_for_a_gpu(scenes, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    inner = make(scenes, workers=3)._batches.loader()
    assert (inner.num_workers, inner.persistent_workers, inner.pin_memory) == (3, True, gpu)
    assert inner.prefetch_factor == 2  # batches that each worker prepares ahead


def test_global_random_state_is_left_alone(scenes):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for workers in (0, 1):
        next(make(scenes, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_masks_are_opened_only_when_asked_for(scenes, monkeypatch):
    with_masks = next(make(scenes, masks=True).epoch(0))
    assert (with_masks.mask.shape, with_masks.mask.dtype) == ((4, 24, 24), torch.int64)
    for mask, label, box in zip(
        with_masks.mask, with_masks.label, with_masks.valid_box, strict=True
    ):
        y0, y1, x0, x1 = box.tolist()
        assert (mask == 255).sum() == 24 * 24 - (y1 - y0) * (x1 - x0)
        assert set(mask.unique().tolist()) - {0, 255} <= {
            c + 1 for c in label.nonzero().flatten().tolist()
        }

    def refuse(self, i):
        raise AssertionError("a mask was opened")

    monkeypatch.setattr(type(scenes), "mask", refuse)
    without = next(make(scenes).epoch(0))
    assert torch.equal(without.image, with_masks.image)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_with_its_name_only(tmp_path, workers):
    for i in range(3):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:400])
    rows = "\n".join(f"{i}.jpg,cat" for i in range(3))
    (tmp_path / "train.csv").write_text(f"image,labels\n{rows}\n")
    loader = make(open_dataset("folder", tmp_path), batch_size=1, workers=workers)
    with pytest.raises(InputError, match=r"1\.jpg") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_missing_masks_stop_with_a_message(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.jpg")
    (tmp_path / "train.csv").write_text("image,labels\na.jpg,cat\n")
    loader = make(open_dataset("folder", tmp_path), batch_size=1, masks=True)
    with pytest.raises(InputError, match=r"no mask 'a.png'"):
        next(loader.epoch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4, "world_size": 3}, "multiple of the number of processes 3, got 4"),
        ({"batch_size": 0}, "got 0"),
        ({"batch_size": 27}, "exceeds the 26 images"),
        ({"seed": -1}, "seed"),
        ({"resize_long": (40, 20)}, "resize_long"),
        ({"resize_long": (0, 20)}, "resize_long"),
    ],
)
def test_bad_options(scenes, options, message):
    with pytest.raises(InputError, match=message):
        make(scenes, **options)
