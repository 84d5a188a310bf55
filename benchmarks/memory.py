"""Memory of a program of its own, for benchmarks that start one for each way."""

from __future__ import annotations

import re
from pathlib import Path


def peak_so_far() -> float:
    """Largest resident memory of this program, MiB. The kernel's ru_maxrss would start from that
    of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
