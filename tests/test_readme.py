"""README is true: its tables come from results, its commands and links exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from wsis.cli import COMMANDS
from wsis.recipes import RECIPES, get_recipe

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results():
    assert tables().rewrite(TEXT) == TEXT
    assert "<!-- table: confusion -->" in TEXT


def test_pictures_and_files_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path


def test_commands_and_recipes_exist():
    for name in re.findall(r"(?:^|`|&& )wsis ([a-z]+)", TEXT, flags=re.MULTILINE):
        assert name in COMMANDS, name
    for name in re.findall(r"--recipe ([a-z_0-9]+)", TEXT):
        assert name in RECIPES, name


def test_ci_runs_the_test_command():
    command = TEXT.split("<!-- test command -->")[1].split("<!-- end -->")[0]
    assert "pytest" in command
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_build_and_say_what_differs(name):
    assert get_recipe(name).as_dict()["optim"]["epochs"] > 0
    assert RECIPES[name].__doc__
