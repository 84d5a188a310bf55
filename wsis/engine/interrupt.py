"""Stop politely: the first SIGINT or SIGTERM asks for a stop, the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeAlias

_Handler: TypeAlias = "Callable[[int, FrameType | None], Any] | int | signal.Handlers | None"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nsaving, then stopping; once more to stop at once\n"


class StopRequest:
    """Context in which the first signal sets ``requested`` and the second is a KeyboardInterrupt.

    Handlers are installed in the main thread only (Python allows no other); in another thread the
    context does nothing. Processes forked inside it ignore SIGINT, so that Ctrl-C lets the current
    step end, and die of SIGTERM as usual (data workers ignore it too: `wsis.data.workers`).

    Args:
        grace: seconds after the first signal in which others are the same request: who started
            this process may pass on a signal that went to it and to this one alike.

    Example:
        >>> with StopRequest() as stop:
        ...     for _ in range(3):
        ...         if stop.requested:
        ...             break

    Attributes:
        requested: True once a signal came.
        signum: number of the signal that came, or None.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self.grace = grace
        self.requested = False
        self.signum: int | None = None
        self._previous: dict[int, _Handler] = {}
        self._pid = 0
        self._since = 0.0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._pid = os.getpid()
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self.requested:
            if time.monotonic() - self._since >= self.grace:
                raise KeyboardInterrupt
            return
        self.requested, self.signum, self._since = True, signum, time.monotonic()
        # Not print: a handler may run inside another write to the same buffered stream.
        os.write(2, NOTICE)
