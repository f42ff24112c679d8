"""Grouping of runs by configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flexbench.core.results import CONFIGURATION_COLUMNS, ResultRow

Configuration = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, smallest and largest of a figure over the runs of one configuration."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """All runs of one configuration: its values in the order of CONFIGURATION_COLUMNS."""

    configuration: Configuration
    throughput: Spread
    mean_latency: Spread
    num_runs: int


class _Running:
    """The spread of a stream of values, in constant memory."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = 0.0
        self._min = float("inf")
        self._max = float("-inf")

    def add(self, value: float) -> None:
        self.count += 1
        self._min = min(self._min, value)
        self._max = max(self._max, value)
        # Not a sum divided at the end, which can overflow; and rounding must not leave the range.
        mean = self._mean + (value - self._mean) / self.count
        self._mean = min(max(mean, self._min), self._max)

    def spread(self) -> Spread:
        return Spread(mean=self._mean, min=self._min, max=self._max)


def group_by_configuration(rows: Iterable[ResultRow]) -> list[Group]:
    """One Group for each configuration among `rows`, ordered by the configuration's values."""
    running: dict[Configuration, tuple[_Running, _Running]] = {}
    for row in rows:
        key = tuple(getattr(row, name) for name in CONFIGURATION_COLUMNS)
        throughput, latency = running.setdefault(key, (_Running(), _Running()))
        throughput.add(row.throughput)
        latency.add(row.mean_latency)
    return [
        Group(
            configuration=key,
            throughput=throughput.spread(),
            mean_latency=latency.spread(),
            num_runs=throughput.count,
        )
        for key, (throughput, latency) in sorted(running.items())
    ]
