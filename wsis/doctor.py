"""What is installed, what was built, and how to get what is missing."""

from __future__ import annotations

import platform
from importlib import import_module, metadata

import wsis

# Distribution -> what installs it.
_PACKAGES = {
    "numpy": "pip install numpy",
    "torch": "pip install '.[train]'",
    "torchvision": "pip install '.[train]'",
    "safetensors": "pip install '.[train]'",
    "timm": "pip install '.[timm]'",
    "pycocotools": "pip install '.[data]'",
    "scipy": "pip install '.[data]'",
}
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


def report() -> str:
    """A page of text: versions, native module, packages, devices. Works without torch.

    Returns:
        Lines of ``name  value``; a missing package has the command that installs it.

    Example:
        >>> print(report().splitlines()[0].split()[0])
        wsis
    """
    rows = [
        ("wsis", wsis.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *_native(),
        *((name, _version(name) or f"missing: {cure}") for name, cure in _PACKAGES.items()),
        ("DALI", _dali()),
        *_devices(),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _native() -> list[tuple[str, str]]:
    try:
        from wsis import _C
    except ImportError as error:
        return [("native module", f"missing: {error}; pip install . builds it")]
    info = _C.build_info()
    stale = "" if info["version"] == wsis.__version__ else ", not this version: install again"
    if "cuda_archs" in info:
        cuda = f"{info['cuda_archs']} (runtime {info['cuda_runtime']}, {info['cuda_compiler']})"
    else:
        cuda = f"CPU only, because {info['cpu_only_because']}"
    return [
        ("native module", f"{info['version']}, {info['compiler']}{stale}"),
        ("CPU paths", f"{info['isa_paths']}, here {info['isa_active']}"),
        ("CUDA archs", cuda),
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _dali() -> str:
    found = [f"{_version(name)} ({name})" for name in _DALI if _version(name)]
    if not found:
        return "missing: pip install '.[dali-cu13]', or dali-cu12 for CUDA 12; optional"
    try:
        import_module("nvidia.dali")
    except Exception as error:  # a foreign library: a broken one must not break this page
        found.append(f"does not import: {error}")
    return ", ".join(found)


def _devices() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("devices", f"CPU; torch: {error}")]
    cpu = (
        "device",
        f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    gpus = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        gpus.append(
            ("device", f"cuda:{index} {p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB")
        )
    if not gpus:
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU torch"
        )
        gpus.append(("device", f"no CUDA device ({built})"))
    return [cpu, *gpus]
