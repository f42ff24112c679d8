"""Loads and stores beside the computing: one thread a lane, and one CUDA stream where there is one.

What is submitted to a lane is done in order. A ticket's `wait` returns when it is done, and raises
what it raised.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import torch


class Ticket:
    """Something that a lane has to do."""

    def __init__(self) -> None:
        self._is_done = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Return when it is done; raise what it raised."""
        self._is_done.wait()
        if self._error is not None:
            raise self._error

    def finish(self, error: BaseException | None = None) -> None:
        """Let `wait` return, or raise."""
        self._error = error
        self._is_done.set()


_DONE = Ticket()
_DONE.finish()


class Lane(Protocol):
    """Does things in the order in which they are submitted."""

    busy_s: float
    """Time spent on them so far."""

    def submit(self, work: Callable[[], None], *, after: Ticket | None = None) -> Ticket:
        """Do `work` after all that was submitted before, and after what another lane does."""

    def end(self) -> None:
        """Stop after what is being done now; the rest is dropped."""

    def join(self, timeout_s: float) -> None:
        """Wait until it has stopped."""


class InlineLane:
    """Does everything at once, in the caller's thread: no overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.busy_s = 0.0

    def submit(self, work: Callable[[], None], *, after: Ticket | None = None) -> Ticket:
        """Do `work` now."""
        if after is not None:
            after.wait()
        started_at = time.perf_counter()
        work()
        synchronize(self._device)
        self.busy_s += time.perf_counter() - started_at
        return _DONE

    def end(self) -> None:
        """Nothing is under way."""

    def join(self, timeout_s: float) -> None:
        """Nobody to wait for."""


class ThreadLane:
    """Does everything in a thread of its own, which is started when there is something to do."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.busy_s = 0.0
        self._device = device
        self._is_closed = False
        self._queue: SimpleQueue[_Order | None] = SimpleQueue()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._name = name
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None], *, after: Ticket | None = None) -> Ticket:
        """Do `work` in the lane's thread."""
        ticket = Ticket()
        computed = None
        if self._stream is not None:
            # What has been computed until now may be what is stored, or still use the buffer.
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(self._device))
        self._queue.put(_Order(work, ticket, after, computed))
        if self._thread is None:
            # A daemon: a process that fails is not to be kept alive by its copies.
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        return ticket

    def end(self) -> None:
        """Stop after what is being done now; the rest is dropped."""
        self._is_closed = True
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has stopped."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        with torch.inference_mode():
            while (order := self._queue.get()) is not None:
                if self._is_closed:
                    order.ticket.finish(RuntimeError("the lane was closed before"))
                    continue
                try:
                    self._do(order)
                except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                    order.ticket.finish(error)
                else:
                    order.ticket.finish()
                # Or it would keep the last tensors alive until the next order comes.
                del order

    def _do(self, order: _Order) -> None:
        if order.after is not None:
            order.after.wait()
        stream = self._stream
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            if stream is not None:
                stream.wait_event(order.computed)
                stream.synchronize()
            started_at = time.perf_counter()
            order.work()
            if stream is not None:
                # Done is done: buffers and their sources may be used again by anyone.
                stream.synchronize()
            self.busy_s += time.perf_counter() - started_at


@dataclass(frozen=True)
class _Order:
    """Something to do, after a ticket of another lane and a CUDA event, if any."""

    work: Callable[[], None]
    ticket: Ticket
    after: Ticket | None
    computed: Any


def open_lanes(names: Sequence[str], device: torch.device, *, are_threads: bool) -> dict[str, Lane]:
    """A lane for each name: threads that work beside the computing, or none at all."""
    if are_threads:
        return {name: ThreadLane(name, device) for name in names}
    return {name: InlineLane(device) for name in names}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
