"""Processes that prepare batches: one thread each; signals are left to the process that trains.

Ctrl-C, a batch system, systemd and torchrun signal a whole group of processes. A worker that died
of it would end training before it can save, so workers end for their parent only: when it sends
SIGTERM, and within seconds of its death (torch's watchdog).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wsis.data.memory import keep_freed_memory

_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back from this thread while it forks workers.

    They inherit that, so that none can die between its fork and `start_worker`. What comes
    meanwhile reaches this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker: int) -> None:
    """The `worker_init_fn` of a torch `DataLoader` whose workers are forked under `signals_held`.

    Args:
        worker: its number, which does not matter.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only waiting for a signal tells who sent it; handlers of Python are not told. The handler is
    # for threads older than this call, of a library that a spawned worker has imported already.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_for_parent, name="wsis-signals", daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()


def _end_for_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
