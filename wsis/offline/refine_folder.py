"""A folder of images and a folder of stored maps -> a folder of masks.

One image at a time, nothing but its mask is kept: by worker processes on all cores, or on a GPU
while threads read and write. Masks are written whole or not at all, so that a run that was stopped
goes on where it was; several machines share the list by ``RANK`` and ``WORLD_SIZE``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from wsis.data.dataset import read_image, read_json, read_list
from wsis.engine.device import pick_device
from wsis.engine.logs import write_error, write_json_atomic
from wsis.errors import InputError
from wsis.offline.masks import write_mask
from wsis.offline.refine import Refinement, refine_maps
from wsis.offline.stored import SUFFIXES, StoredMaps, read_maps

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
SETTINGS = "refine.json"
_CLASS_IDS = range(1, 255)  # masks hold class ids as they are


def refine_folder(
    images: str | Path,
    maps: str | Path,
    out: str | Path,
    how: Refinement | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    names: str | Path | None = None,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Refines every file of a folder of maps; see `wsis.offline.stored` for what they may be.

    Calls that start worker processes belong under ``if __name__ == "__main__"`` in a script.

    Args:
        images: folder with an image of the same stem for every file of maps.
        maps: folder of ``.npy``, ``.npz`` or ``.png`` files.
        out: folder for the masks, palette PNGs ``<stem>.png`` that hold class ids. Masks that are
            there are not made again.
        how: method and constants.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        workers: processes on the CPU; by default one for each core that this process may use. 0
            and 1 work in this process.
        names: text file of the stems to take, one per line; all by default.
        overwrite: make masks that are there again.

    Returns:
        How many masks were written, and how many were there already.

    Raises:
        InputError: a folder or image is missing, ``out`` holds masks of other settings, or files
            could not be read (all others have been refined then).
    """
    how = how or Refinement()
    how.check()
    workers = _cores() if workers is None else workers
    if workers < 0:
        raise InputError(f"workers must be 0 or more, got {workers}")
    target = pick_device(_own_gpu(device))
    todo, done = _plan(Path(images), Path(maps), Path(out), how, names, overwrite)
    rank, world = _shard()
    problems: list[str] = []
    bar = tqdm(desc="refine", total=len(todo) + done, initial=done, unit="image", disable=rank > 0)
    with bar:
        for problem in _run(todo, how, target, min(workers, len(todo))):
            bar.update()
            if problem:
                problems.append(problem)
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        share = f" in shard {rank} of {world}" if world > 1 else ""
        raise InputError(
            f"{len(problems)} of {len(todo)} images{share} could not be refined: "
            f"{problems[0]}{rest}"
        )
    return len(todo), done


@dataclass(frozen=True)
class _Job:
    image: Path
    maps: Path
    mask: Path


def _plan(
    images: Path,
    maps: Path,
    out: Path,
    how: Refinement,
    names: str | Path | None,
    overwrite: bool,
) -> tuple[list[_Job], int]:
    """This process's share of what is to be made, and how much of it is there."""
    pictures = _by_stem(images, IMAGE_SUFFIXES, "images")
    files = _by_stem(maps, set(SUFFIXES), "maps")
    if out.resolve() in (images.resolve(), maps.resolve()):
        raise InputError(f"{out} holds the inputs; choose another --out")
    wanted = sorted(files) if names is None else list(dict.fromkeys(read_list(Path(names))))
    for kind, found, folder in (("maps", files, maps), ("image", pictures, images)):
        missing = [name for name in wanted if name not in found]
        if missing:
            raise InputError(
                f"{folder}: no {kind} for {len(missing)} of {len(wanted)} names, "
                f"the first is '{missing[0]}'"
            )
    settings = _settings(how)
    record = out / SETTINGS
    if record.is_file() and not overwrite and (stored := read_json(record)) != settings:
        changed = [
            k for k in settings if not isinstance(stored, dict) or settings[k] != stored.get(k)
        ]
        raise InputError(
            f"{out} holds masks of other settings ({', '.join(changed) or 'unknown'}); choose "
            "another --out, or make them again with --overwrite true"
        )
    rank, world = _shard()
    jobs = [_Job(pictures[n], files[n], out / f"{n}.png") for n in wanted[rank::world]]
    if overwrite:
        # First of all: a run that is stopped must not leave masks of two settings behind.
        for job in jobs:
            job.mask.unlink(missing_ok=True)
    todo = [job for job in jobs if not job.mask.is_file()]
    if rank == 0 or not record.is_file():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(record, error, 0) from error
        write_json_atomic(record, settings)
    return todo, len(jobs) - len(todo)


def _settings(how: Refinement) -> dict[str, Any]:
    """What decides about the masks, as JSON gives it back."""
    values = {**asdict(how), "dilations": list(how.dilations)}
    for name in ("dilations",) if how.method == "crf" else ("preset", "gt_prob"):
        del values[name]
    return values


def _by_stem(folder: Path, suffixes: set[str], what: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected {what} in it")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise InputError(f"{found[path.stem]} and {path} have the same name")
            found[path.stem] = path
    if not found:
        raise InputError(f"{folder}: expected {what} in it, found none")
    return found


def _shard() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise InputError(f"RANK and WORLD_SIZE must be numbers: {error}") from None
    if not 0 <= rank < world:
        raise InputError(f"RANK must be 0 to WORLD_SIZE - 1, got {rank} of {world}")
    return rank, world


def _own_gpu(device: str) -> str:
    """Each process of a machine takes its own GPU."""
    if device in ("auto", "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def _cores() -> int:
    """The cores of this process, shared with the others that torchrun started here."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, own // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _run(
    jobs: list[_Job], how: Refinement, device: torch.device, workers: int
) -> Iterator[str | None]:
    """Per job None, or why it failed."""
    if device.type != "cpu":
        yield from _run_on_gpu(jobs, how, device)
    elif workers <= 1:
        for job in jobs:
            yield _whole(job, how)
    else:
        # A server that has imported torch and run nothing forks the workers: no threads are lost
        # in a fork, and torch is imported once.
        method = (
            "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        )
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["wsis.offline.refine_folder"])
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
        try:
            yield from (f.result() for _, f in _ahead(pool, _whole, jobs, how, 4 * workers))
        except BrokenProcessPool:
            raise InputError(
                "a worker process died, perhaps for want of memory; run again to go on, with "
                "fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_on_gpu(jobs: list[_Job], how: Refinement, device: torch.device) -> Iterator[str | None]:
    """Threads read and write, this one computes."""
    with ThreadPoolExecutor(8) as pool:
        writing: deque[Future[None]] = deque()
        for job, loading in _ahead(pool, _load, jobs, None, 16):
            try:
                image, stored = loading.result()
                mask = refine_maps(image, stored, how, device)
            except InputError as error:
                yield _named(job, error)
                continue
            writing.append(pool.submit(write_mask, job.mask, mask, _CLASS_IDS))
            if len(writing) > 16:
                writing.popleft().result()
            yield None
        for written in writing:
            written.result()


def _ahead(
    pool: Executor, function: Callable[..., Any], jobs: Iterable[_Job], extra: Any, depth: int
) -> Iterator[tuple[_Job, Future[Any]]]:
    """Jobs and their futures in order, never more than `depth` of them begun and not fetched."""
    begun: deque[tuple[_Job, Future[Any]]] = deque()
    for job in jobs:
        begun.append((job, pool.submit(function, job, extra)))
        if len(begun) >= depth:
            yield begun.popleft()
    yield from begun


def _start_worker() -> None:
    """One thread each; an interrupt is the parent's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _whole(job: _Job, how: Refinement) -> str | None:
    """Reads, refines and writes one image; returns what was wrong with it."""
    try:
        image, stored = _load(job)
        write_mask(job.mask, refine_maps(image, stored, how, "cpu"), _CLASS_IDS)
    except InputError as error:
        return _named(job, error)
    return None


def _load(job: _Job, _: None = None) -> tuple[np.ndarray, StoredMaps]:
    return np.asarray(read_image(job.image)), read_maps(job.maps)


def _named(job: _Job, error: InputError) -> str:
    text = str(error)
    return text if str(job.maps) in text or str(job.image) in text else f"{job.maps}: {text}"
