"""When the requests of an open loop are due."""

from __future__ import annotations

from itertools import chain, islice, pairwise

import pytest

from flexbench.serving.arrivals import send_times, share
from flexbench.serving.config import Arrival, Load


def test_a_constant_rate_spaces_requests_evenly():
    load = Load(rate_per_s=4, num_requests=5)
    assert list(send_times(load, seed=0)) == [0, 0.25, 0.5, 0.75, 1.0]


def test_constant_times_do_not_drift():
    load = Load(rate_per_s=10, duration_s=1e6)
    assert next(islice(send_times(load, seed=0), 1_000_000, None)) == 100_000.0


def test_bursts_come_at_once():
    load = Load(rate_per_s=6, arrival=Arrival.BURST, burst_size=3, num_requests=7)
    assert list(send_times(load, seed=0)) == [0, 0, 0, 0.5, 0.5, 0.5, 1.0]


def test_a_burst_size_is_for_bursts_only():
    load = Load(rate_per_s=2, arrival=Arrival.CONSTANT, burst_size=3, num_requests=3)
    assert list(send_times(load, seed=0)) == [0, 0.5, 1.0]


def test_the_duration_ends_a_load_before_its_last_moment():
    load = Load(rate_per_s=4, duration_s=1.0)
    assert list(send_times(load, seed=0)) == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(("limits", "number"), [((3, 100.0), 3), ((1000, 2.0), 20)])
def test_whichever_limit_comes_first_ends_a_load(limits, number):
    load = Load(rate_per_s=10, num_requests=limits[0], duration_s=limits[1])
    assert len(list(send_times(load, seed=0))) == number


def poisson(rate: float, seed: int, number: int) -> list[float]:
    load = Load(rate_per_s=rate, arrival=Arrival.POISSON, num_requests=number)
    return list(send_times(load, seed=seed))


def test_poisson_gaps_are_exponential():
    number = 20_000
    times = [0.0, *poisson(50, 7, number)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) >= 0
    # The standard error of both is about 1 / sqrt(20,000) = 0.7 % of 1/50 s.
    mean = sum(gaps) / number
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / number) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert deviation == pytest.approx(1 / 50, rel=0.05)
    # Of an exponential distribution, 1/e is above the mean.
    assert sum(gap > 1 / 50 for gap in gaps) / number == pytest.approx(0.368, abs=0.015)


def test_poisson_times_depend_on_the_seed_alone():
    assert poisson(50, 7, 100) == poisson(50, 7, 100)
    assert poisson(50, 7, 100) != poisson(50, 8, 100)


def test_another_rate_stretches_the_same_poisson_times():
    slow, fast = poisson(10, 3, 50), poisson(20, 3, 50)
    assert slow == pytest.approx([2 * moment for moment in fast])


def test_a_poisson_load_ends_with_its_duration():
    load = Load(rate_per_s=1000, arrival=Arrival.POISSON, duration_s=1.0)
    times = list(send_times(load, seed=1))
    assert times[-1] < 1.0
    # The standard deviation of a Poisson number is its root: 5 * sqrt(1000) = 158.
    assert abs(len(times) - 1000) < 158


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_shares_are_a_partition(num_workers):
    shares = [list(share(iter(range(20)), worker, num_workers)) for worker in range(num_workers)]
    assert sorted(chain(*shares)) == list(range(20))
    assert shares[-1][0] == num_workers - 1
