"""The fork server of multiprocessing: started safely, and stopped when nobody needs it any more.

multiprocessing itself leaves it, and the resource tracker beside it, running until the program
ends, and has only private means to stop them; all use of those is in here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_num_users = 0
_has_started: set[str] = set()
_TRACKER_GRACE_S = 0.5


@contextmanager
def fork_server(preload: Sequence[str]) -> Iterator[None]:
    """A running fork server that has imported the modules `preload`; ended with the last user.

    What somebody else had started before, server or resource tracker, is used and left alone.
    """
    global _num_users, _has_started
    if _num_users == 0:
        _has_started = _start(preload)
        _adopt_orphans(True)
    _num_users += 1
    try:
        yield
    finally:
        _num_users -= 1
        if _num_users == 0:
            _adopt_orphans(False)
            if "server" in _has_started:
                _stop_server()
            if "tracker" in _has_started:
                _stop_tracker()


def _start(preload: Sequence[str]) -> set[str]:
    """Start what does not run yet; returns which of 'tracker' and 'server' that was."""
    started = set()
    if getattr(resource_tracker._resource_tracker, "_fd", None) is None:
        started.add("tracker")
        # It removes the semaphores of killed workers, but not without complaining.
        with quiet_output():
            resource_tracker.ensure_running()
    if getattr(forkserver._forkserver, "_forkserver_pid", None) is None:
        started.add("server")
        forkserver.set_forkserver_preload(list(preload))
        # It ignores Ctrl-C only after its imports, and would die of one that comes before.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return started


def kill_fork_server() -> None:
    """End the fork server at once; what waits for an answer of it gets an EOFError."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _stop_server() -> None:
    stop = getattr(forkserver._forkserver, "_stop", None)
    if stop is None:
        return  # another Python, which will end it when it ends
    # It would end by itself now, but takes a second or more to unload what it has imported.
    kill_fork_server()
    with suppress(ChildProcessError):
        stop()


def _stop_tracker() -> None:
    stop = getattr(resource_tracker._resource_tracker, "_stop", None)
    if stop is None:
        return
    # It removes what killed workers have left, and ends. Should it not, we do not wait for it.
    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    thread.join(_TRACKER_GRACE_S)


@contextmanager
def quiet_output() -> Iterator[None]:
    """Send what is printed to nowhere, by file descriptor, so that C libraries are quiet too."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, nowhere):
            os.close(descriptor)


def end_with_parent() -> None:
    """Let this process be killed as soon as its parent ends; only on Linux, elsewhere nothing.

    For the case that the parent is killed: the fork server notices that by itself, but not while it
    is still importing.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _adopt_orphans(adopt: bool) -> None:
    """Become the parent of descendants whose own parent has ended; only on Linux.

    Otherwise they go to the system's first process, which may take a second to clear away what a
    killed worker leaves, or never do it, as in many containers.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)
