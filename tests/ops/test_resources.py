"""What every CUDA kernel costs on the device, as the compiler reports it, against the record.

``resources.json`` holds registers, stack and static shared memory per kernel for sm_90. A kernel
may become cheaper; for one that becomes dearer, and for a new one, the file has to be edited, by
hand or

    python tests/ops/test_resources.py [name.cu ...]    (needs nvcc; all files by default)

so that the change is seen in a review. Spills are not allowed at all. Another release of nvcc may
allocate differently: then only spills and the list of kernels are compared.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECORD = HERE / "resources.json"
SOURCES = sorted(p for p in (ROOT / "csrc/cuda").glob("*.cu") if "__global__" in p.read_text())
ARCH = "sm_90"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def nvcc_release() -> str:
    done = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    return re.search(r"release (\S+),", done.stdout)[1]


def demangle(names: list[str]) -> list[str]:
    """Readable names without the parameters, which say nothing that the templates do not."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    )
    return [shorten(line) for line in done.stdout.splitlines()]


def shorten(name: str) -> str:
    """``void wsis::cuda::(anonymous namespace)::f<float, 3>(float*)`` -> ``f<float, 3>``."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\(bool\)([01])", lambda m: "true" if m[1] == "1" else "false", name)
    name = re.sub(r"\((?:unsigned )?(?:int|long)\)(\d+)", r"\1", name)
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    return re.sub(r"(\w+::)+", "", name[:end])


def measure(source: Path) -> dict[str, dict[str, int]]:
    """Kernel -> registers, stack, shared, spills (bytes but for registers), from ``ptxas -v``."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={ARCH}", "-Xptxas", "-v", "-I", "csrc"]
    command += ["-c", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return parse(done.stderr)


def parse(report: str) -> dict[str, dict[str, int]]:
    parts = re.split(r"Compiling entry function '(\w+)' for", report)
    kernels = {}
    for name, text in zip(demangle(parts[1::2]), parts[2::2], strict=True):

        def number(pattern: str, text: str = text) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        assert name not in kernels, f"two kernels are called {name}"
        kernels[name] = {
            "registers": number(r"Used (\d+) registers"),
            "stack": number(r"(\d+) bytes stack frame"),
            "shared": number(r"(\d+) bytes smem"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        }
    return kernels


def one_line(match: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", match[1]) + "}"


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_kernels_cost_no_more_than_recorded(source):
    record = json.loads(RECORD.read_text())
    recorded = record["kernels"].get(source.name, {})
    measured = measure(source)
    assert measured, f"{source.name} has no kernels"
    assert {name for name, cost in measured.items() if cost["spills"]} == set()
    assert sorted(measured) == sorted(recorded), "record the kernels: see the top of this file"
    if nvcc_release() != record["nvcc"]:
        pytest.skip(f"recorded with nvcc {record['nvcc']}; spills and names compared")
    dearer = {
        f"{name}: {what}": (cost[what], recorded[name][what])
        for name, cost in measured.items()
        for what in ("registers", "stack", "shared")
        if cost[what] > recorded[name][what]
    }
    assert not dearer, "measured against recorded"


def test_record_names_no_file_that_is_gone():
    record = json.loads(RECORD.read_text())
    assert set(record["kernels"]) <= {source.name for source in SOURCES}
    assert all(cost["spills"] == 0 for file in record["kernels"].values() for cost in file.values())


SAMPLE = """
ptxas info    : Compiling entry function '_ZN4wsis1fIfLb1EEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN4wsis1fIfLb1EEEvPT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 28 registers, used 1 barriers, 8 bytes cumulative stack size, 1600 bytes smem
ptxas info    : Compiling entry function '_ZN4wsis1gEv' for 'sm_90'
ptxas info    : Used 6 registers, used 0 barriers
"""


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_report_is_read():
    assert parse(SAMPLE) == {
        "f<float, true>": {"registers": 28, "stack": 8, "shared": 1600, "spills": 16},
        "g": {"registers": 6, "stack": 0, "shared": 0, "spills": 0},
    }
    assert shorten("void a::(anonymous namespace)::f<b::C<(int)3>, (bool)0>(b::C<(int)3>*)") == (
        "f<C<3>, false>"
    )


if __name__ == "__main__":
    old = json.loads(RECORD.read_text())["kernels"]
    wanted = sys.argv[1:] or [source.name for source in SOURCES]
    kernels = {s.name: measure(s) if s.name in wanted else old.get(s.name) for s in SOURCES}
    kernels = {name: cost for name, cost in kernels.items() if cost}
    text = json.dumps({"arch": ARCH, "nvcc": nvcc_release(), "kernels": kernels}, indent=1)
    RECORD.write_text(re.sub(r"\{\s*(\"registers[^}]*?)\s*\}", one_line, text) + "\n")
    print(f"wrote {RECORD}")
