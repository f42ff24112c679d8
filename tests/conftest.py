"""What holds for all tests."""

from __future__ import annotations

import signal

import pytest

# Where others use the processors too, a process may stand still for a second. What is wrong is
# wrong each time that it is tried; what was only late is in time once the machine is.
_TRY_AGAIN = pytest.mark.flaky(reruns=4, reruns_delay=5, only_rerun="AssertionError")


def pytest_configure() -> None:
    """Let signals that ask to stop do so in whatever the tests start.

    A script that runs the tests in the background, or under nohup, has them ignored, and what is
    started inherits that.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Try tests that bound times up to five times, with pauses; each try is told as RERUN."""
    for item in items:
        if item.get_closest_marker("timing") is not None:
            item.add_marker(_TRY_AGAIN)
