"""Several processes on this machine, none of which outlives the others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from wsis.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_PR_SET_PDEATHSIG = 1  # of prctl.h


def launch(arguments: list[str], processes: int) -> int:
    """Run ``wsis ARGUMENTS`` in several processes; this one becomes their torchrun.

    When a process dies torchrun ends the others. A signal to this process goes to all of them: the
    first SIGINT or SIGTERM lets them save (what takes longer than 30 seconds is killed).

    Args:
        arguments: of the command line, as the processes shall read them.
        processes: one for each GPU, or on the CPU as many as wanted.

    Returns:
        The exit code: 0, that of the process that failed first (1 where it was killed), or 130
        after a signal.

    Raises:
        InputError: called by a process that was itself launched.
    """
    if "RANK" in os.environ:
        raise InputError("--gpus starts processes itself; leave it out under torchrun")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # By address: names of containers often do not resolve, which --standalone needs.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    # Threads are shared out: torchrun would set one, which is right for GPUs only.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        run.main([*options, f"--nproc_per_node={processes}", "-m", "wsis", *arguments])
    except ChildFailedError as error:
        print(f"wsis: error: {_first_line(error)}", file=sys.stderr)
        return max(error.get_first_failure()[1].exitcode, 0) or 1
    except SignalException:
        return 130
    return 0


def _first_line(error: ChildFailedError) -> str:
    """Which process failed and how, without torchrun's table."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"process {rank} {how}; the others were ended"


def end_with_parent() -> None:
    """Ask for SIGTERM when the process that started this one dies: no rank trains on as an orphan.

    Linux only; elsewhere it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
