"""Stop politely: the first SIGINT or SIGTERM asks for a stop, the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeAlias

_Handler: TypeAlias = "Callable[[int, FrameType | None], Any] | int | signal.Handlers | None"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nsaving, then stopping; once more to stop at once\n"


class StopRequest:
    """Context in which the first signal sets ``requested`` and the second is a KeyboardInterrupt.

    Handlers are installed in the main thread only (Python allows no other); in another thread the
    context does nothing. Processes forked inside it (data workers) ignore SIGINT, so that Ctrl-C
    lets the current step end, and die of SIGTERM as usual.

    Example:
        >>> with StopRequest() as stop:
        ...     for _ in range(3):
        ...         if stop.requested:
        ...             break

    Attributes:
        requested: True once a signal came.
        signum: number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signum: int | None = None
        self._previous: dict[int, _Handler] = {}
        self._pid = 0

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
            raise KeyboardInterrupt
        self.requested, self.signum = True, signum
        # Not print: a handler may run inside another write to the same buffered stream.
        os.write(2, NOTICE)
