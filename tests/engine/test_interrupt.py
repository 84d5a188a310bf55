from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from wsis.engine.interrupt import NOTICE, SIGNALS, StopRequest


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


def test_a_signal_passed_on_is_one_request(capfd):
    with StopRequest(grace=0.2) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert capfd.readouterr().err.encode() == NOTICE
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


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


def test_the_notice_goes_past_streams_that_may_be_busy(monkeypatch, capfd):
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    with StopRequest() as stop:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", Busy())
            patch.setattr(sys, "stdout", Busy())
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert capfd.readouterr().err.encode() == NOTICE
