"""Ctrl-C while the database works."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from flexbench.core.errors import Interrupted

Handler = Callable[[int, FrameType | None], object]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_SAID_BY_DUCKDB = "interrupted"


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Interrupted where a signal has ended a query.

    DuckDB ends it with an error of its own that does not tell which signal came.
    """
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            handler = None if number is None else signal.getsignal(number)
            if number is not None and callable(handler):
                handlers[number] = handler
                signal.signal(number, _remembering(came, handler))
    try:
        yield
    except RuntimeError as error:
        if came and _SAID_BY_DUCKDB in str(error).lower():
            raise Interrupted(came[-1]) from error
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _remembering(came: list[int], handler: Handler) -> Handler:
    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler(number, frame)

    return handle
