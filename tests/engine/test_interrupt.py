from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from wsis.engine.interrupt import NOTICE, SIGNALS, StopRequest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_asks_and_second_interrupts(number, capfd):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signum == number
        assert capfd.readouterr().err.encode() == NOTICE
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(n) for n in SIGNALS]

    def fail():
        with StopRequest():
            assert [signal.getsignal(n) for n in SIGNALS] != before
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_harmless_in_another_thread():
    before = [signal.getsignal(n) for n in SIGNALS]
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((stop.requested, [signal.getsignal(n) for n in SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize(("number", "survives"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_forked_workers_neither_ask_nor_hang(number, survives, capfd):
    ready, done = os.pipe()
    with StopRequest() as stop:
        pid = os.fork()
        if pid == 0:
            os.write(done, b"x")
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                time.sleep(0.01)
            os._exit(17)
        os.read(ready, 1)
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        assert not stop.requested
    os.close(ready), os.close(done)
    assert os.waitstatus_to_exitcode(status) == (17 if survives else -signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_a_signal_within_a_print_does_no_harm():
    script = """
        import sys
        from wsis.engine.interrupt import StopRequest
        with StopRequest() as stop:
            print("ready", flush=True)
            while not stop.requested:
                print("x" * 500, file=sys.stderr)
        print("saved")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert out == "saved\n"
    assert process.returncode == 0
