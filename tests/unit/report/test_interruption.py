"""Signals that come while a query runs."""

from __future__ import annotations

import os
import signal
import threading

import duckdb
import pytest

from flexbench.core.errors import Interrupted
from flexbench.report.interruption import stoppable

ENDLESS = "SELECT count(*) FROM range(100000000) a, range(1000) b WHERE a.range * b.range % 7 = 3"


class StopError(Exception):
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_query_and_is_named(number):
    def stop(_number, _frame):
        raise StopError

    before = signal.signal(number, stop)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(Interrupted) as caught, stoppable():
            duckdb.connect(config={"threads": 1}).execute(ENDLESS).fetchall()
        assert signal.getsignal(number) is stop
    finally:
        timer.cancel()
        signal.signal(number, before)
    assert caught.value.signal_number == number
    assert caught.value.exit_code == 128 + number


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="something else"), stoppable():
        raise RuntimeError("something else")
    handler = signal.getsignal(signal.SIGINT)
    with stoppable():
        assert signal.getsignal(signal.SIGINT) is not handler
    assert signal.getsignal(signal.SIGINT) is handler
