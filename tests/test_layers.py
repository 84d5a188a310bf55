"""A room imports only rooms on lower floors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "wsis"
FLOORS = ["ops", "data", "models", "pseudo", "losses", "engine", "offline", "prepare", "evaluate"]
FLOORS += ["bench", "commands"]
# config describes a run: it names the method's weights and is read from the engine upwards.
SOURCES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    """Second components of all `wsis.X` imports of a file."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts == ["wsis"]:
                rooms |= {alias.name for alias in node.names}
            elif parts[0] == "wsis":
                rooms.add(parts[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms |= {parts[1] for parts in names if parts[0] == "wsis" and len(parts) > 1}
    return rooms


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_lower_floors(path):
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    ground = {"errors", "types", "global_batch", "_C", "_lattice", "_lattice_cuda"}
    allowed = {*ground, *FLOORS[: floor + 1]}
    if floor >= FLOORS.index("engine"):
        allowed.add("config")
    if floor >= FLOORS.index("bench"):
        allowed |= {"recipes", "doctor"}
    assert imported_rooms(path) <= allowed


def test_every_room_is_on_a_floor():
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert rooms == {*FLOORS, "compat"}


@pytest.mark.parametrize("path", sorted((ROOT / "ops").glob("*.py")), ids=lambda p: p.name)
def test_operators_need_torch_and_numpy_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] not in {"torchvision", "nvidia", "PIL", "timm"}
