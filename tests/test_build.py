"""The package build: what setup.py decides, and what came out of it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import wsis.ops
from wsis import _C, doctor

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")


def run_python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, without building anything."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("WSIS_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("wsis_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA_HOME whose nvcc only lists."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\nprintf 'sm_50\\nsm_75\\nsm_86\\nsm_80\\nsm_121\\nsm_120\\nsm_90\\nsm_90a\\n'\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def test_finds_the_toolkit_that_is_named(build, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent.parent))
    assert build.find_nvcc()[0] == str(toolkit)
    monkeypatch.setenv("WSIS_CUDA", "0")
    assert build.find_nvcc() == (None, "WSIS_CUDA=0 at build time")
    monkeypatch.setenv("WSIS_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        build.find_nvcc()


def test_never_a_silent_cpu_build(build, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    assert build.find_nvcc() == (None, "no nvcc was found at build time")
    monkeypatch.setenv("WSIS_CUDA", "1")
    with pytest.raises(SystemExit, match="WSIS_CUDA=1 but no nvcc"):
        build.find_nvcc()


@pytest.mark.parametrize(
    ("printed", "archs"),
    [
        ("8.6\n9.0\n8.6\n", ["86", "90", "90+PTX"]),
        ("10.3\n", ["75", "80", "90", "120", "120+PTX"]),  # this nvcc does not know it
        ("No devices were found\n", ["75", "80", "90", "120", "120+PTX"]),
    ],
)
def test_builds_for_the_gpus_that_are_there(build, toolkit, tmp_path, monkeypatch, printed, archs):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert build.cuda_archs(str(toolkit)) == archs


def test_architectures(build, toolkit, monkeypatch):
    monkeypatch.setattr(build, "gpus_here", set)
    assert build.cuda_archs(str(toolkit)) == ["75", "80", "90", "120", "120+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    assert build.cuda_archs(str(toolkit)) == ["80", "90a", "120", "120+PTX"]
    assert build.gencode("90a") == "-gencode=arch=compute_90a,code=sm_90a"
    assert build.gencode("120+PTX") == "-gencode=arch=compute_120,code=compute_120"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="must be like"):
        build.cuda_archs(str(toolkit))


def test_build_info():
    info = _C.build_info()
    assert info["version"] == wsis.__version__
    assert info["isa_active"] in info["isa_paths"].split()
    assert ("cuda_archs" in info) != ("cpu_only_because" in info)
    assert ("cuda_archs" in info) == hasattr(_C, "confusion_matrix_cuda")


def test_imports_nothing_heavy():
    loaded = run_python("import sys, wsis, wsis.compat, wsis.ops; print(*sys.modules)").split()
    assert "wsis.ops" in loaded
    assert not {"numpy", "torch", "wsis._C"} & set(loaded)


def test_native_module_needs_no_torch_and_no_driver():
    program = "import sys; sys.modules['torch'] = None; import wsis._C as c; c.build_info()"
    run_python(program, CUDA_VISIBLE_DEVICES="")


def test_doctor_without_torch():
    page = run_python(
        "import sys; sys.modules['torch'] = None; from wsis.doctor import report; print(report())"
    )
    assert "devices" in page
    for word in ("native module", "CPU paths", "CUDA archs", "DALI"):
        assert word in page


def test_doctor_names_the_cure(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    page = doctor.report()
    assert "missing: pip install '.[timm]'" in page
    assert "dali-cu13" in page


def test_every_public_operator_is_found():
    for name in wsis.ops.__all__:
        assert callable(getattr(wsis.ops, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = wsis.ops.nothing


def test_a_module_does_not_hide_its_function():
    importlib.import_module("wsis.ops.pixel_correlation")
    program = (
        "import wsis.ops.pixel_correlation; from wsis.ops import pixel_correlation as f; "
        "assert callable(f)"
    )
    run_python(program)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(p.name for p in ROOT.glob("csrc/cuda/*.cu")))
def test_kernels_do_not_spill(source, tmp_path):
    command = [NVCC, "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-arch=sm_90", "-Xptxas", "-v"]
    command += ["-cubin", str(ROOT / "csrc" / "cuda" / source), "-o", str(tmp_path / "cubin")]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [line for line in log.splitlines() if "spill" in line]
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), log
    kernels = (ROOT / "csrc" / "cuda" / source).read_text().count("__global__")
    assert len(spills) >= kernels


@pytest.mark.long
def test_cpu_only_build_says_so(tmp_path):
    for name in ("csrc", "wsis"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "WSIS_CUDA": "0"},
        check=True,
    )
    program = "from wsis.doctor import report; print(report())"
    page = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ).stdout  # fmt: skip
    assert "CPU only, because WSIS_CUDA=0 at build time" in page
