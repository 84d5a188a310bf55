"""Operators inside the worker processes that a DataLoader forks."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch


def run_forked(function: Any, *arguments: Any, times: int = 4) -> list[Any]:
    """``function(*arguments)``, several times, in two forked workers.

    The parent's torch has used its threads by then. They do not survive a fork, and arithmetic that
    waits for them never ends: one torch thread per worker, as DataLoader sets it. Ours must work.
    """
    with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
        return pool.starmap_async(function, [arguments] * times).get(timeout=120)
