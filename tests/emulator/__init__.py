"""wsis._C with its CUDA half compiled for the host, so that CUDA kernels are tested without a GPU.

``load(build())`` is a module whose ``*_cuda`` functions take host arrays and run the very same .cu
files block by block and thread by thread (cuda_emulator.h: barriers, shared memory, warps,
atomics). What a kernel's tests do with it:

- equality with the CPU operator at odd sizes, in several thread orders (``WSIS_EMULATOR_SEED``);
- seeded faults: ``build(edits=(("file.cu", old text, new text),))`` compiles a one-line change of a
  shipped source or header; the tests have to fail on it;
- sanitizers: ``build("asan")`` (with UBSan) and ``build("tsan")``, loaded in a process with
  ``sanitizer_environment``;
- counts: ``count(function, *arguments)`` gives one :class:`Launch` per kernel launch, with the
  distinct bytes of every array that it read and wrote. These stand for speed where there is no
  GPU: no more launches, and at most 1.5 times the bytes, of what was derived for the algorithm.

Not seen here: scheduling of warps, weak memory order beyond data races, contraction to FMA, caches,
streams, errors of the runtime.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"
CXX = os.environ.get("CXX", "g++")

# -O1 everywhere: compile time counts here, not speed.
FLAVOURS = {
    "fibers": [],
    "asan": ["-DWSIS_EMULATOR_THREADS", "-fsanitize=address,undefined",
             "-fno-sanitize-recover=undefined"],
    "tsan": ["-DWSIS_EMULATOR_THREADS", "-fsanitize=thread"],
    "count": ["-DWSIS_EMULATOR_COUNT", "-fsanitize=thread"],  # without its library: counter.cpp
}  # fmt: skip
_RUNTIME = {"asan": "libasan.so", "tsan": "libtsan.so"}
_LIMITS = {
    # Python itself is not clean of leaks, and its threads are not instrumented.
    "asan": {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"},
    "tsan": {"TSAN_OPTIONS": "report_bugs=1:exitcode=66:halt_on_error=1"},
}


_files: dict[str, str] = {}  # of the loaded modules


def has_compiler() -> bool:
    return shutil.which(CXX) is not None


def _headers(text: str, folder: Path) -> set[Path]:
    """The headers of csrc that a file with this text includes, in the end."""
    found: set[Path] = set()
    todo = [(text, folder)]
    while todo:
        text, folder = todo.pop()
        for name in re.findall(r'^\s*#include "([^"]+)"', text, re.MULTILINE):
            header = next((h for h in (folder / name, ROOT / "csrc" / name) if h.is_file()), None)
            if header is not None and header not in found:
                found.add(header)
                todo.append((header.read_text(), header.parent))
    return found


def _compile(source: Path, text: str, flavour: str, overlay: dict[Path, str]) -> Path:
    """Object file of a source with this text, from the cache if nothing it sees has changed.

    `overlay` are headers with another text; only .cu files see them.
    """
    flags = [
        "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread",
        "-DWSIS_WITH_CUDA", '-DWSIS_VERSION="emulator"', '-DWSIS_COMPILER=""',
        '-DWSIS_CUDA_ARCHS="emulator"', '-DWSIS_CUDA_COMPILER=""',
        f'-DWSIS_EMULATOR="{HERE / "cuda_emulator.h"}"',
        f"-I{ROOT / 'csrc'}", f"-I{source.parent}",
        f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}",
    ]  # fmt: skip
    # The bindings only hand pointers over; without a sanitizer they are compiled once for all.
    # Only kernels are counted.
    is_kernel = source.suffix == ".cu"
    plain = source.parent.name == "bindings" or (flavour == "count" and not is_kernel)
    flags += [] if plain else FLAVOURS[flavour]
    headers = _headers(text, source.parent)
    changed = {h: t for h, t in overlay.items() if is_kernel and h in headers}
    texts = [changed.get(h) or h.read_text() for h in sorted(headers)]
    texts += [h.read_text() for h in sorted(HERE.glob("*.h"))] if is_kernel else []
    text = f'#line 1 "{source}"\n{text}'  # reports name the real file
    key = hashlib.sha256("\0".join([CXX, *flags, text, *texts]).encode()).hexdigest()[:20]
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            for header, new in changed.items():
                copy = Path(folder) / header.relative_to(ROOT / "csrc")
                copy.parent.mkdir(exist_ok=True)
                copy.write_text(f'#line 1 "{header}"\n{new}')
            unit, scratch = Path(folder) / f"{source.stem}.cpp", Path(folder) / "object"
            unit.write_text(text)
            command = [CXX, f"-I{folder}", *flags, "-c", str(unit), "-o", str(scratch)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(scratch, target)
    return target


@contextmanager
def _alone() -> Iterator[None]:
    """One process compiles at a time: the next finds what it needs."""
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def build(flavour: str = "fibers", edits: tuple[tuple[str, str, str], ...] = ()) -> Path:
    """Compiles csrc for the host and returns the path of the module.

    Args:
        flavour: "fibers", "asan", "tsan" or "count".
        edits: seeded faults (file, old text, new text): a source by its name, or a header by its
            path in csrc, such as "kernels/confusion.h"; the old text must occur once.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = sorted([*ROOT.glob("csrc/bindings/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"),
                      *ROOT.glob("csrc/cuda/*.cu")])  # fmt: skip
    sources += [HERE / "counter.cpp"] if flavour == "count" else []
    texts = {source: source.read_text() for source in sources}
    overlay: dict[Path, str] = {}
    for name, old, new in edits:
        file, into = ROOT / "csrc" / name, overlay
        if not name.endswith(".h"):
            file, into = next(s for s in sources if s.name == name), texts
        before = into.get(file) or file.read_text()
        assert before.count(old) == 1, f"{name}: {old!r} must occur exactly once"
        into[file] = before.replace(old, new)
    with _alone(), ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: _compile(s, texts[s], flavour, overlay), sources))
    key = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:20]
    module = CACHE / f"_C-{flavour}-{key}.so"
    if not module.exists():
        scratch = module.with_suffix(f".{os.getpid()}")
        libraries = [] if flavour == "count" else FLAVOURS[flavour]
        link = [CXX, "-shared", "-pthread", *libraries, *map(str, objects)]
        subprocess.run([*link, "-o", str(scratch)], check=True)
        os.replace(scratch, module)
    return module


def load(path: Path) -> ModuleType:
    """Imports a module made by `build`; its `*_cuda` functions take host arrays."""
    # pybind11 hands out one module per full name.
    spec = importlib.util.spec_from_file_location(f"{path.stem}._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _files[spec.name] = str(path)
    return module


def sanitizer_environment(flavour: str) -> dict[str, str]:
    """Environment in which a Python process can load an "asan" or "tsan" module."""
    found = subprocess.run(
        [CXX, f"-print-file-name={_RUNTIME[flavour]}"], check=True, capture_output=True, text=True
    )
    return {**os.environ, "LD_PRELOAD": found.stdout.strip(), **_LIMITS[flavour]}


def run_sanitized(
    tests: str, flavour: str, edits: tuple[tuple[str, str, str], ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs ``run_all(module)`` of a test file on an "asan" or "tsan" module, in its own process.

    Args:
        tests: the test file's ``__name__``.
        flavour: "asan" or "tsan".
        edits: as for `build`.
    """
    program = (
        f"import {tests} as t; from pathlib import Path; from tests import emulator; "
        f"t.run_all(emulator.load(Path({str(build(flavour, edits))!r})))"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        env=sanitizer_environment(flavour) | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


# ---- counts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Global memory traffic of one launch in one array, bytes.

    Attributes:
        read: distinct bytes that were read: what a cache that forgets nothing would fetch.
        written: distinct bytes that were written.
        loaded: bytes that all threads together asked for.
        stored: bytes that all threads together wrote. Atomics count on both sides.
    """

    read: int
    written: int
    loaded: int
    stored: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch (or asynchronous memset).

    Attributes:
        kernel: the first argument of WSIS_LAUNCH, as text.
        grid: blocks along x, y, z.
        block: threads along x, y, z.
        shared: bytes of dynamic shared memory.
        arrays: traffic in each array argument, by its position among all arguments.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arrays: dict[int, Traffic]

    @property
    def read(self) -> int:
        """Distinct bytes read, all arrays."""
        return sum(t.read for t in self.arrays.values())

    @property
    def written(self) -> int:
        """Distinct bytes written, all arrays."""
        return sum(t.written for t in self.arrays.values())


def count(function: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """Calls a function of a module made by ``build("count")`` and says what its kernels touched.

    All global memory that a kernel knows came in as an argument, so every byte is counted.

    Args:
        function: such as ``module.confusion_matrix_cuda``.
        arguments: of the call; numpy arrays are watched.

    Returns:
        The launches in their order.
    """
    library = ctypes.CDLL(_files[function.__module__])
    watched = {i: a for i, a in enumerate(arguments) if isinstance(a, np.ndarray) and a.nbytes}
    addresses = np.array([a.ctypes.data for a in watched.values()], np.uint64)
    sizes = np.array([a.nbytes for a in watched.values()], np.uint64)
    pointer = ctypes.c_void_p
    library.wsis_count_start(
        len(watched), pointer(addresses.ctypes.data), pointer(sizes.ctypes.data)
    )
    try:
        function(*arguments)
    finally:
        number = library.wsis_count_stop()
    library.wsis_count_kernel.restype = ctypes.c_char_p
    launches = []
    for launch in range(number):
        shape, traffic = (ctypes.c_int64 * 7)(), (ctypes.c_int64 * 4)()
        kernel = library.wsis_count_kernel(launch, shape).decode()
        arrays = {}
        for position, argument in enumerate(watched):
            library.wsis_count_traffic(launch, position, traffic)
            arrays[argument] = Traffic(*traffic)
        launches.append(Launch(kernel, tuple(shape[:3]), tuple(shape[3:6]), shape[6], arrays))
    return launches
