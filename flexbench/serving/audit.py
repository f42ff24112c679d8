"""Whether a point says something of the service, or only of the load generator that measured it.

Two things can be wrong. The generator was the limit: it could not send, or take in, what was asked
of it, so throughput is its own. Or it was on time often enough for that, but not always: another
program, perhaps the server itself, had its processor, and some timestamps are late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from flexbench.core.units import format_seconds

MAX_BUSY = 0.9
"""A loop that computes for more of its time has queues of its own: events wait for it."""
MAX_LAG_SHARE = 0.1
"""Of the latency that people look at: an error above a tenth of it changes conclusions."""
MIN_LAG_S = 0.005
"""Less is what a shared machine's scheduler does to anybody, and is not held against a point."""
MIN_LATENESS_S = 0.01
"""A request of an open loop that is sent so late has missed its place in the arrivals."""
MIN_DELIVERED = 0.95
"""Of the load that was asked for; less, and the label of the point is not what it measured."""
MAX_GENERATOR_SHARE = 0.8
"""Of the rate at which the generators send when nothing else limits them."""
FAILING_RATE = 0.05
"""With more failures, few requests in flight are the service's doing: it ends them early."""


@dataclass(frozen=True, kw_only=True)
class AuditInput:
    """What is known of the load generator during a point. Times in seconds; None: not known."""

    worker_busy: tuple[float, ...] = ()
    """Per event loop: CPU time over wall time, in the window."""
    loop_lag_p50_s: float | None = None
    loop_lag_p99_s: float | None = None
    """By how much timers came late, of the worst loop."""
    ttft_p50_s: float | None = None
    """None where nothing is streamed: then the end-to-end latency is what lag is compared to."""
    e2e_p50_s: float | None = None
    send_lateness_p99_s: float | None = None
    concurrency: int | None = None
    """What was asked of a closed loop; None of an open one."""
    steady_in_flight: float | None = None
    error_rate: float | None = None
    scheduled_per_s: float | None = None
    """What an open loop had to send, and"""
    sent_per_s: float | None = None
    """what it sent."""
    requests_per_s: float | None = None
    generator_requests_per_s: float | None = None
    """The most that the generators can send, from their calibration against the dummy."""
    generator_error_p99_s: float | None = None
    """What they measured beyond the dummy's latency, with as many requests in flight."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The verdict: `reasons` say with numbers why the client was the limit; none if it was not.

    `timing_reasons` say why some latencies are longer by the generator's doing.
    """

    is_client_limited: bool
    reasons: tuple[str, ...]
    is_timing_uncertain: bool
    timing_reasons: tuple[str, ...]
    worker_busy_max: float | None
    inputs: AuditInput

    def as_record(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> Audit:
        """The verdict that `as_record` made a record of. Raises TypeError, KeyError, or ValueError.

        JSON knows lists alone: what were tuples become tuples again.
        """
        inputs = dict(record["inputs"])
        inputs["worker_busy"] = tuple(inputs["worker_busy"])
        return Audit(
            is_client_limited=record["is_client_limited"],
            reasons=tuple(record["reasons"]),
            is_timing_uncertain=record["is_timing_uncertain"],
            timing_reasons=tuple(record["timing_reasons"]),
            worker_busy_max=record["worker_busy_max"],
            inputs=AuditInput(**inputs),
        )


def audit(point: AuditInput) -> Audit:
    """Judge a point. What is not known is not held against it."""
    reasons = (*_busy(point), *_closed_loop(point), *_open_loop(point), *_speed(point))
    timing_reasons = (*_lag(point), *_error(point))
    return Audit(
        is_client_limited=bool(reasons),
        reasons=reasons,
        is_timing_uncertain=bool(timing_reasons),
        timing_reasons=timing_reasons,
        worker_busy_max=max(point.worker_busy, default=None),
        inputs=point,
    )


def _busy(point: AuditInput) -> Iterator[str]:
    busy = max(point.worker_busy, default=0.0)
    if busy > MAX_BUSY:
        yield f"a worker's event loop was busy {busy:.0%} of the time"


def _lag(point: AuditInput) -> Iterator[str]:
    if point.loop_lag_p99_s is not None and point.loop_lag_p99_s > _allowed(point, MIN_LAG_S):
        yield (
            f"1 % of a worker's events were handled {format_seconds(point.loop_lag_p99_s)} late or "
            f"later, which is much beside {_reference_in_words(point)}"
        )


def _closed_loop(point: AuditInput) -> Iterator[str]:
    if point.concurrency is None or point.steady_in_flight is None:
        return
    if point.error_rate is not None and point.error_rate > FAILING_RATE:
        return
    if point.steady_in_flight < MIN_DELIVERED * point.concurrency:
        yield (
            f"{point.steady_in_flight:.3g} requests were in flight on average, not "
            f"{point.concurrency}"
        )


def _open_loop(point: AuditInput) -> Iterator[str]:
    if point.concurrency is not None:
        return
    late = point.send_lateness_p99_s
    if late is not None and late > _allowed_lateness(point):
        yield f"1 % of the requests were sent {format_seconds(late)} after their time or later"
    if point.scheduled_per_s and point.sent_per_s is not None:
        delivered = point.sent_per_s / point.scheduled_per_s
        if delivered < MIN_DELIVERED:
            yield (
                f"{point.sent_per_s:.4g} requests/s were sent, not the "
                f"{point.scheduled_per_s:.4g} of the schedule"
            )


def _speed(point: AuditInput) -> Iterator[str]:
    most, rate = point.generator_requests_per_s, point.requests_per_s
    # A client may be quicker than the dummy, whose answers each need timers: then it says nothing.
    if most and rate is not None and MAX_GENERATOR_SHARE * most < rate <= most:
        yield f"{rate:.4g} requests/s are {rate / most:.0%} of what the generators can send"


def _error(point: AuditInput) -> Iterator[str]:
    error = point.generator_error_p99_s
    if error is not None and error > _allowed(point, MIN_LAG_S):
        yield (
            f"against the dummy, the generators measured up to {format_seconds(error)} too much "
            f"(99th percentile), which is much beside {_reference_in_words(point)}"
        )


def _reference_s(point: AuditInput) -> float | None:
    return point.ttft_p50_s if point.ttft_p50_s is not None else point.e2e_p50_s


def _reference_in_words(point: AuditInput) -> str:
    reference = _reference_s(point)
    if reference is None:
        return "what is measured"
    name = "first tokens" if point.ttft_p50_s is not None else "answers"
    return f"{name} after {format_seconds(reference)} (median)"


def _allowed(point: AuditInput, least_s: float) -> float:
    return max(least_s, MAX_LAG_SHARE * (_reference_s(point) or 0.0))


def _allowed_lateness(point: AuditInput) -> float:
    return max(MIN_LATENESS_S, MAX_LAG_SHARE * (point.e2e_p50_s or 0.0))
