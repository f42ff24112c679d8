"""The search for saturation against simulated services."""

from __future__ import annotations

import heapq
import random

import pytest

from flexbench.core.errors import ConfigError
from flexbench.serving.arrivals import send_times
from flexbench.serving.config import Arrival, Load
from flexbench.serving.figures import compute_figures, measured_window
from flexbench.serving.saturation import (
    Observation,
    RateSearch,
    SaturationSearch,
    StopReason,
)
from flexbench.serving.traces import RequestTrace

PER_CLIENT = 4.9


def play(search, throughput, *, noise=0.0, seed=0, observed=lambda level: {}):
    """Answer a search until it asks no more; its result, and the levels that it asked for."""
    draw = random.Random(seed)  # noqa: S311 - noise, no secret
    levels = []
    while (level := search.next_level()) is not None:
        levels.append(level)
        mean = throughput(level)
        values = {
            "requests_per_s": mean * (1 + draw.gauss(0, noise)),
            "standard_error": mean * noise,
            "tokens_per_s": 32 * mean,
        }
        search.add(level, Observation(**values | observed(level)))
    return search.result(), levels


def slots(capacity):
    """A service with so many slots of constant service time."""
    return lambda clients: PER_CLIENT * min(clients, capacity)


def batching(clients):
    """Each client more slows all down: X(c) = c / (a + b c), at most 100."""
    return clients / (0.2 + 0.01 * clients)


def thrashing(capacity):
    """Beyond its slots it gets slower."""
    return lambda clients: (
        PER_CLIENT * capacity * min(clients / capacity, (capacity / clients) ** 0.8)
    )


def test_capacity_8_takes_six_points():
    result, levels = play(SaturationSearch(), slots(8))
    assert levels == [1, 2, 4, 8, 16, 7]
    assert (result.knee_level, result.knee_low, result.knee_high) == (8, 8, 8)
    assert result.highest_requests_per_s == pytest.approx(8 * PER_CLIENT)
    assert result.highest_tokens_per_s == pytest.approx(32 * 8 * PER_CLIENT)
    assert result.reason is StopReason.PLATEAU
    assert result.confidence == "sure: 8 reach it, 7 do not"
    assert not result.is_lower_bound
    assert result.slo_level is None
    assert result.num_points == 6


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8, 13, 20, 33, 100])
def test_without_noise_every_capacity_is_exact(capacity):
    result, levels = play(SaturationSearch(), slots(capacity))
    assert (result.knee_level, result.knee_low, result.knee_high) == (capacity,) * 3
    assert len(levels) <= 11


@pytest.mark.parametrize("capacity", [1, 5, 8, 13])
def test_with_one_percent_of_noise_95_percent_are_exact(capacity):
    found = [play(SaturationSearch(), slots(capacity), noise=0.01, seed=n) for n in range(50)]
    assert sum(result.knee_level == capacity for result, _ in found) >= 48
    assert max(len(levels) for _, levels in found) <= 12


def test_with_three_percent_of_noise_capacity_8_is_mostly_exact():
    found = [play(SaturationSearch(), slots(8), noise=0.03, seed=seed)[0] for seed in range(20)]
    assert sum(result.knee_level == 8 for result in found) >= 17
    assert sum(result.knee_low <= 8 <= result.knee_high for result in found) >= 18


def test_a_large_capacity_is_found_to_within_the_noise():
    for seed in range(5):
        result, levels = play(SaturationSearch(), slots(100), noise=0.005, seed=seed)
        assert result.knee_level == pytest.approx(100, abs=3)
        assert result.highest_low <= 100 * PER_CLIENT * 1.01
        assert len(levels) <= 16


def test_the_interval_of_the_highest_throughput_holds_the_truth():
    inside = 0
    for seed in range(20):
        result, _ = play(SaturationSearch(), slots(8), noise=0.01, seed=seed)
        inside += result.highest_low <= 8 * PER_CLIENT <= result.highest_high
    assert inside >= 17


def test_a_batching_service_has_the_knee_where_97_percent_are_reached():
    result, levels = play(SaturationSearch(), batching)
    # 512 gives 96.24, the first level after which a doubling brings less than 5 %
    assert result.highest_level == 512
    assert result.highest_requests_per_s == pytest.approx(512 / 5.32)
    # 97 % of that: c = 0.2 x / (1 - 0.01 x) for x = 93.35, so 281
    assert result.knee_level == pytest.approx(281, rel=0.05)
    assert len(levels) <= 16


@pytest.mark.parametrize("capacity", [5, 8, 12, 20])
def test_the_peak_of_a_service_that_thrashes_is_found(capacity):
    result, levels = play(SaturationSearch(), thrashing(capacity), noise=0.005, seed=1)
    assert result.knee_level == capacity
    assert result.highest_level == capacity
    assert len(levels) <= 15


def test_conditions_are_met_up_to_an_exact_level():
    # Latency is clients / throughput: with 19 of them 19 / 39.2 = 0.485 s, with 20 0.51 s.
    result, levels = play(
        SaturationSearch(has_slo=True),
        slots(8),
        observed=lambda level: {"meets_slo": level / slots(8)(level) < 0.5},
    )
    assert result.slo_level == 19
    assert result.slo_requests_per_s == pytest.approx(8 * PER_CLIENT)
    assert result.reason is StopReason.SLO
    # A violation is believed when it was seen twice.
    assert levels == [1, 2, 4, 8, 16, 32, 32, 24, 24, 20, 20, 18, 19]
    assert result.knee_level == 8  # known without a further point


def test_conditions_that_end_before_the_knee():
    result, levels = play(
        SaturationSearch(has_slo=True), slots(8), observed=lambda level: {"meets_slo": level <= 6}
    )
    assert levels == [1, 2, 4, 8, 8, 6, 7, 7]
    assert result.slo_level == 6
    assert result.slo_requests_per_s == pytest.approx(6 * PER_CLIENT)
    assert result.knee_level is None
    assert result.is_lower_bound


def test_conditions_that_nothing_meets():
    result, levels = play(
        SaturationSearch(has_slo=True), slots(8), observed=lambda level: {"meets_slo": False}
    )
    assert levels == [1, 1]
    assert (result.slo_level, result.slo_requests_per_s) == (None, None)


def test_a_gross_violation_is_believed_at_once():
    _, levels = play(
        SaturationSearch(has_slo=True),
        slots(8),
        observed=lambda level: {"meets_slo": level <= 6, "is_gross_violation": level > 6},
    )
    assert levels == [1, 2, 4, 8, 6, 7]


def test_one_outlier_does_not_end_a_search_within_conditions():
    # Up to 64 clients are within the conditions; 5 % of all points are not, by chance.
    exact = 0
    for seed in range(100):
        draw = random.Random(seed)  # noqa: S311 - noise, no secret
        result, _ = play(
            SaturationSearch(has_slo=True),
            slots(100),
            observed=lambda level, draw=draw: {"meets_slo": level <= 64 and draw.random() > 0.05},
        )
        exact += result.slo_level == 64
    # About ten levels: two of three are bad with 0.7 %.
    assert exact >= 88


def test_conditions_that_are_met_on_a_clear_plateau_end_the_search():
    result, levels = play(SaturationSearch(has_slo=True), slots(8))
    assert levels == [1, 2, 4, 8, 16, 32]  # two doublings brought nothing
    assert result.reason is StopReason.PLATEAU
    assert (result.slo_level, result.is_slo_lower_bound) == (32, True)
    assert "more clients may also meet the conditions" in result.confidence


def test_a_point_that_was_too_short_is_repeated_for_longer():
    search = SaturationSearch()
    assert search.length_factor(1) == 1
    search.add(1, Observation(requests_per_s=9.0, is_too_short=True))
    assert (search.next_level(), search.length_factor(1)) == (1, 3)
    search.add(1, Observation(requests_per_s=8.0, is_too_short=True))
    assert (search.next_level(), search.length_factor(1)) == (1, 9)
    search.add(1, Observation(requests_per_s=PER_CLIENT))
    assert search.next_level() == 2
    assert search.length_factor(2) == 1
    result, levels = play(search, slots(8))
    assert levels == [2, 4, 8, 16, 7]  # those that were too short are in no estimate
    assert result.confidence == "sure: 8 reach it, 7 do not"


@pytest.mark.parametrize("search", [SaturationSearch(), RateSearch(max_rate=100.0)])
def test_a_service_that_never_answers_in_time_ends_the_search_without_a_verdict(search):
    result, levels = play(search, lambda level: 0.0, observed=lambda _: {"is_too_short": True})
    assert levels == [1] * 4
    assert (result.reason, result.knee_level) == (StopReason.UNFINISHED, None)
    assert result.highest_requests_per_s is None


def test_a_point_that_was_stopped_is_not_allowed_whatever_its_rate():
    result, levels = play(
        SaturationSearch(max_error_rate=1.0),
        slots(100),
        observed=lambda level: {"is_stopped": level > 10, "error_rate": 0.2},
    )
    assert levels[:8] == [1, 2, 4, 8, 16, 12, 10, 11]
    assert (result.reason, result.slo_level) == (StopReason.ERRORS, 10)


def test_conditions_that_are_always_met_end_at_the_limit():
    result, levels = play(SaturationSearch(has_slo=True, max_level=20), slots(8))
    assert levels == [1, 2, 4, 8, 16, 20]
    assert (result.slo_level, result.knee_level) == (20, 8)


def test_a_service_that_always_fails():
    result, levels = play(
        SaturationSearch(), lambda level: 0.0, observed=lambda level: {"error_rate": 1.0}
    )
    assert levels == [1]
    assert result.reason is StopReason.ERRORS
    assert result.knee_level is None
    assert result.highest_requests_per_s is None
    assert result.is_lower_bound


def test_a_service_that_refuses_more_than_10_clients():
    result, _ = play(
        SaturationSearch(),
        slots(100),
        observed=lambda level: {"error_rate": 0.3 if level > 10 else 0.0},
    )
    assert result.reason is StopReason.ERRORS
    assert result.slo_level == 10
    assert result.highest_level == 10


def test_errors_of_one_moment_are_not_believed():
    errors = iter([0.0, 0.0, 0.05])
    result, levels = play(
        SaturationSearch(), slots(8), observed=lambda level: {"error_rate": next(errors, 0.0)}
    )
    assert levels[:5] == [1, 2, 4, 4, 4]  # the third tells which of the two it was
    assert result.knee_level == 8


def test_when_the_client_is_the_limit_the_result_is_a_lower_bound():
    result, levels = play(
        SaturationSearch(),
        slots(20),
        observed=lambda level: {"is_client_limited": level > 20},
    )
    assert levels == [1, 2, 4, 8, 16, 32, 32]  # asked twice before it is believed
    assert result.reason is StopReason.CLIENT_LIMITED
    assert result.is_lower_bound
    assert result.knee_level is None
    assert result.highest_requests_per_s == pytest.approx(20 * PER_CLIENT)
    assert "the load generator saturated" in result.confidence


def test_growth_until_the_limit_has_no_knee():
    for curve in (slots(100), batching):
        result, levels = play(SaturationSearch(max_level=64), curve)
        assert levels == [1, 2, 4, 8, 16, 32, 64]
        assert result.reason is StopReason.LIMIT
        assert result.knee_level is None
        assert result.is_lower_bound


def test_a_knee_just_before_the_limit_is_seen():
    result, levels = play(SaturationSearch(max_level=6), slots(5), noise=0.005)
    assert levels == [1, 2, 4, 6, 5]
    assert result.knee_level == 5
    assert result.reason is StopReason.PLATEAU


def test_levels_that_are_known_are_not_asked_for():
    search = SaturationSearch()
    for level in (16, 8, 4, 1, 2):
        search.add(level, Observation(requests_per_s=slots(8)(level)))
    assert search.next_level() == 7


def test_a_result_before_the_end_says_so():
    search = SaturationSearch()
    assert search.result().highest_requests_per_s is None
    search.add(1, Observation(requests_per_s=5.0))
    result = search.result()
    assert result.reason is StopReason.UNFINISHED
    assert result.knee_level is None
    assert result.highest_requests_per_s == 5.0


def test_the_number_of_points_is_bounded_whatever_comes():
    draw = random.Random(3)  # noqa: S311 - noise, no secret
    for _ in range(5):
        search = SaturationSearch(max_points=25)
        result, levels = play(search, lambda level: draw.uniform(1, 100), noise=0.5)
        assert len(levels) <= 25
        assert result.num_points == len(levels)


def test_one_observation_of_many_is_pooled_by_its_certainty():
    search = SaturationSearch(max_level=1)
    search.add(1, Observation(requests_per_s=10.0, standard_error=1.0))
    search.add(1, Observation(requests_per_s=11.0, standard_error=0.5))
    # weights 1 and 4: (10 + 4 * 11) / 5, and 1 / sqrt(5) of error
    result = search.result()
    assert result.highest_requests_per_s == pytest.approx(10.8)
    assert result.highest_high == pytest.approx(10.8 + 1.96 / 5**0.5)


@pytest.mark.parametrize("capacity", [0.3, 3.0, 40.0, 333.0])
def test_the_rate_that_a_service_sustains_is_found_to_5_percent(capacity):
    for seed in range(5):
        result, levels = play(
            RateSearch(max_rate=10_000.0), lambda rate: min(rate, capacity), noise=0.01, seed=seed
        )
        assert result.knee_level == pytest.approx(capacity, rel=0.05)
        assert result.highest_requests_per_s == pytest.approx(capacity, rel=0.03)
        assert result.knee_high / result.knee_level <= 1.05
        assert len(levels) <= 20


def open_loop(load, seed, *, capacity, service_s=0.1, deviation_s=0.03):
    """What a point shows of a server with `capacity` slots and a queue."""
    draw = random.Random(seed)  # noqa: S311 - noise, no secret
    slots = [0.0] * capacity
    traces = []
    for due in send_times(load, seed):
        service = max(0.01, draw.gauss(service_s, deviation_s))
        end = max(due, heapq.heappop(slots)) + service
        heapq.heappush(slots, end)
        traces.append(answered(due, end))
    window = measured_window(load, traces)
    figures = compute_figures(
        traces, window_s=window.window_s, is_streaming=True, is_open_loop=True
    )
    return Observation.from_figures(figures, meets_slo=True, is_client_limited=False)


def answered(due, end):
    """The trace of a request that was sent when it was due."""
    return RequestTrace(
        index=0,
        worker=0,
        scheduled_ns=round(due * 1e9),
        sent_ns=round(due * 1e9),
        connected_ns=None,
        content_ns=[round(end * 1e9)],
        ended_ns=round(end * 1e9),
        prompt_tokens=1,
        max_new_tokens=1,
        output_tokens=1,
        is_counted_by_server=True,
        server_prompt_tokens=None,
        finish_reason="length",
        is_unfinished=False,
        failure=None,
        failure_message=None,
    )


@pytest.mark.parametrize(
    ("arrival", "burst_size", "tolerance"),
    [(Arrival.CONSTANT, 1, 0.08), (Arrival.POISSON, 1, 0.1), (Arrival.BURST, 10, 0.1)],
)
def test_the_rate_of_a_queue_is_found_whatever_the_arrivals(arrival, burst_size, tolerance):
    # 8 slots of 0.1 s: 80 requests/s.
    for seed in range(4):
        search = RateSearch(max_rate=1000.0, start_rate=20.0)
        while (rate := search.next_level()) is not None:
            load = Load(
                rate_per_s=rate,
                arrival=arrival,
                burst_size=burst_size,
                duration_s=2.5 * search.length_factor(rate),
            )
            search.add(rate, open_loop(load, 100 * seed + search.num_points, capacity=8))
        result = search.result()
        assert result.knee_level == pytest.approx(80, rel=tolerance)
        assert result.knee_low <= 80 * 1.02
        assert result.knee_high >= 80 * 0.98
        assert result.num_points <= 25


def test_answers_that_are_slower_than_the_point_are_no_verdict_on_the_rate():
    # 4.4 s of service: in 2.5 s there is no answer, and in 22.5 s there are enough latencies.
    load = Load(rate_per_s=1.0, duration_s=2.5)
    short = open_loop(load, 0, capacity=8, service_s=4.4, deviation_s=0.0)
    assert short.is_too_short
    assert short.error_rate == 0.0
    longer = open_loop(
        Load(rate_per_s=1.0, duration_s=22.5), 0, capacity=8, service_s=4.4, deviation_s=0.0
    )
    assert not longer.is_too_short
    assert longer.requests_per_s == pytest.approx(1.0, rel=0.06)


def test_a_service_that_collapses_under_too_high_a_rate():
    result, _ = play(RateSearch(max_rate=1000.0), lambda rate: rate if rate <= 40 else 1600 / rate)
    assert result.knee_level == pytest.approx(40, rel=0.05)


def test_the_rate_within_conditions():
    result, _ = play(
        RateSearch(max_rate=1000.0, has_slo=True),
        lambda rate: min(rate, 40),
        observed=lambda rate: {"meets_slo": rate < 25},
    )
    assert result.slo_level == pytest.approx(25, rel=0.05)
    assert result.slo_level < 25
    assert result.reason is StopReason.SLO
    assert result.knee_level is None


def test_a_rate_that_was_not_offered_is_not_held_against_the_service():
    # Of a Poisson process of 10/s, 9.5/s came in this time, and all were answered.
    search = RateSearch(max_rate=10.0, start_rate=10.0)
    search.add(10.0, Observation(requests_per_s=9.5, offered_per_s=9.5))
    assert search.next_level() is None
    assert search.result().reason is StopReason.LIMIT


def test_a_rate_that_the_client_could_not_send():
    result, levels = play(
        RateSearch(max_rate=1000.0),
        lambda rate: min(rate, 40),
        observed=lambda rate: {"is_client_limited": rate > 30},
    )
    assert levels[-2:] == [32.0, 32.0]
    assert result.reason is StopReason.CLIENT_LIMITED
    assert result.is_lower_bound


def test_rates_that_only_fail_end_the_search():
    result, levels = play(
        RateSearch(max_rate=100.0), lambda rate: 0.0, observed=lambda rate: {"error_rate": 1.0}
    )
    assert levels == [1.0]
    assert (result.reason, result.knee_level) == (StopReason.ERRORS, None)
    assert result.is_lower_bound


def test_a_first_rate_that_nothing_sustains_is_gone_below_but_not_for_ever():
    result, levels = play(RateSearch(max_rate=100.0), lambda rate: 0.0)
    assert result.knee_level is None
    assert len(levels) < 20


def test_searches_refuse_what_makes_none():
    with pytest.raises(ConfigError, match="--max-clients"):
        SaturationSearch(max_level=0)
    with pytest.raises(ConfigError, match="--max-rate: must be at least 10"):
        RateSearch(max_rate=5.0, start_rate=10.0)
    with pytest.raises(ConfigError, match="--max-error-rate"):
        SaturationSearch(max_error_rate=1.5)
