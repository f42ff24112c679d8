"""How the clocks of a job's ranks differ from rank 0's, and how sure that is.

Rank 0 sends a message at t0 of its clock, the rank gets it at t1 of its own and answers at t2, and
rank 0 has the answer at t3. The rank's clock is then ahead by

    offset = ((t1 - t0) + (t2 - t3)) / 2,   give or take   ((t3 - t0) - (t2 - t1)) / 2,

as in NTP (RFC 5905, section 8): the answer lies in the middle if both ways took equally long, and
at the bound if one of them took no time at all. Of many exchanges the quickest tells most.

All times are of time.monotonic_ns, in nanoseconds.
"""

from __future__ import annotations

import os
import platform
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

# The most by which Linux slews a clock that is kept in step with others, see adjtimex(2).
MAX_DRIFT_PPM = 500


@dataclass(frozen=True, slots=True)
class Exchange:
    """A message and its answer, each with both clocks."""

    head_sent_ns: int
    rank_received_ns: int
    rank_sent_ns: int
    head_received_ns: int

    @property
    def round_trip_ns(self) -> int:
        """The time that both messages were on their way."""
        return (self.head_received_ns - self.head_sent_ns) - (
            self.rank_sent_ns - self.rank_received_ns
        )

    @property
    def offset_ns(self) -> int:
        """By how much the rank's clock is ahead of rank 0's."""
        there = self.rank_received_ns - self.head_sent_ns
        back = self.head_received_ns - self.rank_sent_ns
        return (there - back) // 2


@dataclass(frozen=True, slots=True)
class ClockReading:
    """How far a rank's clock was ahead of rank 0's at a moment of its own."""

    at_ns: int
    offset_ns: int
    bound_ns: int
    """The truth is no further than this from the offset."""


def best_reading(exchanges: Iterable[Exchange]) -> ClockReading:
    """What the quickest exchange says. Raises ValueError if there is none."""
    best = min(exchanges, key=lambda exchange: exchange.round_trip_ns)
    return ClockReading(
        at_ns=(best.rank_received_ns + best.rank_sent_ns) // 2,
        offset_ns=best.offset_ns,
        bound_ns=(max(0, best.round_trip_ns) + 1) // 2,
    )


@dataclass(frozen=True)
class RankClock:
    """A rank's clock against rank 0's, from readings in the order of time.

    Between two readings the offset is interpolated. The bound there is the greater of theirs and
    what the offset changed in between: it may have done so at once, at either end. Before the first
    and after the last reading the offset is that reading's, and the bound grows by what clocks
    drift at most.
    """

    readings: tuple[ClockReading, ...]
    is_same: bool = False
    """It is the very clock of rank 0, which runs on the same host: nothing is to be corrected."""

    @staticmethod
    def from_readings(readings: Sequence[ClockReading], *, has_same_id: bool) -> RankClock:
        """What readings say of a clock whose `clock_id` is rank 0's, or is not.

        Copies of a virtual machine have an id in common, and no clock: who measures a difference
        that is none of its bound believes that.
        """
        is_same = has_same_id and all(abs(one.offset_ns) <= one.bound_ns for one in readings)
        return RankClock(tuple(readings), is_same)

    def to_head(self, at_ns: int) -> int:
        """The moment `at_ns` of the rank's clock on rank 0's."""
        return at_ns - self.offset_ns(at_ns)

    def from_head(self, head_ns: int) -> int:
        """The moment `head_ns` of rank 0's clock on the rank's."""
        # The offset belongs to a moment that is not known yet; it changes slowly enough.
        guess = head_ns + self.offset_ns(head_ns)
        guess = head_ns + self.offset_ns(guess)
        return head_ns + self.offset_ns(guess)

    def offset_ns(self, at_ns: int) -> int:
        """By how much the rank's clock is ahead at a moment of its own."""
        if self.is_same:
            return 0
        index = bisect_left(self.readings, at_ns, key=attrgetter("at_ns"))
        if index in (0, len(self.readings)):
            return self.readings[max(0, index - 1)].offset_ns
        one, other = self.readings[index - 1 : index + 1]
        change = other.offset_ns - one.offset_ns
        return one.offset_ns + change * (at_ns - one.at_ns) // (other.at_ns - one.at_ns)

    def bound_ns(self, first_ns: int, last_ns: int) -> int:
        """How far `to_head` may be off between two moments of the rank's clock."""
        if self.is_same:
            return 0
        inside = [one.at_ns for one in self.readings if first_ns < one.at_ns < last_ns]
        return max(self._bound_at(at_ns) for at_ns in (first_ns, *inside, last_ns))

    def _bound_at(self, at_ns: int) -> int:
        first, last = self.readings[0], self.readings[-1]
        if at_ns <= first.at_ns:
            outside = first.bound_ns + (first.at_ns - at_ns) * MAX_DRIFT_PPM // 10**6
            # The very moment of a reading belongs to what follows, too.
            if at_ns < first.at_ns or first is last:
                return outside
        if at_ns > last.at_ns:
            return last.bound_ns + (at_ns - last.at_ns) * MAX_DRIFT_PPM // 10**6
        return max(
            max(one.bound_ns, other.bound_ns) + abs(other.offset_ns - one.offset_ns)
            for one, other in pairwise(self.readings)
            if one.at_ns <= at_ns <= other.at_ns
        )

    @property
    def drift_ppm(self) -> float:
        """Change of the offset from the first to the last reading, in millionths of the time."""
        first, last = self.readings[0], self.readings[-1]
        if self.is_same or last.at_ns == first.at_ns:
            return 0.0
        return (last.offset_ns - first.offset_ns) / (last.at_ns - first.at_ns) * 1e6

    def as_record(self) -> dict[str, Any]:
        """For a record: offset and bound over all readings, in seconds."""
        first, last = self.readings[0], self.readings[-1]
        return {
            "is_clock_of_rank_0": self.is_same,
            "offset_s": 0.0 if self.is_same else last.offset_ns / 1e9,
            "bound_s": self.bound_ns(first.at_ns, last.at_ns) / 1e9,
            "drift_ppm": self.drift_ppm,
            "num_readings": len(self.readings),
        }


OWN_CLOCK = RankClock((ClockReading(0, 0, 0),), is_same=True)
"""Rank 0's own clock, against itself."""


def clock_id() -> str:
    """The same for all processes that have time.monotonic in common, as far as Linux tells."""
    try:
        # A container may have a time namespace, with a monotonic clock of its own.
        namespace = os.readlink("/proc/self/ns/time")
    except OSError:
        namespace = ""
    return f"{host_id()} {namespace}"


def host_id() -> str:
    """The same for all processes since the host has started; containers share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
