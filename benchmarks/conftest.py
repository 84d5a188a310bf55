"""Options of the benchmarks."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--root", default=None, help="folder of photographs in VOC's layout")
