"""A worker process: one event loop, or with threads several, for one point after another."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexbench.core.endpoint import Client, Failure
from flexbench.core.processes import WorkerChannel
from flexbench.serving.clients import find_client
from flexbench.serving.config import Load, PromptConfig
from flexbench.serving.generator import LoadLoop, LoopReport, Part, Warmup, new_event_loop
from flexbench.serving.prompts import open_prompts
from flexbench.serving.spool import SpoolWriter

_NICENESS = -10
_FULL_COLLECTION_AFTER = (50_000, 20, 100)


@dataclass(frozen=True, kw_only=True)
class PointOrder:
    """Everything that the loops of one worker need to know of a point."""

    number: int
    """Orders are counted: one that has been seen is not followed again."""
    api: str
    client_config: Any
    prompts: PromptConfig
    series: int
    load: Load
    parts: tuple[int, ...]
    """The loops of this worker, among the `num_parts` of all."""
    num_parts: int
    warmup_requests: int
    """Of each client, or connection."""
    request_timeout_s: float
    spools: tuple[Path, ...]
    """Where each loop writes what it measures."""


@dataclass(frozen=True)
class Start:
    """Send the load from this moment on time.monotonic_ns."""

    number: int
    start_ns: int


@dataclass(frozen=True)
class Stop:
    """Send nothing more, and cut off what is in flight."""

    number: int


@dataclass(frozen=True)
class Prepared:
    """A worker's loops are ready, after so many requests of warm-up, of which some failed."""

    num_warmups: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Done:
    """A worker's loops have come to their end."""

    reports: tuple[LoopReport, ...]


def _come_first() -> None:
    """Be scheduled before other programs, where that is allowed.

    A server on the same machine that has all processors would make every timestamp late. The
    generator needs little of them, but that at once.
    """
    with suppress(OSError, AttributeError):
        os.nice(_NICENESS)


class _Orders:
    """What the parent wants, each once."""

    def __init__(self, channel: WorkerChannel) -> None:
        self._channel = channel
        self._last_number = 0

    def next(self) -> PointOrder | Start | Stop:
        while True:
            self._channel.release.wait()
            # In this order: an order that comes between the two is seen twice rather than never.
            self._channel.release.clear()
            order: PointOrder | Start | Stop = self._channel.release.payload
            if order.number > self._last_number:
                self._last_number = order.number
                return order

    def is_stopped(self) -> bool:
        """Whether the parent wants the point to end now."""
        return self._channel.release.wait(0) and isinstance(self._channel.release.payload, Stop)


def run_worker(channel: WorkerChannel) -> None:
    """Be a worker of a Crew: send the load of one point after another, until the parent ends it."""
    gc.set_threshold(*_FULL_COLLECTION_AFTER)
    _come_first()
    orders = _Orders(channel)
    while True:
        order = orders.next()
        if isinstance(order, PointOrder):
            _run_point(order, orders, channel)


def _run_point(order: PointOrder, orders: _Orders, channel: WorkerChannel) -> None:
    lock = threading.Lock()

    def put(item: Any) -> None:
        with lock:  # several loops have one pipe
            channel.queue.put(item)

    loops = [
        _PartRunner(order, part, spool, put, orders.is_stopped)
        for part, spool in zip(order.parts, order.spools, strict=True)
    ]
    try:
        found = _in_threads([loop.prepare for loop in loops])
        # What is there by now stays: it need not be looked through again.
        gc.collect()
        gc.freeze()
        failures = tuple(failure for warmup in found for failure in warmup.failures)
        put(Prepared(sum(warmup.num_requests for warmup in found), failures))
        start = orders.next()
        reports: list[LoopReport] = []
        # A stop may come so soon that the start before it is never seen.
        if isinstance(start, Start):
            reports = _in_threads([partial(loop.run, start.start_ns) for loop in loops])
        put(Done(tuple(reports)))
    finally:
        for loop in loops:
            loop.close()
        gc.unfreeze()


def _in_threads(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call all at the same time and return what they do; one alone is called right here."""
    if len(functions) == 1:
        return [functions[0]()]
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def call(place: int) -> None:
        try:
            results[place] = functions[place]()
        except BaseException as error:  # noqa: BLE001 - it is raised again where it belongs
            errors.append(error)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class _PartRunner:
    """One part of a point in an event loop of its own."""

    def __init__(
        self,
        order: PointOrder,
        part: int,
        spool: Path,
        put: Callable[[Any], None],
        is_stopped: Callable[[], bool],
    ) -> None:
        self._event_loop = new_event_loop()
        self._client: Client = find_client(order.api)(order.client_config)
        self._warmup_requests = order.warmup_requests
        self._spool = SpoolWriter(spool)
        self._loop = LoadLoop(
            self._client,
            open_prompts(order.prompts, series=order.series),
            Part(load=order.load, number=part, num_parts=order.num_parts),
            self._spool,
            seed=order.prompts.prompt_generator_seed + order.series,
            # Of several threads in a process, each counts its own.
            cpu_clock=time.thread_time if len(order.parts) > 1 else time.process_time,
            request_timeout_s=order.request_timeout_s,
            on_status=put,
            is_stopped=is_stopped,
        )

    def prepare(self) -> Warmup:
        return self._event_loop.run_until_complete(self._loop.prepare(self._warmup_requests))

    def run(self, start_ns: int) -> LoopReport:
        return self._event_loop.run_until_complete(self._loop.run(start_ns))

    def close(self) -> None:
        self._spool.close()
        self._event_loop.run_until_complete(self._client.close())
        self._event_loop.close()
