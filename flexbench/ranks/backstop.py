"""Ends a rank that cannot end by itself."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from flexbench.core.errors import FlexbenchError, Interrupted, RunError
from flexbench.ranks.launch import Launch

if TYPE_CHECKING:
    from flexbench.ranks.watch import LostRank

# Launchers give the other ranks half a second when one has ended: by then the record is written.
_RECORD_S = 0.2
# How long a rank gets to end in order, before it is ended where it stands.
_GRACE_S = 3.0
_LOOK_EVERY_S = 1.0
_STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Backstop:
    """Ends this process when it cannot end by itself.

    A rank that waits for another one does so within torch, where neither a signal's handler nor an
    exception gets through. Within its `with` block, a lost rank is told at once, and this process
    ended a little later, if it has not by then; so it is after a signal to stop, and when the
    launcher has gone.
    """

    def __init__(self, launch: Launch, give_up: Callable[[FlexbenchError], None]) -> None:
        """`give_up` is called with the reason before this process is ended; see `also`."""
        self._has_launcher = launch.launcher not in ("none", "options")
        self._parent = os.getppid()
        self._give_up = [give_up]
        self._lost: LostRank | None = None
        self._is_over = threading.Event()
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> Backstop:
        self._previous_fd = -1
        self._reader.settimeout(_LOOK_EVERY_S)
        if threading.current_thread() is threading.main_thread():
            self._writer.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(
                self._writer.fileno(), warn_on_full_buffer=False
            )
        self._listener = threading.Thread(target=self._listen, name="backstop", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()
        self._listener.join(timeout=1)
        self._reader.close()

    def also(self, give_up: Callable[[FlexbenchError], None]) -> None:
        """Call this, too, before this process is ended."""
        self._give_up.append(give_up)

    def on_lost(self, lost: LostRank) -> None:
        """Another rank is lost: see to it that this one ends, and say so now."""
        self._lost = lost
        threading.Thread(target=self._end_later, args=(self.error(),), daemon=True).start()
        _say(f"Error: {lost.message}")

    def error(self) -> FlexbenchError:
        """The error for a lost rank, which has been shown, with that rank's exit code."""
        assert self._lost is not None
        error = self._lost.error()
        error.is_shown = True
        return error

    @property
    def lost(self) -> LostRank | None:
        """The rank that was lost, if one was."""
        return self._lost

    def _listen(self) -> None:
        while not self._is_over.is_set():
            try:
                numbers = self._reader.recv(16)
            except TimeoutError:
                if self._has_launcher and os.getppid() != self._parent:
                    self._end_later(RunError("the launcher that started this rank has gone"))
                continue
            except OSError:
                return
            if not numbers:
                return
            for number in numbers:
                if number in _STOPPING:
                    self._end_later(Interrupted(number))

    def _end_later(self, error: FlexbenchError) -> None:
        if self._is_over.wait(_RECORD_S):
            return
        for give_up in self._give_up:
            give_up(error)
        if self._is_over.wait(_GRACE_S):
            return
        if not error.is_shown:
            _say(error.message if isinstance(error, Interrupted) else f"Error: {error.message}")
        os._exit(error.exit_code)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # perhaps nobody reads it any more
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
