"""How one rank among several behaves towards people, its launcher, and the other ranks."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flexbench.core.environment import num_cpus
from flexbench.core.errors import FlexbenchError, Interrupted, RunError
from flexbench.dist.launch import Launch

if TYPE_CHECKING:
    from rich.console import Console

    from flexbench.dist.watch import LostRank

# How long rank 0 gets to say what is wrong on all ranks.
_PATIENCE_S = 3.0
# How long a rank gets to end in order, before it is ended where it stands.
_GRACE_S = 3.0


@contextmanager
def first_rank_speaks(launch: Launch) -> Iterator[None]:
    """While options are checked: a mistake in them is the same on every rank, and told once.

    Launchers end all ranks as soon as one has ended; so the others wait until rank 0 has spoken.
    """
    try:
        yield
    except FlexbenchError as error:
        if launch.rank > 0 and not isinstance(error, Interrupted):
            try:
                time.sleep(_PATIENCE_S)
            except (Interrupted, KeyboardInterrupt):
                error.is_shown = True
        raise


def open_console(launch: Launch, *, stderr: bool = False) -> Console:
    """Where this rank prints: only rank 0 has anything to say."""
    from rich.console import Console

    # Under Open MPI standard output is a terminal of no size that goes to who knows where.
    is_terminal = False if launch.launcher == "openmpi" else None
    width = None if os.environ.get("COLUMNS") or is_terminal is None else 80
    return Console(stderr=stderr, force_terminal=is_terminal, width=width, quiet=launch.rank != 0)


def num_threads(launch: Launch) -> int:
    """Threads for computing: this rank's share of the CPUs it may use.

    Torch would take a single one when it sees certain launchers' variables.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cpus = num_cpus()
    if cpus * launch.local_world_size <= (os.cpu_count() or 1):
        return cpus  # the launcher has bound each rank to CPUs of its own
    return max(1, cpus // launch.local_world_size)


class Backstop:
    """Ends this process when it cannot end by itself.

    A rank that waits for another one does so within torch, where neither a signal's handler nor an
    exception gets through. Within its `with` block, a lost rank is told at once, and this process
    ended a little later, if it has not by then; and so it is after SIGINT or SIGTERM.
    """

    def __init__(self, give_up: Callable[[FlexbenchError], None]) -> None:
        """`give_up` is called with the reason just before this process is ended."""
        self._give_up = give_up
        self._lost: LostRank | None = None
        self._is_over = threading.Event()
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> Backstop:
        self._previous_fd = -1
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

    def on_lost(self, lost: LostRank) -> None:
        """Another rank is lost: say so now, and see to it that this one ends."""
        self._lost = lost
        sys.stderr.write(f"Error: {lost.message}\n")
        sys.stderr.flush()
        threading.Thread(target=self._end_later, args=(self.error(),), daemon=True).start()

    def error(self) -> RunError:
        """The error for a lost rank, which has been shown."""
        assert self._lost is not None
        error = RunError(self._lost.message)
        error.is_shown = True
        return error

    @property
    def lost(self) -> LostRank | None:
        """The rank that was lost, if one was."""
        return self._lost

    def _listen(self) -> None:
        stopping = (signal.SIGINT, signal.SIGTERM)
        while numbers := self._reader.recv(16):
            for number in numbers:
                if number in stopping:
                    self._end_later(Interrupted(number))

    def _end_later(self, error: FlexbenchError) -> None:
        if self._is_over.wait(_GRACE_S):
            return
        self._give_up(error)
        os._exit(error.exit_code)
