"""Stands between flexbench and a server that it starts, and ends all of that server's processes.

Run as a script of its own, with nothing but the standard library: `service_watcher.py GRACE_S
COMMAND...`. Its standard input is a lifeline: when the other end closes, by whatever means, or on
SIGTERM, the server is ended, politely for GRACE_S seconds. Its standard error is the server's log.
On its standard output it reports, a line each, `started PID` or `error REASON`, and `ended CODE`, a
negative code being a signal's.

Servers start processes of their own, and do not always end them: those of vLLM and of DeepSpeed
outlive a main process that is killed. On Linux, orphans become this process's children, so that it
finds them wherever they went, another process group included, and collects them when they end.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# For what the first process has left, within the grace.
_LEFTOVER_GRACE_S = 2.0
_KILL_GRACE_S = 5.0
_LOOK_EVERY_S = 0.02


class Watcher:
    """Runs one command until it ends, or until somebody asks for its end."""

    def __init__(self, command: list[str], grace_s: float) -> None:
        self._command = command
        self._grace_s = grace_s
        self._is_asked_to_stop = False
        self._exit_code: int | None = None
        self._reader, self._writer = os.pipe()
        self._pid = 0

    def run(self) -> None:
        """Start the command, report how it fares, and leave none of its processes."""
        self._listen_to_signals()
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        if self._start():
            self._wait()
            self._end_all()

    def _listen_to_signals(self) -> None:
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._is_asked_to_stop = True

    def _start(self) -> bool:
        try:
            process = subprocess.Popen(  # noqa: S603 - the person's own command
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                process_group=0,
                preexec_fn=_be_killed_with_parent,  # there are no threads here
            )
        except OSError as error:
            _report(f"error {error.strerror or error}")
            return False
        self._pid = process.pid
        process.returncode = 0  # it is collected in here, not by subprocess
        _report(f"started {self._pid}")
        return True

    def _wait(self) -> None:
        """Until the command has ended, or is to end."""
        while self._exit_code is None and not self._is_asked_to_stop:
            readable, _, _ = select.select([self._reader, 0], [], [])
            if self._reader in readable:
                with suppress(BlockingIOError):
                    os.read(self._reader, 4096)
            if 0 in readable and not os.read(0, 4096):
                return
            self._collect()

    def _collect(self) -> None:
        """Take note of every child that has ended, our own or an orphan."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._pid:
                    self._exit_code = os.waitstatus_to_exitcode(status)
                    _report(f"ended {self._exit_code}")

    def _end_all(self) -> None:
        """The first process ends the others in order, if it can; what it leaves is told, too."""
        expires_at = time.monotonic() + self._grace_s
        if self._exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)
            _wait_until(self._has_ended, expires_at)
        self._signal_all(signal.SIGTERM)
        leftover_expires_at = min(expires_at, time.monotonic() + _LEFTOVER_GRACE_S)
        is_gone = _wait_until(self._is_gone, leftover_expires_at)
        kill_expires_at = time.monotonic() + _KILL_GRACE_S
        while not is_gone and time.monotonic() < kill_expires_at:
            self._signal_all(signal.SIGKILL)  # again and again: some may start others meanwhile
            is_gone = _wait_until(self._is_gone, time.monotonic() + 0.2)

    def _has_ended(self) -> bool:
        self._collect()
        return self._exit_code is not None

    def _is_gone(self) -> bool:
        self._collect()
        return not self._is_group_there() and not _descendants(os.getpid())

    def _is_group_there(self) -> bool:
        try:
            os.killpg(self._pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # what macOS says of those that nobody has collected yet
            return False
        return True

    def _signal_all(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, number)
        for pid in _descendants(os.getpid()):
            with suppress(ProcessLookupError, PermissionError):
                # Those of the group have it already; twice is an order to hurry, to some.
                if os.getpgid(pid) != self._pid:
                    os.kill(pid, number)


def _wait_until(check: Callable[[], bool], expires_at: float) -> bool:
    """Whether `check` was true before `expires_at`, on time.monotonic."""
    while not check():
        if time.monotonic() >= expires_at:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def _descendants(ancestor: int) -> list[int]:
    """Its children, theirs, and so on; on Linux only, elsewhere none."""
    children: dict[int, list[int]] = {}
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as stat:
                # The name, in parentheses, may have anything in it.
                fields = stat.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it has just ended
        children.setdefault(int(fields[1]), []).append(pid)
    found: list[int] = []
    waiting = [ancestor]
    while waiting:
        of_one = children.get(waiting.pop(), [])
        found += of_one
        waiting += of_one
    return found


def _be_killed_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """SIGCHLD is there to wake `select`."""


def _report(line: str) -> None:
    with suppress(OSError):  # flexbench has gone
        os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    Watcher(sys.argv[2:], float(sys.argv[1])).run()
