"""The linear programme, on problems whose answers can be worked out by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="it solves the linear programme")
pytest.importorskip("torch", reason="plans are reckoned with torch's types")

from flexbench.dist.placement import HomeBytes
from flexbench.dist.policy_search.linear import (
    HomeSpeeds,
    Load,
    PassCost,
    Problem,
    best_placement,
)
from flexbench.dist.policy_search.memory import Demand, Limits

MIB = 2**20
ALL_ON_GPU = (100, 0, 100, 0, 100, 0)


def demand(weights=0, cache=0, activations=0, weight_buffer=0) -> Demand:
    """In MiB."""
    return Demand(
        weights=weights * MIB,
        cache=cache * MIB,
        activations=activations * MIB,
        fixed=HomeBytes(),
        weight_buffers=HomeBytes(gpu=weight_buffer * MIB),
        activation_buffers=HomeBytes(),
        cache_buffers={"cpu": HomeBytes(), "disk": HomeBytes()},
    )


def limits(gpu=None, cpu=0, disk=10**6) -> Limits:
    return Limits(gpu=None if gpu is None else gpu * MIB, cpu=cpu * MIB, disk=disk * MIB)


def solve(prefill: PassCost, decode: PassCost, what: Demand, room: Limits, **more):
    homes = {"cpu", "disk"} if room.gpu is not None else {"disk"}
    speeds = more.pop("speeds", {name: HomeSpeeds() for name in homes})
    return best_placement(
        Problem(
            prefill=[prefill],
            decode=[decode],
            num_tokens=more.pop("num_tokens", 11),
            demands=[what],
            limits=room,
            speeds=speeds,
            **more,
        )
    )


def cost(computing=1.0, loads=(), **more) -> PassCost:
    return PassCost(
        computing=computing, loaded_computing=more.pop("loaded", 0.0), loads=loads, **more
    )


def loads(kind: str, **seconds: float) -> list[Load]:
    return [Load(kind=kind, home=name, seconds=value) for name, value in seconds.items()]


def test_what_fits_is_on_the_gpu():
    slow = loads("weights", disk=10.0) + loads("cache", disk=10.0)
    found = solve(cost(loads=slow), cost(loads=slow), demand(100, 100, 1), limits(cpu=201))
    assert found.percent == ALL_ON_GPU
    assert found.seconds == pytest.approx(1 + 10 * 1)


def test_what_does_not_fit_at_all_has_no_placement():
    assert solve(cost(), cost(), demand(100), limits(cpu=10, disk=20)) is None


def test_without_cuda_gpu_and_cpu_share_a_limit():
    slow = loads("weights", disk=10.0)
    found = solve(cost(loads=slow), cost(loads=slow), demand(weights=100), limits(cpu=40))
    assert found.percent[:2] == (40, 0)
    assert found.seconds == pytest.approx(11 * 0.6 * 10)


def test_loads_that_hide_behind_computing_cost_nothing():
    hidden = loads("weights", disk=0.9)
    found = solve(cost(loads=hidden), cost(loads=hidden), demand(weights=100), limits(cpu=1))
    assert found.percent[:2] == (1, 0)
    assert found.seconds == pytest.approx(11)


def test_without_overlap_they_cost_what_they_take():
    serial = cost(loads=loads("weights", disk=0.5), is_overlapped=False)
    found = solve(serial, serial, demand(weights=100), limits(cpu=0))
    assert found.seconds == pytest.approx(11 * 1.5)


def test_computing_that_is_disturbed_takes_longer():
    """For 0.5 s of loading, computing does half of what it would: 0.25 s are to be made up for."""
    load = cost(loads=loads("weights", disk=0.5))
    found = solve(
        load, load, demand(weights=100), limits(cpu=0), speeds={"disk": HomeSpeeds(computing=0.5)}
    )
    assert found.seconds == pytest.approx(11 * 1.25)


def test_of_two_kinds_the_dearer_one_stays():
    """The cache is read once a step, the weights as well, but they take twice the time a byte."""
    both = loads("weights", disk=20.0) + loads("cache", disk=10.0)
    found = solve(
        cost(loads=both), cost(loads=both), demand(weights=100, cache=100), limits(cpu=100)
    )
    assert found.percent[:4] == (100, 0, 0, 0)


def test_a_gpu_takes_what_it_can_and_memory_comes_before_disk():
    slow = loads("weights", cpu=10.0, disk=100.0)
    found = solve(cost(loads=slow), cost(loads=slow), demand(weights=100), limits(gpu=30, cpu=50))
    assert found.percent[:2] == (30, 50)


def test_a_buffer_is_only_needed_when_something_is_elsewhere():
    slow = loads("weights", disk=10.0)
    whole = solve(
        cost(loads=slow),
        cost(loads=slow),
        demand(weights=100, weight_buffer=40),
        limits(cpu=100),
    )
    assert whole.percent[:2] == (100, 0)
    less = solve(
        cost(loads=slow), cost(loads=slow), demand(weights=100, weight_buffer=40), limits(cpu=99)
    )
    assert less.percent[:2] == (59, 0)


def test_shares_that_are_given_are_kept():
    fixed = (10.0, 20.0, 30.0, 40.0, 100.0, 0.0)
    slow = loads("weights", cpu=1.0, disk=10.0)
    found = solve(
        cost(loads=slow),
        cost(loads=slow),
        demand(100, 100),
        limits(gpu=100, cpu=100),
        percent=fixed,
    )
    assert found.percent == fixed
    assert found.seconds == pytest.approx(11 * 7.0)
