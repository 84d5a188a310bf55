"""wsis.ops._lattice_cuda on an emulated module, and what its checks share."""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import torch

from tests import emulator
from wsis import _lattice
from wsis.errors import InputError
from wsis.ops import _lattice_cuda


def empty(shape, dtype):
    """Memory that shows when it is used before it is written."""
    kind = getattr(torch, dtype)
    garbage = torch.nan if kind.is_floating_point else 251 if kind == torch.uint8 else -7
    return torch.full(shape, garbage, dtype=kind)


@contextmanager
def emulated(module):
    """The CUDA driver runs a module of the emulator, on CPU tensors."""
    with mock.patch.object(_lattice_cuda, "cuda_function", partial(getattr, module)):
        yield


def flattened(value, flat):
    """A copy of nested lists with numbers for the arrays, which go to ``flat``."""
    if isinstance(value, list):
        return [flattened(item, flat) for item in value]
    flat.append(value)
    return len(flat) - 1


def restored(value, flat):
    return [restored(v, flat) for v in value] if isinstance(value, list) else flat[value]


class Nested:
    """A function whose arrays, though in lists, the emulator sees."""

    def __init__(self, function, tree):
        self.function, self.tree = function, tree
        self.__module__ = function.__module__

    def __call__(self, *flat):
        return self.function(*restored(self.tree, flat))


@contextmanager
def counted(module):
    """As `emulated`, on a "count" module; gives the list of (launches, arguments) of all calls."""
    calls = []

    def pick(name):
        function = getattr(module, name)
        if not name.endswith("_cuda"):
            return function

        def call(*arguments):
            flat = []
            tree = flattened(list(arguments), flat)
            calls.append((emulator.count(Nested(function, tree), *flat), arguments))

        return call

    with (
        mock.patch.object(_lattice_cuda, "cuda_function", pick),
        mock.patch.object(_lattice_cuda, "view", lambda tensor: tensor.detach().numpy()),
    ):
        yield calls


def image_of(size, batch=1, seed=0, channels=3, dtype="uint8"):
    """``[B, c, H, W]``: flat regions, edges and noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    planes = [
        128
        + 90 * np.sign(np.sin(0.31 * (k + 1) * x + 0.2 * b) * np.cos(0.23 * y - k))
        + (x > size[1] // 2) * random.normal(0, 12, size)
        for b in range(batch)
        for k in range(channels)
    ]
    image = np.clip(np.reshape(planes, (batch, channels, *size)), 0, 255)
    return torch.from_numpy(image.astype(dtype))


def values_of(*shape, seed=0, dtype="float32"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=getattr(torch, dtype))


def close(got, expected, tolerance):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max().item() <= tolerance * scale


def both(function, *arguments, **keywords):
    """The same lattice on the CPU and, emulated, on CUDA; with the vertices of the first."""
    expected = getattr(_lattice, function)(*arguments, empty, **keywords)
    got = getattr(_lattice_cuda, function)(*arguments, empty, **keywords)
    assert got.vertices == expected.vertices
    assert (got.dims, got.batch) == (expected.dims, expected.batch)
    return got, expected


def run_checks(module, checks, patient=True):
    """Runs all checks on an emulated module; does not stop at a wrong value if `patient`."""
    wrong = []
    with emulated(module):
        for check in checks:
            try:
                check()
            except (AssertionError, InputError):
                if not patient:
                    raise
                wrong.append(check)
    assert not wrong


def survives(path, all_checks):
    """Whether all checks pass in two thread orders; in a process of its own, which may crash."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            signal.alarm(120)
            torch.set_num_threads(1)
            module = emulator.load(path)
            for os.environ["WSIS_EMULATOR_SEED"] in ("0", "1"):
                run_checks(module, all_checks(), patient=False)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0
