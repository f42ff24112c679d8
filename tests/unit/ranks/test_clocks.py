"""Offsets of clocks, by numbers that can be reckoned by hand."""

from __future__ import annotations

import pytest

from flexbench.ranks import clocks
from flexbench.ranks.clocks import (
    OWN_CLOCK,
    ClockReading,
    Exchange,
    RankClock,
    best_reading,
    clock_id,
)


def test_an_exchange_that_takes_equally_long_both_ways():
    # The rank is 1000 ahead; 30 there, 5 to answer, 30 back.
    exchange = Exchange(100, 1130, 1135, 165)
    assert exchange.round_trip_ns == 60
    assert exchange.offset_ns == 1000


@pytest.mark.parametrize(("there", "back"), [(60, 0), (0, 60), (10, 50)])
def test_the_truth_is_within_the_bound_however_lopsided(there, back):
    exchange = Exchange(0, -400 + there, -400 + there + 7, there + 7 + back)
    assert exchange.round_trip_ns == 60
    assert abs(exchange.offset_ns - -400) == abs(there - back) // 2 <= 30


def test_the_quickest_exchange_counts():
    slow = Exchange(0, 1900, 1900, 1000)  # 900 there and 100 back: looks like 1400 ahead
    quick = Exchange(2000, 3050, 3060, 2111)  # 50 there, 10 to answer, 51 back: 1000 ahead
    assert best_reading([slow, quick, slow]) == ClockReading(3055, 999, 51)
    with pytest.raises(ValueError, match="empty"):
        best_reading([])


def test_one_reading():
    clock = RankClock((ClockReading(at_ns=10**9, offset_ns=400, bound_ns=30),))
    assert clock.to_head(5000) == 4600
    assert clock.from_head(4600) == 5000
    assert clock.drift_ppm == 0
    assert clock.bound_ns(10**9, 10**9) == 30
    # In 2 s a clock drifts 1 ms at most.
    assert clock.bound_ns(10**9, 3 * 10**9) == 30 + 10**6
    assert clock.bound_ns(0, 10**9) == 30 + 10**6 // 2


DRIFTING = RankClock(
    (
        ClockReading(1_000_000, 5000, 30),
        ClockReading(2_000_000, 5100, 40),
        ClockReading(4_000_000, 5000, 20),
    )
)


@pytest.mark.parametrize(
    ("at", "offset"),
    [
        (0, 5000),
        (1_000_000, 5000),
        (1_500_000, 5050),
        (2_000_000, 5100),
        (2_500_000, 5075),
        (4_000_000, 5000),
        (9_000_000, 5000),
    ],
)
def test_between_readings_the_offset_is_interpolated(at, offset):
    assert DRIFTING.offset_ns(at) == offset
    assert DRIFTING.to_head(at) == at - offset
    assert abs(DRIFTING.from_head(at - offset) - at) <= 1


@pytest.mark.parametrize(
    ("first", "last", "bound"),
    [
        (1_200_000, 1_300_000, 40 + 100),
        (3_000_000, 4_000_000, 40 + 100),
        (0, 500_000, 30 + 500),
        (1_000_000, 1_000_000, 40 + 100),
        (4_000_000, 4_000_000, 40 + 100),
        (5_000_000, 6_000_000, 20 + 1000),
        (0, 6_000_000, 20 + 1000),
    ],
)
def test_the_bound_has_what_the_offset_changed(first, last, bound):
    assert DRIFTING.bound_ns(first, last) == bound


def test_the_bound_of_a_stretch_has_readings_inside_of_it():
    clock = RankClock(
        (
            ClockReading(0, 0, 1),
            ClockReading(10, 0, 1),
            ClockReading(20, 7, 1),
            ClockReading(30, 7, 1),
        )
    )
    assert clock.bound_ns(5, 6) == 1
    assert clock.bound_ns(5, 25) == 8


def test_drift_over_all_readings():
    readings = (ClockReading(0, 100, 9), ClockReading(2 * 10**9, 100 + 50_000, 7))
    clock = RankClock(readings)
    assert clock.drift_ppm == 25  # 50 us in 2 s
    assert clock.as_record() == {
        "is_clock_of_rank_0": False,
        "offset_s": 5.01e-05,
        "bound_s": 5.0009e-05,
        "drift_ppm": 25,
        "num_readings": 2,
    }


def test_the_same_clock_needs_no_correction():
    readings = [ClockReading(1000, 25, 30), ClockReading(2000, -25, 30)]
    clock = RankClock.from_readings(readings, has_same_id=True)
    assert (clock.to_head(1500), clock.from_head(1500)) == (1500, 1500)
    assert clock.bound_ns(0, 10**12) == 0
    assert clock.as_record()["bound_s"] == 0
    assert clock.as_record()["offset_s"] == 0
    assert OWN_CLOCK.to_head(7) == 7


@pytest.mark.parametrize(
    ("readings", "has_same_id"),
    [
        ([ClockReading(1000, 25, 30)], False),
        ([ClockReading(1000, 31, 30)], True),
        ([ClockReading(1000, 25, 30), ClockReading(2000, -500, 30)], True),
    ],
)
def test_a_copy_of_a_virtual_machine_has_another_clock(readings, has_same_id):
    clock = RankClock.from_readings(readings, has_same_id=has_same_id)
    assert clock.offset_ns(1000) == readings[0].offset_ns
    assert not clock.is_same


def test_a_time_namespace_has_another_clock(monkeypatch):
    assert clock_id() == clock_id()
    own = clock_id()
    monkeypatch.setattr(clocks.os, "readlink", lambda path: "time:[1]")
    assert clock_id() != own
    assert clock_id().split()[0] == own.split()[0]
