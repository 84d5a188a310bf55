"""Fixtures shared by all tests: golden vectors, real photographs, the manifest's tolerances."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("WSIS_SHARED", HERE.parent.parent / "shared"))
GOLDEN_FOLDERS = (SHARED / "golden", HERE / "golden")
_compared: set[str] = set()


def _golden_path(name: str) -> Path | None:
    for folder in GOLDEN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    return None


@pytest.fixture(scope="session")
def golden_manifest() -> dict[str, dict]:
    """File name -> its entry in the manifest (operator, params, arrays, tolerance, quirks)."""
    path = _golden_path("manifest.json")
    if path is None:
        pytest.skip("no golden vectors: neither the shared folder nor tests/golden has them")
    return {entry["file"]: entry for entry in json.loads(path.read_text())["files"]}


@pytest.fixture(scope="session")
def golden(golden_manifest):
    """Load one golden file by name: ``golden("rtc_norms_n2_16x16") -> NpzFile``."""

    def load(name: str) -> np.lib.npyio.NpzFile:
        file = name if name.endswith(".npz") else f"{name}.npz"
        path = _golden_path(file)
        if path is None:
            pytest.skip(f"golden file {file} is not in this clone (it lies in the shared folder)")
        return np.load(path)

    return load


@pytest.fixture(scope="session")
def golden_json(golden_manifest):
    """Load a JSON file that lies beside the golden vectors."""

    def load(name: str) -> dict:
        path = _golden_path(name)
        if path is None:
            pytest.skip(f"golden file {name} is not in this clone")
        return json.loads(path.read_text())

    return load


@pytest.fixture(scope="session")
def golden_spec(golden_manifest):
    """Manifest entry by name."""
    return lambda name: golden_manifest[name if name.endswith(".npz") else f"{name}.npz"]


@pytest.fixture(scope="session")
def assert_golden():
    """Compare one array by the manifest's rule: ``assert_golden(spec, name, actual, expected)``."""

    def check(spec: dict, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        _compared.add(spec["file"])
        actual = np.asarray(actual)
        assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
        tolerance = spec["tolerance"]
        role = spec["arrays"].get(name, {}).get("role", "output")
        if expected.dtype.kind in "iub":
            allowed = tolerance.get("max_label_mismatch_fraction", 0.0)
            differing = float(np.mean(actual.astype(np.int64) != expected.astype(np.int64)))
            assert differing <= allowed, f"{name}: {differing:.2%} of the labels differ"
            return
        error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        scale = float(np.nanmax(np.abs(expected))) if expected.size else 0.0
        if role == "grad" and "gradient_rel_to_absmax" in tolerance:
            bound = tolerance["gradient_rel_to_absmax"] * scale
            share = float(np.mean(error > bound))
            allowed = tolerance.get("gradient_outlier_fraction", 0.0)
            assert share <= allowed, f"{name}: {share:.3%} entries off, max {error.max():.3g}"
        elif "relative_to_absmax" in tolerance:
            bound = tolerance["relative_to_absmax"] * scale
            assert error.max(initial=0) <= bound, f"{name}: off by {error.max():.3g} > {bound:.3g}"
        else:
            bound = tolerance["atol"] + tolerance.get("rtol", 0.0) * np.abs(expected)
            worst = float((error - bound).max(initial=-1))
            assert worst <= 0, f"{name}: off by {error.max():.3g}, {worst:.3g} past its bound"

    return check


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real photographs (``voc-animals``, ``coco-mini``)."""
    if not (SHARED / "data" / "voc-animals").is_dir():
        pytest.skip("the shared photographs are not beside this clone")
    return SHARED / "data"


def pytest_sessionfinish(session) -> None:
    """A worker of pytest-xdist tells what it compared."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compared"] = sorted(_compared)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """And its master listens."""
    _compared.update(getattr(node, "workeroutput", {}).get("compared", ()))


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how many golden files were really compared."""
    terminalreporter.write_line(f"golden files compared: {len(_compared)}")
