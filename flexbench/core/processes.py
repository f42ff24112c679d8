"""The processes of a run: started together, watched all the time, and always ended.

Three rules make this hold even when processes are killed:

* No locks or events are shared between processes, because one that is killed while it holds a lock
  stops all others for ever. Each worker has two pipes of its own: orders to it, reports from it.
* The orders pipe is also a lifeline. When the parent goes away, by whatever means, the pipe closes
  and the worker ends its whole process group.
* A worker leads a process group, so that the daemons which libraries start on their own are ended
  with it, by the group's id.

Workers come from a fork server that has already imported the heavy libraries: that cost is paid
once, not once a process. Workers that need none of them are forked from this process itself, which
takes milliseconds; that is for commands that have started no threads by then.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flexbench.core.errors import DeadlineError, WorkerError
from flexbench.core.fork_server import fork_server, kill_fork_server
from flexbench.core.signals import SignalWatch

# How long the processes of a worker get after SIGTERM. What a daemon leaves when it is killed lies
# in the scratch folder, so there is no need for more.
_TERM_GRACE_S = 0.5
# SIGKILL cannot be refused; this is for the system to clear away what it ended.
_KILL_GRACE_S = 0.5
_LOG_LINES_SHOWN = 15
_LONGEST_WAIT_S = 3600.0


@dataclass(frozen=True)
class Ready:
    """The worker is prepared and waits for its release."""


@dataclass(frozen=True)
class Item:
    """Something the worker has found out or measured."""

    payload: Any


@dataclass(frozen=True)
class Finished:
    """The worker's function returned. Nothing follows."""


@dataclass(frozen=True)
class Failed:
    """The worker's function raised; `summary` is the exception in one line."""

    summary: str


Message = Ready | Item | Finished | Failed


class Deadline:
    """A point in time by which something must have happened.

    `describe` is called when it has passed, to say what was waited for and which option changes
    the time-out.
    """

    def __init__(self, seconds: float, describe: Callable[[], str]) -> None:
        self._expires_at = time.monotonic() + seconds
        self._describe = describe

    def remaining_s(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self._expires_at - time.monotonic())

    def error(self) -> DeadlineError:
        """The error to raise when the time is over."""
        return DeadlineError(self._describe())


# --- the worker's side -------------------------------------------------------------------------


class ReadySignal:
    """`set()` tells the parent that this worker is prepared, like multiprocessing.Event.set."""

    def __init__(self, reports: Connection) -> None:
        self._reports = reports

    def set(self) -> None:
        """Report that this worker is prepared."""
        self._reports.send(Ready())


class ReleaseSignal:
    """`wait()` returns when the parent releases this worker, like multiprocessing.Event.wait.

    `payload` is then what the parent gave with the release.
    """

    def __init__(self) -> None:
        self._released = threading.Event()
        self.payload: Any = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the release; False when `timeout` seconds passed without it."""
        return self._released.wait(timeout)

    def clear(self) -> None:
        """Let the next `wait` block until the worker is released again."""
        self._released.clear()

    def release(self, payload: Any) -> None:
        """Let `wait` return."""
        self.payload = payload
        self._released.set()


class ReportQueue:
    """`put()` sends an observation to the parent, like multiprocessing.Queue.put."""

    def __init__(self, reports: Connection) -> None:
        self._reports = reports

    def put(self, item: Any) -> None:
        """Send `item`, which must be picklable."""
        self._reports.send(Item(item))


@dataclass(frozen=True)
class WorkerChannel:
    """What a worker's function gets as its first argument to talk to the parent."""

    ready: ReadySignal
    release: ReleaseSignal
    queue: ReportQueue


def _worker_main(
    task: bytes,
    orders: Connection,
    reports: Connection,
    title: str,
    log_path: str,
    scratch_folder: str,
    inherited: Sequence[Connection] = (),
) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # A forked worker has copies of the parent's ends of all pipes: none would ever seem closed.
    for pipe in inherited:
        pipe.close()
    _redirect_output(log_path)
    _redirect_temporary_files(scratch_folder)
    _set_title(title)
    release = ReleaseSignal()
    threading.Thread(target=_obey, args=(orders, release), name="lifeline", daemon=True).start()
    channel = WorkerChannel(ReadySignal(reports), release, ReportQueue(reports))
    try:
        # Unpacked here, not by multiprocessing: an error in it belongs into the log, too.
        target, args = pickle.loads(task)  # noqa: S301 - from our parent, through its pipe
        target(channel, *args)
    except BaseException as error:  # noqa: BLE001 - the parent has to hear of anything
        traceback.print_exc()
        sys.stderr.flush()
        summary = traceback.format_exception_only(error)[-1].strip()
        reports.send(Failed(summary))
        os._exit(1)  # no exit handlers: other people's threads would hang in them or complain
    reports.send(Finished())
    os._exit(0)


def _obey(orders: Connection, release: ReleaseSignal) -> None:
    """Pass on the release; when the parent is gone, end this worker and all that it started."""
    try:
        while True:
            release.release(orders.recv())
    except (EOFError, OSError):
        os.killpg(os.getpgrp(), signal.SIGTERM)


def _redirect_output(log_path: str) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _redirect_temporary_files(folder: str) -> None:
    # Processes that are killed cannot clean up: what they leave lies where the parent removes it.
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = folder


def _set_title(title: str) -> None:
    os.environ.setdefault("SPT_NOENV", "1")  # or it would take the place of the environment, too
    try:
        import setproctitle
    except ImportError:  # a comfort for people who look at ps; nothing depends on it
        return
    setproctitle.setproctitle(title)


# --- the parent's side -------------------------------------------------------------------------


@dataclass(eq=False)
class Worker:
    """The parent's handle of one worker process."""

    name: str
    log_path: Path
    log_start: int
    """Size of the log at the worker's start: earlier ones of its name have written it, too."""
    process: Any
    orders: Connection
    reports: Connection
    finished: bool = False
    exited: bool = False
    reports_open: bool = True
    started_at: float = field(default_factory=time.monotonic)

    def last_log_lines(self) -> str:
        """The end of its log, and where the rest is."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self.log_start)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            lines = []
        shown = [line for line in lines if line.strip()][-_LOG_LINES_SHOWN:]
        return "\n".join([*shown, f"Full log: {self.log_path}"])

    def signal_group(self, signal_number: int) -> bool:
        """Send a signal to the worker and all that it started; False when nobody is left."""
        pid = self.process.pid
        if pid is None:
            return False
        try:
            os.killpg(pid, signal_number)
        except ProcessLookupError:
            # Either all are gone, or the worker has not yet become the leader of its group.
            if not self.process.is_alive():
                return False
            try:
                os.kill(pid, signal_number)
            except ProcessLookupError:
                return False
        return True


class Crew:
    """All worker processes of a command. Leaving the `with` block ends every one of them."""

    def __init__(
        self,
        *,
        log_folder: Path,
        scratch_folder: Path,
        signals: SignalWatch,
        preload: Sequence[str] = (),
        is_forked: bool = False,
    ) -> None:
        """A crew without workers yet.

        Logs go to `log_folder`, the workers' temporary files to `scratch_folder`; removing them
        after the crew's end is up to the caller. A signal that `signals` notices interrupts the
        waiting for messages. The fork server imports the modules in `preload`; with `is_forked`,
        there is none, and workers are copies of this process.
        """
        self._context: Any = multiprocessing.get_context("fork" if is_forked else "forkserver")
        self._is_forked = is_forked
        self._fork_server = nullcontext() if is_forked else fork_server(preload)
        self._signals = signals
        self._log_folder = log_folder
        self.scratch_folder = scratch_folder
        self._workers: list[Worker] = []
        self._pending: deque[tuple[Worker, Message]] = deque()
        self._failure: WorkerError | None = None

    def __enter__(self) -> Crew:
        self._fork_server.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        try:
            self.end_all()
        finally:
            self._fork_server.__exit__(*exc_info)

    def start(self, name: str, target: Callable[..., None], *args: Any) -> Worker:
        """Start `target(channel, *args)` in a process of its own; `name` is for people.

        What the process prints goes to a log file in the crew's log folder.
        """
        log_path = self._log_folder / f"{name.replace(' ', '-')}.log"
        order_reader, order_writer = multiprocessing.Pipe(duplex=False)
        report_reader, report_writer = multiprocessing.Pipe(duplex=False)
        inherited: list[Connection] = []
        if self._is_forked:
            inherited = [pipe for one in self._workers for pipe in (one.orders, one.reports)]
            inherited += [order_writer, report_reader]
        process = self._context.Process(
            target=_worker_main,
            name=name,
            args=(
                pickle.dumps((target, args)),
                order_reader,
                report_writer,
                f"flexbench: {name}",
                str(log_path),
                str(self.scratch_folder),
                inherited,
            ),
        )
        log_start = log_path.stat().st_size if log_path.exists() else 0
        worker = Worker(name, log_path, log_start, process, order_writer, report_reader)
        self._workers.append(worker)
        # The first start waits until the fork server has done its imports; ending that ends it.
        self._signals.on_stop = None if self._is_forked else kill_fork_server
        try:
            self._signals.raise_if_stopped()
            process.start()
        except (OSError, EOFError) as error:
            self._signals.raise_if_stopped()
            raise WorkerError(name, f"could not be started: {error!r}") from error
        finally:
            self._signals.on_stop = None
        worker.started_at = time.monotonic()
        # Our copies of the worker's ends; only with them closed does its death end the reports.
        order_reader.close()
        report_writer.close()
        return worker

    def release(self, workers: Sequence[Worker], payload: Any = None) -> float:
        """Release all `workers` at once; returns the moment just before, on time.monotonic."""
        released_at = time.monotonic()
        for worker in workers:
            # One that has just died is reported by the next next_message, with its reason.
            with suppress(BrokenPipeError):
                worker.orders.send(payload)
        return released_at

    def next_message(self, deadline: Deadline) -> tuple[Worker, Message]:
        """The next Ready, Item or Finished of any worker, in the order of arrival.

        Raises WorkerError when any worker of the crew failed or died (after everything that was
        reported before), DeadlineError when `deadline` passed, Interrupted on SIGINT and SIGTERM.
        """
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            self._collect(deadline)
        return self._pending.popleft()

    def _collect(self, deadline: Deadline) -> None:
        by_source: dict[Any, Worker] = {}
        for worker in self._workers:
            if not worker.exited:
                by_source[worker.process.sentinel] = worker
            if worker.reports_open:
                by_source[worker.reports] = worker
        # The system's own limit for one wait is 24 days.
        timeout_s = min(deadline.remaining_s(), _LONGEST_WAIT_S)
        sources = connection.wait([*by_source, self._signals.wakeup], timeout_s)
        self._signals.raise_if_stopped()
        # Awake, but not to stop: who asks others whether to stop has to be asked now and then.
        sources = [source for source in sources if source is not self._signals.wakeup]
        if not sources and deadline.remaining_s() == 0:
            raise deadline.error()
        reporting = [by_source[s] for s in sources if isinstance(s, Connection)]
        exited = [by_source[s] for s in sources if not isinstance(s, Connection)]
        for worker in exited:
            # What it reported before its end comes first; its exit is seen again next time.
            if worker not in reporting:
                self._note_exit(worker)
        for worker in reporting:
            self._receive(worker)

    def _receive(self, worker: Worker) -> None:
        try:
            message: Message = worker.reports.recv()
        except (EOFError, OSError):
            worker.reports_open = False
            return
        if isinstance(message, Failed):
            # Killing one process makes others fail in turn: the first cause is the one to show.
            self._failure = self._failure or WorkerError(
                worker.name, f"failed: {message.summary}", details=worker.last_log_lines()
            )
            worker.finished = True
            return
        worker.finished = isinstance(message, Finished)
        self._pending.append((worker, message))

    def _note_exit(self, worker: Worker) -> None:
        worker.exited = True
        if worker.finished:
            return
        # Of one that was forked, pipes close a moment before the system knows how it ended.
        worker.process.join(_KILL_GRACE_S)
        self._failure = self._failure or WorkerError(
            worker.name, _how_it_died(worker.process.exitcode), details=worker.last_log_lines()
        )

    def end_all(self) -> None:
        """End every worker."""
        self.end(self._workers)

    def end(self, workers: Sequence[Worker]) -> None:
        """End these workers, if they still run, and everything they started, within a second."""
        ending = [worker for worker in workers if worker in self._workers]
        for worker in ending:
            worker.signal_group(signal.SIGTERM)
        remaining = _wait_until_gone(ending, _TERM_GRACE_S)
        for worker in remaining:
            worker.signal_group(signal.SIGKILL)
        _wait_until_gone(remaining, _KILL_GRACE_S)
        for worker in ending:
            worker.orders.close()
            worker.reports.close()
            self._workers.remove(worker)
        self._pending = deque(entry for entry in self._pending if entry[0] not in ending)


def _how_it_died(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended unexpectedly with exit code {exit_code}"


def _wait_until_gone(workers: Sequence[Worker], timeout_s: float) -> list[Worker]:
    """Wait for the processes and all others of their groups; returns the workers that remain."""
    expires_at = time.monotonic() + timeout_s
    remaining = list(workers)
    while True:
        for worker in remaining:
            _reap_orphans(worker)
        remaining = [worker for worker in remaining if worker.signal_group(0)]
        if not remaining or time.monotonic() > expires_at:
            return remaining
        time.sleep(0.01)


def _reap_orphans(worker: Worker) -> None:
    """Collect what the worker left behind: orphans become ours, and as long as nobody collects them
    they count as members of the worker's group.
    """
    with suppress(ChildProcessError):
        while worker.process.pid is not None and os.waitpid(-worker.process.pid, os.WNOHANG)[0]:
            pass
