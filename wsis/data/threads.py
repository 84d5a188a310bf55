"""A list of images worked on by threads: in order, with a bounded number of them in hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(
    function: Callable[[T], R], items: Iterable[T], *, workers: int
) -> Generator[R, None, None]:
    """``map(function, items)`` by threads, at most ``2 * workers`` items begun and not fetched.

    Items are taken in the caller's thread. So a list is read ahead of the caller, and where the
    items are themselves results that the caller's thread computes, `function` works behind it.

    An error comes where a plain loop would raise it: after the results of the items before it.
    Whatever ends the generator (its end, an error, Ctrl-C, ``close()``), its threads have ended
    and `items`, where it is a generator, is closed before it returns.

    Args:
        function: of one item; called in several threads at a time.
        items: taken one at a time.
        workers: threads; 0 calls `function` in this one, when a result is asked for.

    Yields:
        ``function(item)``, in the order of the items.

    Example:
        >>> list(in_threads(str.upper, "abc", workers=2))
        ['A', 'B', 'C']
    """
    try:
        if workers == 0:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="wsis")
        try:
            begun: deque[Future[R]] = deque()
            source, failed = iter(items), None
            while True:
                try:
                    item = next(source)
                except StopIteration:
                    break
                except Exception as error:  # its turn comes after the items before it
                    failed = error
                    break
                begun.append(pool.submit(function, item))
                del item  # its memory belongs to the thread
                if len(begun) >= 2 * workers:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
            if failed is not None:
                raise failed
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    finally:
        if isinstance(items, Generator):
            items.close()
