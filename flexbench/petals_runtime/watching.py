"""Threads of a worker that watch what it consists of: an end of one part is the end of all."""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

_HEALTH_CHECK_INTERVAL_S = 0.5


def end_on_error(function: Callable[..., None]) -> Callable[..., None]:
    """A thread's function, whose failure ends the process and is not lost with the thread."""

    @functools.wraps(function)
    def guarded(*arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException:  # noqa: BLE001 - whatever it is, nobody would watch from here on
            traceback.print_exc()
            os._exit(1)

    return guarded


def watch(
    is_healthy: Callable[[], bool],
    problem: str,
    *,
    has_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Stay until a part of this worker dies, its p2pd daemon included; then end the process.

    Returns when `has_stopped`: then its parts end in good order.
    """
    import psutil

    descendants = psutil.Process().children(recursive=True)
    daemons = [process for process in descendants if _is_daemon(process)]
    while not has_stopped() and is_healthy() and all(_is_running(daemon) for daemon in daemons):
        time.sleep(_HEALTH_CHECK_INTERVAL_S)
    if has_stopped():
        return
    if is_healthy():
        problem = "its p2pd daemon ended"
    print(f"flexbench: {problem}", flush=True)  # noqa: T201 - standard output is the log here
    os._exit(1)


def _is_daemon(process: psutil.Process) -> bool:
    import psutil

    try:
        return str(process.name()).startswith("p2pd")
    except psutil.NoSuchProcess:
        return False


def _is_running(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
