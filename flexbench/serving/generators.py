"""The load generators of this machine: started, released together, watched, and read out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from flexbench.core.endpoint import Failure
from flexbench.core.errors import DeadlineError, FlexbenchError
from flexbench.core.processes import Crew, Deadline, Item, Worker
from flexbench.serving.config import Limits, Load, PromptConfig
from flexbench.serving.generator import LoopReport, Status
from flexbench.serving.spool import read_spool
from flexbench.serving.traces import RequestTrace
from flexbench.serving.worker import Done, PointOrder, Prepared, Start, Stop, run_worker

_START_DELAY_NS = 5_000_000
# A loop says four times a second how it is doing. One that is silent for so long is frozen.
_SILENCE_S = 15.0
_LOOK_S = 0.5
# How long loops that are told to stop get to write what they have; they look every 50 ms.
_LAST_WORDS_S = 0.6


@dataclass(frozen=True, kw_only=True)
class PointSpec:
    """What a point asks of the generators."""

    api: str
    client_config: Any
    prompts: PromptConfig
    load: Load
    series: int
    """Points of different series have different prompts."""
    warmup_requests: int
    request_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How a load is spread over this machine: `num_parts` loops in `num_workers` processes.

    The loops of all machines are counted through: `first_part` is the first one here, and
    `total_parts` counts all.
    """

    num_workers: int
    num_parts: int
    first_part: int = 0
    total_parts: int | None = None

    def parts_of(self, worker: int) -> tuple[int, ...]:
        """The loops of one process."""
        own = range(worker, self.num_parts, self.num_workers)
        return tuple(self.first_part + part for part in own)


@dataclass(kw_only=True)
class PointRun:
    """What came of a point on this machine."""

    released_ns: int
    """On time.monotonic_ns."""
    traces: list[RequestTrace] = field(default_factory=list)
    reports: list[LoopReport] = field(default_factory=list)
    stopped_by: str | None = None
    """Why it was ended before its time, in words."""


@dataclass(kw_only=True)
class Preparation:
    """What the warm-up came to."""

    num_warmups: int = 0
    failures: list[Failure] = field(default_factory=list)


class Board:
    """The latest status of every loop, for who watches."""

    def __init__(self) -> None:
        self._latest: dict[int, Status] = {}
        self.recent_ttft_s: list[float] = []
        self.last_failure: str | None = None

    def take(self, status: Status) -> None:
        """Note what a loop says."""
        self._latest[status.part] = status
        self.recent_ttft_s = [*self.recent_ttft_s, *status.recent_ttft_s][-1000:]
        self.last_failure = status.last_failure or self.last_failure

    @property
    def counts(self) -> Counter[str]:
        """in_flight, sent, completed, failed and output_tokens over all loops."""
        total: Counter[str] = Counter()
        for status in self._latest.values():
            for name in ("in_flight", "sent", "completed", "failed", "output_tokens"):
                total[name] += getattr(status, name)
        return total


class Generators:
    """The workers of a run, in a crew; one is started when a point first needs it."""

    def __init__(
        self,
        crew: Crew,
        *,
        spool_folder: Path,
        prepare_timeout_s: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Spools go to `spool_folder`, a folder of this run alone.

        `check` is called at least twice a second in every wait; what it raises ends the wait.
        """
        self._check = check
        self._crew = crew
        self._spool_folder = spool_folder
        self._prepare_timeout_s = prepare_timeout_s
        self._workers: list[Worker] = []
        self._active: list[Worker] = []
        self._spools: list[Path] = []
        self._number = 0

    def start_workers(self, count: int) -> None:
        """Start workers until there are `count`."""
        while len(self._workers) < count:
            name = f"load generator {len(self._workers)}"
            self._workers.append(self._crew.start(name, run_worker))

    def prepare(self, spec: PointSpec, topology: Topology) -> Preparation:
        """Let the loops open connections, warm up and write prompts.

        Raises WorkerError, DeadlineError, Interrupted.
        """
        self.start_workers(topology.num_workers)
        self._active = self._workers[: topology.num_workers]
        self._spools = []
        for index, worker in enumerate(self._active):
            parts = topology.parts_of(index)
            self._number += 1
            spools = tuple(self._spool_folder / f"{self._number}-{part}.jsonl" for part in parts)
            self._spools += spools
            order = PointOrder(
                number=self._number,
                parts=parts,
                num_parts=topology.total_parts or topology.num_parts,
                spools=spools,
                **vars(spec),
            )
            self._crew.release([worker], order)
        return self._await_prepared()

    def _await_prepared(self) -> Preparation:
        timeout_s = self._prepare_timeout_s
        expires_at = time.monotonic() + timeout_s
        preparation = Preparation()
        waiting = set(self._active)
        while waiting:
            self._check()
            remaining_s = expires_at - time.monotonic()
            if remaining_s <= 0:
                raise DeadlineError(
                    f"the load generators were not ready within {timeout_s:g} s (--warmup-timeout)"
                )
            try:
                worker, message = self._crew.next_message(_look_again(remaining_s))
            except DeadlineError:
                continue
            if isinstance(message, Item) and isinstance(message.payload, Prepared):
                waiting.discard(worker)
                preparation.failures += message.payload.failures
                preparation.num_warmups += message.payload.num_warmups
        return preparation

    def run(
        self,
        *,
        limits: Limits,
        on_status: Callable[[Board], None],
        start_ns: int | None = None,
    ) -> PointRun:
        """Release the prepared loops together and wait for their end.

        An error on the way, a worker's death or an interruption, is raised as a PartialRun, which
        has what was measured until then; the other workers have been told to stop.
        """
        now_ns = time.monotonic_ns()
        run = PointRun(released_ns=start_ns or now_ns + _START_DELAY_NS)
        self._number += 1
        self._crew.release(self._active, Start(self._number, run.released_ns))
        try:
            self._await_done(run, limits, on_status)
        except FlexbenchError as error:
            self._abandon()
            raise PartialRun(error, self._collect(run)) from error
        return self._collect(run)

    def _await_done(
        self, run: PointRun, limits: Limits, on_status: Callable[[Board], None]
    ) -> None:
        board = Board()
        starts_in_s = max(0.0, (run.released_ns - time.monotonic_ns()) / 1e9)
        waiting = dict.fromkeys(self._active, time.monotonic() + starts_in_s)
        while waiting:
            silent = min(waiting, key=lambda worker: waiting[worker])
            worker, message = self._crew.next_message(_silence(silent, waiting[silent]))
            if not isinstance(message, Item):
                continue
            if worker in waiting:
                waiting[worker] = time.monotonic()
            self._check()
            if isinstance(message.payload, Status):
                board.take(message.payload)
                on_status(board)
                counts = board.counts
                problem = limits.error_problem(
                    counts["failed"], counts["failed"] + counts["completed"]
                )
                if problem is not None and run.stopped_by is None:
                    run.stopped_by = problem
                    self._stop()
            elif isinstance(message.payload, Done):
                del waiting[worker]
                run.reports += message.payload.reports

    def _stop(self) -> None:
        self._number += 1
        self._crew.release(self._active, Stop(self._number))

    def _abandon(self) -> None:
        """Let what still runs write what it has; then end it.

        In little time: a launcher of ranks kills them half a second after one of them is lost.
        """
        self._stop()
        expires_at = time.monotonic() + _LAST_WORDS_S
        # Not next_message: what has happened would be raised again.
        waiting: list[Any] = [worker.reports for worker in self._active if worker.reports_open]
        while waiting and (remaining_s := expires_at - time.monotonic()) > 0:
            for reports in connection.wait(waiting, remaining_s):
                if _are_last_words(reports):
                    waiting.remove(reports)
        self._crew.end(self._active)
        self._workers = [worker for worker in self._workers if worker not in self._active]

    def _collect(self, run: PointRun) -> PointRun:
        for path in self._spools:
            run.traces += read_spool(path, run.released_ns)
            path.unlink(missing_ok=True)
        run.traces.sort(key=lambda trace: trace.scheduled_ns)
        return run


class PartialRun(FlexbenchError):  # noqa: N818 - it carries an error, and what was measured before
    """A point that `error` ended, with what was measured until then."""

    def __init__(self, error: FlexbenchError, run: PointRun) -> None:
        super().__init__(error.message, details=error.details)
        self.error = error
        self.run = run
        self.exit_code = error.exit_code


def _are_last_words(reports: Any) -> bool:
    """Whether the next message of a worker is its last of this point, or its end."""
    try:
        message = reports.recv()
    except (EOFError, OSError):
        return True
    return not isinstance(message, Item) or isinstance(message.payload, Done)


def _look_again(remaining_s: float) -> Deadline:
    return Deadline(min(remaining_s, _LOOK_S), lambda: "nothing was heard")


def _silence(worker: Worker, heard_at: float) -> Deadline:
    remaining_s = max(0.0, heard_at + _SILENCE_S - time.monotonic())
    return Deadline(remaining_s, lambda: f"{worker.name} has said nothing for {_SILENCE_S:g} s")
