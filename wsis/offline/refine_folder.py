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

from wsis import _C
from wsis.data.dataset import read_image, read_json, read_list
from wsis.engine.device import pick_device
from wsis.engine.logs import write_error, write_json_atomic
from wsis.errors import InputError
from wsis.offline.masks import write_mask
from wsis.offline.refine import Method, Refinement, refine_maps
from wsis.offline.spread import Guide, GuideKind, read_guide
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
    edges: str | Path | None = None,
    features: str | Path | None = None,
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
        edges: for a walk, folder with a boundary map of the same stem for every file of maps; see
            `wsis.offline.spread.read_guide`.
        features: for a walk or PCM, folder with features instead.

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
    target = operator_device(device)
    guides = find_guides(how.method, edges, features)
    todo, done = _plan(Path(images), Path(maps), Path(out), how, names, overwrite, guides)
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
    guide: Path | None = None
    guide_kind: GuideKind | None = None


@dataclass(frozen=True)
class Guides:
    """A folder of what affinities come from.

    Attributes:
        kind: of its files.
        folder: where they lie.
    """

    kind: GuideKind
    folder: Path

    def files(self) -> dict[str, Path]:
        """Its files by stem; InputError where there are none."""
        suffixes = {".npy", ".npz", ".png"} if self.kind == "edges" else {".npy", ".npz"}
        return by_stem(self.folder, suffixes, self.kind)


def find_guides(
    method: Method, edges: str | Path | None, features: str | Path | None
) -> Guides | None:
    """Where a method takes its affinities from; InputError where the folders do not go with it."""
    if edges is not None and features is not None:
        raise InputError("give --edges or --features, not both")
    if method == "walk" and edges is None and features is None:
        raise InputError(
            "a walk needs, for every file of maps, a boundary map (--edges FOLDER) or features of "
            "AffinityNet (--features FOLDER)"
        )
    if edges is not None:
        if method != "walk":
            raise InputError(f"--edges goes with the walk only, got {method}")
        return Guides("edges", Path(edges))
    if features is not None:
        if method not in ("walk", "pcm"):
            raise InputError(f"--features goes with walk and pcm only, got {method}")
        return Guides("features", Path(features))
    return None


def _plan(
    images: Path,
    maps: Path,
    out: Path,
    how: Refinement,
    names: str | Path | None,
    overwrite: bool,
    guides: Guides | None = None,
) -> tuple[list[_Job], int]:
    """This process's share of what is to be made, and how much of it is there."""
    pictures = by_stem(images, IMAGE_SUFFIXES, "images")
    files = by_stem(maps, set(SUFFIXES), "maps")
    inputs = [("maps", files, maps), ("image", pictures, images)]
    if guides:
        inputs.append((guides.kind, guides.files(), guides.folder))
    if out.resolve() in [folder.resolve() for _, _, folder in inputs]:
        raise InputError(f"{out} holds the inputs; choose another --out")
    wanted = sorted(files) if names is None else list(dict.fromkeys(read_list(Path(names))))
    for kind, found, folder in inputs:
        missing = [name for name in wanted if name not in found]
        if missing:
            raise InputError(
                f"{folder}: no {kind} for {len(missing)} of {len(wanted)} names, "
                f"the first is '{missing[0]}'"
            )
    guide_kind = guides.kind if guides else None
    beside = inputs[2][1] if guides else {}
    settings = _settings(how, guide_kind)
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
    jobs = [
        _Job(pictures[n], files[n], out / f"{n}.png", beside.get(n), guide_kind)
        for n in wanted[rank::world]
    ]
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


_LOCAL = ("iterations", "dilations")
_OWN = {
    "crf": ("preset", "iterations", "gt_prob"),
    "walk": ("radius", "beta", "log_steps"),
    "pcm": (),
}
"""What decides about the masks of a method, beside the maps and their background."""


def _settings(how: Refinement, guide: GuideKind | None) -> dict[str, Any]:
    """What decides about the masks, as JSON gives it back."""
    values = {**asdict(how.filled(guide)), "dilations": list(how.dilations)}
    kept = ("method", "kind", "background", "alpha", *_OWN.get(how.method, _LOCAL))
    settings = {name: values[name] for name in values if name in kept}
    return settings | ({"guide": guide} if how.method in ("walk", "pcm") else {})


def by_stem(folder: Path, suffixes: set[str], what: str) -> dict[str, Path]:
    """The files of a folder by stem; InputError where there are none, or two of one name."""
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


def operator_device(name: str) -> torch.device:
    """As `pick_device`, but `auto` is the CPU where wsis was built for the CPU only."""
    built = "cuda_archs" in _C.build_info()
    return pick_device("cpu" if name == "auto" and not built else _own_gpu(name))


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
                image, stored, guide = loading.result()
                mask = refine_maps(image, stored, how, device, guide)
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
        image, stored, guide = _load(job)
        write_mask(job.mask, refine_maps(image, stored, how, "cpu", guide), _CLASS_IDS)
    except InputError as error:
        return _named(job, error)
    return None


def _load(job: _Job, _: None = None) -> tuple[np.ndarray, StoredMaps, Guide | None]:
    guide = None
    if job.guide is not None and job.guide_kind is not None:
        guide = read_guide(job.guide, job.guide_kind)
    stored = read_maps(job.maps, coarse=job.guide_kind == "edges")
    return np.asarray(read_image(job.image)), stored, guide


def _named(job: _Job, error: InputError) -> str:
    text = str(error)
    known = any(path and str(path) in text for path in (job.maps, job.image, job.guide))
    return text if known else f"{job.maps}: {text}"
