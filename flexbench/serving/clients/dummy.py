"""A server that is not there: answers after the times of a model, from within the generator.

It has `capacity` places. A request that finds one free is served at once, others wait in the order
in which they came. With n tokens it is served for s = ttft + (n - 1) * itl, so throughput saturates
at capacity / s requests a second, and no faster server can make the generator look better than it
is: whatever a run against it falls short of that is the generator's own doing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, ClassVar, NamedTuple

from flexbench.core.checks import check_count, check_seconds, check_seed
from flexbench.core.endpoint import (
    Exchange,
    Failure,
    FailureKind,
    GenerationRequest,
    Response,
    ServiceContext,
)
from flexbench.core.errors import ConfigError

_MAX_MS = 1e7
_WORDS = (" tide", " lamp", " rope", " gull", " pier", " oar", " salt", " bell")


@dataclass(frozen=True, kw_only=True)
class DummyConfig:
    """The latency model."""

    capacity: int = field(default=8, metadata={"help": "Requests that are served at once."})
    ttft_ms: float = field(
        default=20.0, metadata={"help": "From the start of service to the first token, in ms."}
    )
    itl_ms: float = field(default=2.0, metadata={"help": "From a token to the next one, in ms."})
    jitter: float = field(
        default=0.0,
        metadata={"help": "Spread of service times: the sigma of a log-normal factor of mean 1."},
    )
    fail_rate: float = field(
        default=0.0, metadata={"help": "Part of the requests that fail instead of a first token."}
    )
    dummy_client_latency_time: float | None = field(
        default=None,
        metadata={"help": "Seconds that an answer takes in all, whatever its length."},
    )
    dummy_seed: int = field(default=0, metadata={"help": "Seed of jitter and failures."})

    def __post_init__(self) -> None:
        check_count("--capacity", self.capacity, minimum=1)
        check_seed("--dummy-seed", self.dummy_seed)
        for option, value in (("--ttft-ms", self.ttft_ms), ("--itl-ms", self.itl_ms)):
            if not 0 <= value <= _MAX_MS:
                raise ConfigError(option, f"must be a number of ms from 0 to {_MAX_MS:g}")
        if not 0 <= self.jitter <= 2:
            raise ConfigError("--jitter", "must be a number from 0 to 2")
        if not 0 <= self.fail_rate <= 1:
            raise ConfigError("--fail-rate", "must be a number from 0 to 1")
        if self.dummy_client_latency_time is not None:
            check_seconds("--dummy-client-latency-time", self.dummy_client_latency_time)

    def service_times(self, num_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and from each to the next, without jitter."""
        if self.dummy_client_latency_time is None:
            return self.ttft_ms / 1e3, self.itl_ms / 1e3
        share = self.dummy_client_latency_time / num_tokens
        return share, share


class Plan(NamedTuple):
    """How a request will be answered."""

    first_s: float
    gap_s: float
    num_tokens: int
    is_streaming: bool
    will_fail: bool

    def offset_s(self, token: int) -> float:
        """When a token, from 0, is there, in seconds since the start of service."""
        return self.first_s + token * self.gap_s


class DummyClient:
    """Answers without a server."""

    config_class: ClassVar[type] = DummyConfig
    requests_per_worker: ClassVar[int | None] = None
    max_workers: ClassVar[int | None] = 1  # its places are within one event loop
    preload: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: DummyConfig) -> None:
        self.config = config
        self._places: _Places | None = None

    def start_service(self, context: ServiceContext) -> None:
        """Nothing is to be started."""

    def stop_service(self) -> None:
        """Nor stopped."""

    def describe_service(self) -> dict[str, Any]:
        """The latency model."""
        return {"kind": "latency model, no server", **asdict(self.config)}

    async def open(self, num_connections: int) -> None:  # noqa: ARG002
        """Make room: all places are free."""
        self._places = _Places(self.config.capacity)

    async def close(self) -> None:
        """Nothing is kept."""
        self._places = None

    def prepare_request(self, request: GenerationRequest) -> Plan:
        """Draw what will happen to it; the same for the same number."""
        random = Random(f"{self.config.dummy_seed} {request.index}")  # noqa: S311
        num_tokens = request.max_new_tokens
        first_s, gap_s = self.config.service_times(num_tokens)
        sigma = self.config.jitter
        # exp(normal(-sigma^2 / 2, sigma)) has mean 1: jitter does not move the saturation.
        factor = math.exp(random.gauss(-sigma * sigma / 2, sigma)) if sigma else 1.0
        will_fail = random.random() < self.config.fail_rate
        return Plan(first_s * factor, gap_s * factor, num_tokens, request.is_streaming, will_fail)

    async def send_request(self, prepared: Plan, exchange: Exchange) -> None:
        """Wait for a place, then for the tokens."""
        places = self._places
        assert places is not None, "open() comes first"
        exchange.sent_at = time.monotonic_ns()
        begin_s = await places.take()
        # A place is free again when the model says so, not when this process got round to it: its
        # own slowness must not become the server's. Unless the request is cut off.
        free_at_s: float | None = None
        try:
            if prepared.will_fail:
                await _sleep_until(begin_s + prepared.first_s)
                free_at_s = begin_s + prepared.first_s
                exchange.status = 500
                exchange.failure = Failure(
                    FailureKind.HTTP_SERVER_ERROR, "500: a failure of --fail-rate"
                )
            else:
                await _Delivery(prepared, exchange, begin_s).done()
                free_at_s = begin_s + prepared.offset_s(prepared.num_tokens - 1)
                exchange.status = 200
            exchange.ended_at = time.monotonic_ns()
        finally:
            places.give_back(time.monotonic() if free_at_s is None else free_at_s)

    def process_response(self, exchange: Exchange) -> Response:
        """The tokens with their times."""
        is_done = exchange.ended_at and exchange.failure is None
        return Response(
            content_times=list(exchange.arrivals),
            texts=[text for text, _ in exchange.pieces],
            output_tokens=sum(num_tokens for _, num_tokens in exchange.pieces),
            finish_reason="length" if is_done else None,
            failure=exchange.failure,
        )


class _Places:
    """Places for requests, and the queue before them. Times are in s, of time.monotonic."""

    def __init__(self, capacity: int) -> None:
        self._num_free = capacity
        self._queue: deque[asyncio.Future[float]] = deque()

    async def take(self) -> float:
        """Wait for a place; the moment from which it is one's own."""
        came_at = time.monotonic()
        if self._num_free:
            self._num_free -= 1
            return came_at
        turn: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            return max(came_at, await turn)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(time.monotonic())  # its turn had just come
            raise

    def give_back(self, free_at: float) -> None:
        """Hand a place over to who waits longest."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(free_at)
                return
        self._num_free += 1


class _Delivery:
    """Puts tokens into an exchange as they are due. Late ones do not make the next ones late."""

    def __init__(self, plan: Plan, exchange: Exchange, begin_s: float) -> None:
        self._plan = plan
        self._exchange = exchange
        self._begin_s = begin_s
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._token = 0 if plan.is_streaming else plan.num_tokens - 1
        self._timer = self._set_timer(self._deliver)

    async def done(self) -> None:
        """Wait for the last token."""
        try:
            await self._end
        finally:
            self._timer.cancel()

    def _set_timer(self, callback: Callable[[], None]) -> asyncio.TimerHandle:
        due_s = self._begin_s + self._plan.offset_s(self._token)
        return self._loop.call_later(max(0.0, due_s - time.monotonic()), callback)

    def _deliver(self) -> None:
        plan, exchange = self._plan, self._exchange
        text = _WORDS[self._token % len(_WORDS)]
        if plan.is_streaming:
            exchange.pieces.append((text, 1))
        else:
            exchange.pieces.append((text * plan.num_tokens, plan.num_tokens))
        exchange.arrivals.append(time.monotonic_ns())
        self._token += 1
        if self._token < plan.num_tokens:
            self._timer = self._set_timer(self._deliver)
        elif not self._end.done():
            self._end.set_result(None)


async def _sleep_until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.monotonic()))
