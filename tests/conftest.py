"""What holds for all tests."""

from __future__ import annotations

import signal


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
