"""Two ways of doing the same, in turns: their ratio holds where the speed of a machine drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def paired_ratio(other: Callable[[], object], ours: Callable[[], object], rounds: int = 7) -> float:
    """Median over the rounds of the CPU time of ``other`` over that of ``ours``."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return round(statistics.median([seconds(other) / seconds(ours) for _ in range(rounds)]), 2)
