"""Ordered work by threads: bounded, complete, and gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing

import pytest

from wsis.data.threads import in_threads


def ours() -> int:
    return sum(thread.name.startswith("wsis") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    def slow(n):
        time.sleep(0.002 * (n % 3))
        return n * n

    assert list(in_threads(slow, range(40), workers=workers)) == [n * n for n in range(40)]
    assert list(in_threads(slow, [], workers=workers)) == []
    assert ours() == 0


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_more_than_twice_the_workers_are_in_hand(workers):
    begun = fetched = most = 0

    def items():
        nonlocal begun, most
        for n in range(50):
            begun += 1
            most = max(most, begun - fetched)
            yield n

    for _ in in_threads(lambda n: n, items(), workers=workers):
        fetched += 1
    assert most <= 2 * workers + 1  # one has been handed out


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["function", "items"])
def test_an_error_comes_after_the_results_before_it(workers, where):
    closed = []

    def items():
        try:
            for n in range(20):
                if where == "items" and n == 7:
                    raise KeyError("seven")
                yield n
        finally:
            closed.append(True)

    def function(n):
        time.sleep(0.01 if n < 7 else 0)
        if where == "function" and n >= 7:
            raise KeyError("seven")
        return n

    got = []
    with pytest.raises(KeyError, match="seven"):
        got.extend(in_threads(function, items(), workers=workers))
    assert got == list(range(7))
    assert closed == [True]
    assert ours() == 0


def test_both_ways_at_once():
    """Ahead of the caller's thread and behind it; the middle runs in the caller's."""
    main = threading.current_thread()

    def middle():
        for n in in_threads(lambda n: (n, threading.current_thread()), range(30), workers=2):
            assert n[1] is not main
            yield n[0], threading.current_thread()

    for k, (n, at) in enumerate(in_threads(lambda pair: pair, middle(), workers=2)):
        assert n == k and at is main
    assert ours() == 0


@pytest.mark.parametrize("count", [0, 1, 5])
def test_left_early_nothing_stays(count):
    began = []
    with closing(in_threads(began.append, iter(range(10**9)), workers=2)) as results:
        for _ in range(count):
            next(results)
    assert ours() == 0 and len(began) <= count + 4


def test_ctrl_c_ends_all_of_it(tmp_path):
    script = """
        import signal, threading, time
        from wsis.data.threads import in_threads

        # Tests may run in the background, where a shell has Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def slow(n):
            time.sleep(0.05)
            return n

        def upstream():
            for n in in_threads(slow, iter(range(10**9)), workers=2):
                yield n

        try:
            for n in in_threads(slow, upstream(), workers=2):
                print(n, flush=True)
        except KeyboardInterrupt:
            left = [t.name for t in threading.enumerate() if t.name.startswith("wsis")]
            print("interrupted", left, flush=True)
    """
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert program.stdout.readline() == "0\n"
        program.send_signal(signal.SIGINT)
        rest, _ = program.communicate(timeout=60)
    finally:
        program.kill()
    assert rest.splitlines()[-1] == "interrupted []"
    assert program.returncode == 0
