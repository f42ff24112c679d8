"""Ctrl-C and SIGTERM, noticed where it is safe to stop."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from flexbench.core.errors import Interrupted

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class SignalWatch:
    """While its `with` block is open, signals that ask to stop do not raise anywhere.

    They make `wakeup` readable, and `raise_if_stopped` raise Interrupted; leaving the block does,
    too, so that none is lost. Starting and ending of processes is thus never cut in half. Outside
    of the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.wakeup: Connection
        self.wakeup, self._writer = multiprocessing.Pipe(duplex=False)
        self.on_stop: Callable[[], None] | None = None
        """Called when a signal comes, to end what cannot wait for `wakeup` to be readable."""
        self._number: int | None = None
        self._is_reported = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Under nohup, say, SIGHUP is ignored, and is to stay so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.wakeup.close()
        self._writer.close()
        if exc_type is None and not self._is_reported:
            self.raise_if_stopped()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._number is None:  # one is enough, and a pipe has an end
            self._number = number
            self._writer.send(number)
            if self.on_stop is not None:
                self.on_stop()

    def raise_if_stopped(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._number is not None:
            self._is_reported = True
            raise Interrupted(self._number)
