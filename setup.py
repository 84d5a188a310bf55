"""Builds ``wsis._C``: C++ with the host compiler, CUDA with nvcc where it is found, through ninja.

Environment:
    WSIS_CUDA: ``auto`` (default) builds the CUDA kernels if there is an nvcc; ``0`` never; ``1``
        demands them.
    CUDA_HOME: toolkit to use; else the nvcc on PATH, else /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST: such as ``8.0;9.0+PTX``; default: those of the GPUs in this machine, the
        newest also as PTX. Without a GPU (containers, login nodes) of every major version that nvcc
        knows from 7.5 up the lowest, whose code runs on the others (8.0 on 8.6 and 8.9): six times
        the work.
    CXX: host compiler, default ``g++``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.c*"))
HEADERS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.h"))


def output_of(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def find_nvcc() -> tuple[str | None, str]:
    """Path of nvcc, or None and the reason."""
    wish = os.environ.get("WSIS_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"WSIS_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "WSIS_CUDA=0 at build time"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and wish == "1":
        raise SystemExit("WSIS_CUDA=1 but no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    return nvcc, "no nvcc was found at build time"


def gpus_here() -> set[int]:
    """Compute capabilities of this machine's GPUs, such as ``{90}``; none where nobody knows."""
    try:
        listed = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {int(n.replace(".", "")) for n in re.findall(r"^\d+\.\d$", listed, re.M)}


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures such as ``["75", "90", "90+PTX"]``."""
    if wish := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        archs = []
        for name in re.split(r"[;, ]+", wish.strip()):
            if not re.fullmatch(r"\d+\.\d+[a-z]?(\+PTX)?", name):
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be like 8.0;9.0+PTX, got {name!r}")
            number = name.replace(".", "")
            archs += [number.removesuffix("+PTX")] + [number] * number.endswith("+PTX")
        return archs
    known = {int(n) for n in re.findall(r"^sm_(\d+)$", output_of(nvcc, "--list-gpu-code"), re.M)}
    here = gpus_here()
    if here and here <= known:
        return [*map(str, sorted(here)), f"{max(here)}+PTX"]
    lowest = {n // 10: str(n) for n in sorted(known, reverse=True) if n >= 75}
    archs = list(reversed(lowest.values()))
    return [*archs, archs[-1] + "+PTX"]


def gencode(arch: str) -> str:
    """The nvcc flag for ``"90"`` (machine code) or ``"90+PTX"``."""
    number = arch.removesuffix("+PTX")
    kind = "compute" if arch.endswith("+PTX") else "sm"
    return f"-gencode=arch=compute_{number},code={kind}_{number}"


class NinjaBuild(build_ext):
    """Writes one ninja file and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links one extension module."""
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.ninja_file(ext.sources, target))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)
        # The source tree gets a copy, so that tests and tools started inside a checkout, which
        # import wsis from there, work after a plain `pip install .` too.
        in_tree = ROOT / "wsis" / target.name
        if in_tree != target:
            shutil.copy2(target, in_tree)

    def ninja_file(self, sources: list[str], target: Path) -> str:
        """The build as a ninja file: one object per source, one module."""
        cxx = os.environ.get("CXX", "g++")
        nvcc, reason = find_nvcc()
        include = [sysconfig.get_paths()["include"], pybind11.get_include(), str(ROOT / "csrc")]
        flags = ["-O3", "-std=c++17", *(shell(f"-I{path}") for path in include)]
        # Vectors pass between inlined functions only (csrc/cpu/simd.h): their ABI is no matter.
        host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
        facts = {
            "WSIS_VERSION": self.distribution.get_version(),
            "WSIS_COMPILER": output_of(cxx, "--version").splitlines()[0],
            "WSIS_CPU_ONLY_BECAUSE": reason,
        }
        link = f"{cxx} -shared -pthread"
        if nvcc:
            archs = cuda_archs(nvcc)
            facts["WSIS_CUDA_ARCHS"] = " ".join(archs)
            facts["WSIS_CUDA_COMPILER"] = output_of(nvcc, "--version").splitlines()[-2]
            flags.append("-DWSIS_WITH_CUDA")
            # nvcc knows where its own runtime lies; static, so that no CUDA is needed to import.
            link = f"{nvcc} -shared -ccbin {cxx} -cudart static -Xcompiler -pthread"
        else:
            archs = []
            sources = [source for source in sources if not source.endswith(".cu")]
        defines = [f"'-D{name}=\"{value}\"'" for name, value in facts.items()]
        lines = [
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d {' '.join(flags + host)} $defines -c $in -o $out",
            "  depfile = $out.d",
            "rule nvcc",
            f"  command = {nvcc} -ccbin {cxx} -MD -MF $out.d {' '.join(flags)} "
            f"-Xcompiler {','.join(host)} {' '.join(map(gencode, archs))} -c $in -o $out",
            "  depfile = $out.d",
            "rule link",
            f"  command = {link} $in -o $out",
        ]
        objects = []
        for source in sources:
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            objects.append(source.replace("/", "_") + ".o")
            lines.append(f"build {objects[-1]}: {rule} {escape(ROOT / source)}")
            if source == "csrc/bindings/module.cpp":
                lines.append(f"  defines = {' '.join(defines)}")
        lines.append(f"build {escape(target)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def shell(word: str) -> str:
    """A word of a shell command inside a ninja file."""
    return shlex.quote(word).replace("$", "$$")


def escape(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("wsis._C", sources=SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": NinjaBuild},
)
