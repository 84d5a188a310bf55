"""wsis._C with its CUDA half compiled for the host. See cuda_emulator.h."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

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
}  # fmt: skip
_RUNTIME = {"asan": "libasan.so", "tsan": "libtsan.so"}
_LIMITS = {
    # Python itself is not clean of leaks, and its threads are not instrumented.
    "asan": {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"},
    "tsan": {"TSAN_OPTIONS": "report_bugs=1:exitcode=66:halt_on_error=1"},
}


def has_compiler() -> bool:
    return shutil.which(CXX) is not None


def _compile(source: Path, text: str, flavour: str) -> Path:
    """Object file of a source with this text, from the cache if nothing it sees has changed."""
    flags = [
        "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread",
        "-DWSIS_WITH_CUDA", "-DWSIS_NO_CLONES", '-DWSIS_VERSION="emulator"', '-DWSIS_COMPILER=""',
        '-DWSIS_CUDA_ARCHS="emulator"', '-DWSIS_CUDA_COMPILER=""',
        f'-DWSIS_EMULATOR="{HERE / "cuda_emulator.h"}"',
        f"-I{ROOT / 'csrc'}", f"-I{source.parent}",
        f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}",
    ]  # fmt: skip
    # The bindings only hand pointers over; without a sanitizer they are compiled once for all.
    flags += [] if source.parent.name == "bindings" else FLAVOURS[flavour]
    headers = sorted([*ROOT.glob("csrc/**/*.h"), HERE / "cuda_emulator.h"])
    text = f'#line 1 "{source}"\n{text}'  # reports name the real file
    seen = [CXX, *flags, text, *(p.read_text() for p in headers)]
    key = hashlib.sha256("\0".join(seen).encode()).hexdigest()[:20]
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        scratch = CACHE / f"{source.stem}-{key}-{os.getpid()}"
        changed = scratch.with_suffix(".cpp")
        changed.write_text(text)
        command = [CXX, *flags, "-c", str(changed), "-o", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True)
        changed.unlink()
        assert done.returncode == 0, done.stderr
        os.replace(scratch, target)
    return target


@cache
def build(flavour: str = "fibers", edits: tuple[tuple[str, str, str], ...] = ()) -> Path:
    """Compiles csrc for the host and returns the path of the module.

    Args:
        flavour: "fibers", "asan" or "tsan".
        edits: seeded faults (file name, old text, new text); the old text must occur once.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = sorted([*ROOT.glob("csrc/bindings/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"),
                      *ROOT.glob("csrc/cuda/*.cu")])  # fmt: skip
    texts = {source: source.read_text() for source in sources}
    for name, old, new in edits:
        source = next(s for s in sources if s.name == name)
        assert texts[source].count(old) == 1, f"{name}: {old!r} must occur exactly once"
        texts[source] = texts[source].replace(old, new)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: _compile(s, texts[s], flavour), sources))
    key = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:20]
    module = CACHE / f"_C-{flavour}-{key}.so"
    if not module.exists():
        scratch = module.with_suffix(f".{os.getpid()}")
        link = [CXX, "-shared", "-pthread", *FLAVOURS[flavour], *map(str, objects)]
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
    return module


def sanitizer_environment(flavour: str) -> dict[str, str]:
    """Environment in which a Python process can load an "asan" or "tsan" module."""
    found = subprocess.run(
        [CXX, f"-print-file-name={_RUNTIME[flavour]}"], check=True, capture_output=True, text=True
    )
    return {**os.environ, "LD_PRELOAD": found.stdout.strip(), **_LIMITS[flavour]}
