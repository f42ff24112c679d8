"""The load generator: one event loop that sends its part of a point's load and notes what happens.

What is timed is kept apart from what can wait. When an answer has ended, the next request is sent
first; only then is the answer taken apart, one at a time, with a look at the network in between. So
a burst of answers does not delay the timestamps of those that are still coming.

What was measured is written to a spool file as it goes: it is there even if this process is killed.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flexbench.core.endpoint import (
    Client,
    Exchange,
    Failure,
    FailureKind,
    GenerationRequest,
    Response,
)
from flexbench.serving.arrivals import send_times
from flexbench.serving.config import Load
from flexbench.serving.prompts.source import PromptSource
from flexbench.serving.spool import SpoolWriter

_TICK_S = 0.25
_SWEEP_S = 0.05
_LAG_PROBE_S = 0.02
# Taking answers apart may keep the loop for so long before it looks at the network again.
_FINISH_SLICE_NS = 200_000
# A loop that is always busy would otherwise put everything off, and keep it in memory.
_LONG_BACKLOG = 2000
# Timers are coarse: before a start together, the last stretch is waited for actively. Before each
# request of an open loop that would keep a core busy, at 500 requests/s for half of the time.
_ACTIVE_WAIT_S = 0.002
_LOOKAHEAD = 64
_SPARE = 1.5
_LONGEST_SLEEP_NS = 250_000_000
_MOST_PREPARED = 4096


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a point's load one loop takes: number `number` of `num_parts`.

    Client c of a closed loop belongs to part c % num_parts, and request i to client
    i % concurrency; of an open loop, request i belongs to part i % num_parts.
    """

    load: Load
    number: int
    num_parts: int

    @property
    def num_clients(self) -> int:
        """Clients of a closed loop in this part."""
        concurrency = self.load.concurrency
        assert concurrency is not None
        return len(range(self.number, concurrency, self.num_parts))

    def indices(self) -> Iterator[int]:
        """The numbers of this part's requests, in order; without end if only time ends the load."""
        concurrency, limit = self.load.concurrency, self.load.num_requests
        step = self.num_parts if concurrency is None else concurrency
        first = [self.number]
        if concurrency is not None:
            first = list(range(self.number, concurrency, self.num_parts))
        base = 0
        while first:
            for index in first:
                if limit is not None and base + index >= limit:
                    return
                yield base + index
            base += step

    def schedule(self, seed: int) -> Iterator[tuple[int, float]]:
        """Of an open loop: the numbers of this part's requests, and when each is due, in s."""
        for index, moment in enumerate(send_times(self.load, seed)):
            if index % self.num_parts == self.number:
                yield index, moment


@dataclass(kw_only=True)
class Status:
    """How a loop is doing, for the person who watches; counts are since the release."""

    part: int
    in_flight: int = 0
    sent: int = 0
    completed: int = 0
    failed: int = 0
    output_tokens: int = 0
    recent_ttft_s: list[float] = field(default_factory=list)
    """Since the last status."""
    last_failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """What a loop's warm-up came to."""

    num_requests: int
    failures: list[Failure]


@dataclass(kw_only=True)
class LoopReport:
    """What a loop says of itself after its part: how busy it was, and how late."""

    part: int
    cpu_s: float
    """Processor time from the release to the end of the duration, or of the last request."""
    wall_s: float
    lags_s: list[float]
    """How late a timer was that went off every 20 ms."""
    num_prepared_late: int
    """Requests that were written only when they were to be sent."""
    niceness: int
    """Of the process: below 0, it is scheduled before others."""


@dataclass(eq=False, slots=True)
class _Flight:
    """A request in flight."""

    request: GenerationRequest
    exchange: Exchange
    scheduled_ns: int
    expires_ns: int
    task: asyncio.Task[Any]
    cut: str | None = None
    """Why it was cut off: 'timeout', or 'end' of the point."""
    ended_ns: int = 0


class LoadLoop:
    """Sends one part of a load through a client, in the running event loop."""

    def __init__(
        self,
        client: Client,
        prompts: PromptSource,
        part: Part,
        spool: SpoolWriter,
        *,
        seed: int,
        request_timeout_s: float,
        cpu_clock: Callable[[], float] = time.process_time,
        on_status: Callable[[Status], None],
        is_stopped: Callable[[], bool],
    ) -> None:
        """`cpu_clock` counts the processor time of this loop.

        `on_status` is called four times a second, `is_stopped` asked every 50 ms."""
        self._client = client
        self._prompts = prompts
        self._part = part
        self._spool = spool
        self._seed = seed
        self._cpu_clock = cpu_clock
        self._window_end: tuple[float, float, int] | None = None
        self._timeout_ns = round(request_timeout_s * 1e9)
        self._on_status = on_status
        self._is_stopped = is_stopped
        self._status = Status(part=part.number)
        self._flights: dict[_Flight, None] = {}
        self._backlog: deque[_Flight] = deque()
        self._is_finishing = False
        self._is_over = False
        self._broken: asyncio.Future[None]
        self._lags_s: list[float] = []
        self._schedule: Iterator[tuple[int, float]] = iter(())
        if part.load.concurrency is None:
            self._schedule = part.schedule(seed)
        self._supply = _Supply(client, prompts, part)

    # --- before the release ---

    async def prepare(self, warmup_requests: int) -> Warmup:
        """Open connections, send warm-up requests, and write the first prompts."""
        load = self._part.load
        slots = self._part.num_clients if load.concurrency is not None else 1
        await self._client.open(slots)
        began = time.monotonic()
        failures: list[Failure] = []
        if warmup_requests:
            warmups = (self._warm_up(slot, warmup_requests) for slot in range(slots))
            for found in await asyncio.gather(*warmups):
                failures += found
        latency_s = (time.monotonic() - began) / max(1, warmup_requests)
        self._supply.fill(self._expected_requests(slots, latency_s), slots)
        return Warmup(num_requests=slots * warmup_requests, failures=failures)

    def _expected_requests(self, slots: int, latency_s: float) -> int:
        """How many requests this part will send, as far as the warm-up tells."""
        load = self._part.load
        if load.duration_s is None:
            assert load.num_requests is not None
            return load.num_requests // self._part.num_parts + slots
        if load.rate_per_s is not None:
            return math.ceil(load.rate_per_s * load.duration_s / self._part.num_parts) + slots
        return math.ceil(_SPARE * slots * load.duration_s / max(latency_s, 1e-3)) + slots

    async def _warm_up(self, slot: int, count: int) -> list[Failure]:
        failures = []
        for number in range(count):
            # Numbers that no measured request has, so that no cache knows its prompt.
            index = -1 - (self._part.number + self._part.num_parts * (slot * count + number))
            prepared = self._client.prepare_request(self._prompts.request(index))
            exchange = Exchange()
            try:
                async with asyncio.timeout(self._timeout_ns / 1e9):
                    await self._client.send_request(prepared, exchange)
            except TimeoutError:
                exchange.failure = Failure(FailureKind.TIMEOUT, "no end of a warm-up request")
            failure = exchange.failure or self._client.process_response(exchange).failure
            if failure is not None:
                failures.append(failure)
        return failures

    # --- the measured time ---

    async def run(self, start_ns: int) -> LoopReport:
        """Send the load from `start_ns`, on time.monotonic_ns, until its end or a stop."""
        self._start_ns = start_ns
        self._broken = asyncio.get_running_loop().create_future()
        await _sleep_until(start_ns, actively=True)
        cpu_before, wall_before = self._cpu_clock(), time.monotonic()
        watching = [
            asyncio.ensure_future(coroutine)
            for coroutine in (self._watch(), self._sweep(), self._probe_lag())
        ]
        end = None
        is_closed = self._part.load.concurrency is not None
        if self._part.load.duration_s is not None:
            loop = asyncio.get_running_loop()
            remaining_s = self._part.load.duration_s - (time.monotonic_ns() - start_ns) / 1e9
            end = loop.call_later(max(0.0, remaining_s), self._end_window)
        sending = asyncio.ensure_future(self._closed_loop() if is_closed else self._open_loop())
        try:
            await self._first_of(sending, self._broken, *watching)
        finally:
            if end is not None:
                end.cancel()
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        self._finish_all()
        # With what was put off: it is work for these requests, too.
        cpu, wall, num_lags = self._window_end or (
            self._cpu_clock(),
            time.monotonic(),
            len(self._lags_s),
        )
        self._spool.flush()
        self._report_status()
        return LoopReport(
            part=self._part.number,
            cpu_s=cpu - cpu_before,
            wall_s=wall - wall_before,
            lags_s=self._lags_s[:num_lags],
            num_prepared_late=self._supply.num_late,
            niceness=os.nice(0),
        )

    async def _first_of(self, *futures: asyncio.Future[Any]) -> None:
        """Until one of them is done; raises what it raised, such as OSError on a full disk."""
        ended, others = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        try:
            for future in ended:
                future.result()
        except BaseException:
            self._end_sending()
            self._cut(list(self._flights), "end")
            for future in others:
                future.cancel()
            if others:
                await asyncio.wait(others, timeout=_TICK_S)
            raise

    def _end_window(self) -> None:
        """The duration is over: what follows says nothing of how busy the loop was in it."""
        self._window_end = self._cpu_clock(), time.monotonic(), len(self._lags_s)
        # What an open loop has to send before that is sent, late or not: its schedule has an end.
        if self._part.load.concurrency is not None:
            self._end_sending()

    def _end_sending(self) -> None:
        self._is_over = True

    async def _closed_loop(self) -> None:
        await asyncio.gather(*(self._be_client() for _ in range(self._part.num_clients)))

    async def _be_client(self) -> None:
        task = _current_task()
        free_since_ns = self._start_ns
        while not self._is_over:
            item = self._supply.take()
            if item is None:
                return
            flight = await self._perform(task, *item, free_since_ns)
            free_since_ns = flight.ended_ns

    async def _open_loop(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        for index, moment in self._schedule:
            due_ns = self._start_ns + round(moment * 1e9)
            while not self._is_over and time.monotonic_ns() < due_ns:
                # Not too long at once: a stop is to be noticed, however rare requests are.
                await _sleep_until(min(due_ns, time.monotonic_ns() + _LONGEST_SLEEP_NS))
            if self._is_over:
                break
            item = self._supply.take()
            assert item is not None
            assert item[0].index == index, "the supply has another order"
            task = asyncio.ensure_future(self._perform_alone(*item, due_ns))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            self._supply.refill()
        if tasks:
            await asyncio.wait(tasks)

    async def _perform_alone(
        self, request: GenerationRequest, prepared: Any, scheduled_ns: int
    ) -> None:
        await self._perform(_current_task(), request, prepared, scheduled_ns)

    async def _perform(
        self,
        task: asyncio.Task[Any],
        request: GenerationRequest,
        prepared: Any,
        scheduled_ns: int,
    ) -> _Flight:
        exchange = Exchange()
        now = time.monotonic_ns()
        flight = _Flight(request, exchange, scheduled_ns, now + self._timeout_ns, task)
        self._flights[flight] = None
        self._status.sent += 1
        try:
            await self._client.send_request(prepared, exchange)
        except asyncio.CancelledError:
            if flight.cut is None:
                raise
            task.uncancel()
        except Exception as error:  # noqa: BLE001 - whatever a client raises is this request's end
            exchange.failure = Failure(FailureKind.CLIENT_ERROR, f"{type(error).__name__}: {error}")
        del self._flights[flight]
        flight.ended_ns = exchange.ended_at or time.monotonic_ns()
        self._backlog.append(flight)
        if not self._is_finishing:
            self._is_finishing = True
            asyncio.get_running_loop().call_soon(self._finish_some)
        if exchange.failure is not None:
            # It may have failed without waiting for anything: others have to have their turn.
            await asyncio.sleep(0)
        return flight

    # --- what can wait ---

    def _finish_some(self) -> None:
        """Take answers apart for a moment, and come back after a look at the network."""
        until_ns = time.monotonic_ns() + _FINISH_SLICE_NS
        try:
            while self._backlog:
                self._finish(self._backlog.popleft())
                self._supply.refill()
                if time.monotonic_ns() >= until_ns and len(self._backlog) < _LONG_BACKLOG:
                    break
        except Exception as error:  # noqa: BLE001 - `run` raises it; the event loop would log it
            if not self._broken.done():
                self._broken.set_exception(error)
            return
        self._is_finishing = bool(self._backlog)
        if self._is_finishing:
            asyncio.get_running_loop().call_soon(self._finish_some)

    def _finish_all(self) -> None:
        while self._backlog:
            self._finish(self._backlog.popleft())

    def _finish(self, flight: _Flight) -> None:
        exchange, request = flight.exchange, flight.request
        try:
            response = self._client.process_response(exchange)
        except Exception as error:  # noqa: BLE001 - whatever a client raises is this request's end
            problem = f"{type(error).__name__}: {error}"
            response = Response(failure=Failure(FailureKind.CLIENT_ERROR, problem))
        failure = response.failure or exchange.failure
        if flight.cut == "timeout":
            limit_s = self._timeout_ns / 1e9
            failure = Failure(FailureKind.TIMEOUT, f"no end within {limit_s:g} s")
        is_unfinished = flight.cut == "end"
        output_tokens = response.output_tokens
        if output_tokens is None:
            output_tokens = self._prompts.count_tokens(response.texts)
        self._spool.add(
            (
                request.index,
                self._part.number,
                flight.scheduled_ns,
                exchange.sent_at or None,
                exchange.connected_at or None,
                response.content_times,
                flight.ended_ns,
                request.prompt_tokens,
                request.max_new_tokens,
                output_tokens,
                response.output_tokens is not None,
                response.prompt_tokens,
                response.finish_reason,
                is_unfinished,
                None if failure is None or is_unfinished else failure.kind.value,
                None if failure is None or is_unfinished else failure.message,
            )
        )
        self._count(flight, response, None if is_unfinished else failure, output_tokens)

    def _count(
        self, flight: _Flight, response: Response, failure: Failure | None, output_tokens: int
    ) -> None:
        status = self._status
        if failure is not None:
            status.failed += 1
            status.last_failure = f"{failure.kind}: {failure.message}"
            return
        status.completed += flight.cut is None
        status.output_tokens += output_tokens
        if flight.request.is_streaming and response.content_times:
            status.recent_ttft_s.append((response.content_times[0] - flight.exchange.sent_at) / 1e9)

    # --- beside it ---

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if rows := self._spool.take():
                await self._write(rows)
            self._report_status()

    async def _write(self, rows: bytes) -> None:
        """In a thread: what others do to the disk must not make this loop late."""
        loop = asyncio.get_running_loop()
        writing = loop.run_in_executor(None, self._spool.write, rows)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing  # or these rows would be lost
            raise

    def _report_status(self) -> None:
        self._status.in_flight = len(self._flights)
        self._on_status(self._status)
        self._status.recent_ttft_s = []

    async def _sweep(self) -> None:
        """Cut off requests that take too long, or all. They are in the order of sending."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            if self._is_stopped():
                self._end_sending()
                self._cut(list(self._flights), "end")
            now = time.monotonic_ns()
            late = []
            for flight in self._flights:
                if flight.expires_ns > now:
                    break
                late.append(flight)
            self._cut(late, "timeout")

    def _cut(self, flights: list[_Flight], why: str) -> None:
        for flight in flights:
            if flight.cut is None:
                flight.cut = why
                flight.task.cancel()

    async def _probe_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_PROBE_S
            began_ns = time.monotonic_ns()
            await asyncio.sleep(due - loop.time())
            lag_s = (time.monotonic_ns() - began_ns) / 1e9 - _LAG_PROBE_S
            self._lags_s.append(max(0.0, lag_s))


class _Supply:
    """Requests that are written before they are needed."""

    def __init__(self, client: Client, prompts: PromptSource, part: Part) -> None:
        self._client = client
        self._prompts = prompts
        self._indices = part.indices()
        self._ready: deque[tuple[GenerationRequest, Any]] = deque()
        self._wanted = _LOOKAHEAD
        self.num_late = 0

    def fill(self, num_expected: int, num_clients: int) -> None:
        """Write what the start needs; all that is expected, where writing is slow."""
        self._wanted = 2 * num_clients + _LOOKAHEAD
        if self._prompts.is_slow:
            self._wanted = max(self._wanted, min(num_expected, _MOST_PREPARED))
        self._write(self._wanted)

    def refill(self) -> None:
        """Write one or two more, if some have been taken."""
        self._write(min(len(self._ready) + 2, self._wanted))

    def take(self) -> tuple[GenerationRequest, Any] | None:
        """The next one; None when there is none left."""
        if not self._ready:
            self._write(1)
            if not self._ready:
                return None
            self.num_late += 1
        return self._ready.popleft()

    def _write(self, up_to: int) -> None:
        while len(self._ready) < up_to:
            index = next(self._indices, None)
            if index is None:
                return
            request = self._prompts.request(index)
            self._ready.append((request, self._client.prepare_request(request)))


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _sleep_until(moment_ns: int, *, actively: bool = False) -> None:
    """Until a moment on time.monotonic_ns.

    Timers come up to a millisecond late. `actively`: to the microsecond, and busy until then.
    """
    remaining_s = (moment_ns - time.monotonic_ns()) / 1e9
    if actively and remaining_s > _ACTIVE_WAIT_S:
        await asyncio.sleep(remaining_s - _ACTIVE_WAIT_S / 2)
    while (remaining_s := (moment_ns - time.monotonic_ns()) / 1e9) > 0:
        await asyncio.sleep(0 if actively else remaining_s)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed, else Python's."""
    try:
        import uvloop
    except ImportError:  # it has no wheel for this system
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def event_loop_name() -> str:
    """What `new_event_loop` makes, for records."""
    import importlib.util

    return "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
