"""When the requests of an open loop are due."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice, takewhile
from random import Random
from typing import TypeVar

from flexbench.serving.config import Arrival, Load

T = TypeVar("T")


def send_times(load: Load, seed: int) -> Iterator[float]:
    """Seconds from the start at which each request is due, in order; the i-th is request i's.

    Constant: i / rate. Poisson: gaps are exponential with mean 1 / rate, one of them before the
    first request; the same seed gives the same gaps in units of 1 / rate. Burst: burst_size
    requests at once, every burst_size / rate, from 0. Ends after `num_requests`, or with the last
    one before `duration_s`, whichever comes first.
    """
    rate, duration = load.rate_per_s, load.duration_s
    assert rate is not None, "a closed loop has no schedule"
    times: Iterator[float]
    if load.arrival is Arrival.POISSON:
        times = _poisson(rate, seed)
    else:
        size = load.burst_size if load.arrival is Arrival.BURST else 1
        times = (number // size * size / rate for number in count())
    if load.num_requests is not None:
        times = islice(times, load.num_requests)
    if duration is None:
        return times
    return takewhile(lambda moment: moment < duration, times)


def share(items: Iterator[T], worker: int, num_workers: int) -> Iterator[T]:
    """What worker `worker` of `num_workers` takes: every `num_workers`-th, from its own number."""
    return islice(items, worker, None, num_workers)


def _poisson(rate: float, seed: int) -> Iterator[float]:
    random = Random(f"arrivals {seed}")  # noqa: S311 - nothing to keep secret
    moment = 0.0
    while True:
        moment += random.expovariate(1.0)
        yield moment / rate
