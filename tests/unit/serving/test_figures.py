"""From traces to figures: every expected number can be computed by hand."""

from __future__ import annotations

import heapq
import json
import random

import pytest

from flexbench.core import metrics
from flexbench.serving.config import Load
from flexbench.serving.figures import (
    LATENCIES,
    PointFigures,
    compute_figures,
    distribution,
    measured_window,
    percentile,
)
from flexbench.serving.saturation import Observation, SaturationSearch
from flexbench.serving.traces import RequestTrace

MS = 1_000_000
S = 1_000_000_000


def trace(sent=0.0, content=(), *, scheduled=None, ended=None, tokens=None, **changes):
    """A request with times in seconds; the answer ends with its last content."""
    content_ns = [round(at * S) for at in content]
    values = {
        "index": 0,
        "worker": 0,
        "scheduled_ns": round((sent if scheduled is None else scheduled) * S),
        "sent_ns": round(sent * S),
        "connected_ns": None,
        "content_ns": content_ns,
        "ended_ns": round(ended * S) if ended is not None else (content_ns or [None])[-1],
        "prompt_tokens": 64,
        "max_new_tokens": 3,
        "output_tokens": len(content) if tokens is None else tokens,
        "is_counted_by_server": True,
        "server_prompt_tokens": None,
        "finish_reason": "length",
        "is_unfinished": False,
        "failure": None,
        "failure_message": None,
    }
    return RequestTrace(**values | changes)


def figures(traces, window_s=10.0, **options):
    return compute_figures(traces, window_s=window_s, **{"is_streaming": True} | options)


def test_percentiles_are_interpolated_linearly_as_numpys():
    values = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert percentile(values, 0.5) == 30.0
    assert percentile(values, 0.9) == pytest.approx(46.0)  # position 3.6
    assert percentile(values, 0.0) == 10.0
    assert percentile(values, 1.0) == 50.0
    assert percentile([7.0], 0.99) == 7.0


def test_distribution_is_in_seconds():
    found = distribution([3 * S, 1 * S, 2 * S])
    assert (found.count, found.mean, found.min, found.p50, found.max) == (3, 2.0, 1.0, 2.0, 3.0)
    assert found.statistic("p99.9") == pytest.approx(2.998)
    assert distribution([]) is None


def test_latencies_of_one_request_by_their_definitions():
    # scheduled at 0.9, sent at 1.0, chunks at 1.2, 1.3 and 1.6
    found = figures([trace(1.0, (1.2, 1.3, 1.6), scheduled=0.9)])
    assert found.ttft.p50 == pytest.approx(0.2)
    assert found.ttft_scheduled.p50 == pytest.approx(0.3)
    assert (found.itl.count, found.itl.min, found.itl.max) == (2, 0.1, pytest.approx(0.3))
    assert found.tpot.p50 == pytest.approx((0.6 - 0.2) / 2)
    assert found.e2e.p50 == pytest.approx(0.6)
    assert found.e2e_scheduled.p50 == pytest.approx(0.7)
    assert found.send_lateness.max == pytest.approx(0.1)


def test_gaps_are_pooled_over_requests():
    # gaps 0.1 0.1 of the first, 0.4 of the second
    found = figures([trace(0, (1, 1.1, 1.2)), trace(0, (1, 1.4))])
    assert found.itl.count == 3
    assert found.itl.mean == pytest.approx(0.2)


def test_several_tokens_in_a_chunk():
    # six tokens in two chunks, 0.5 s apart
    found = figures([trace(0, (1.0, 1.5), tokens=6)])
    assert found.tokens_per_chunk == 3.0
    assert found.tpot.p50 == pytest.approx(0.1)
    assert found.output_tokens_per_s == pytest.approx(0.6)


def test_tokens_that_all_came_in_one_chunk_have_no_tpot():
    found = figures([trace(0, (1.0,), tokens=6)])
    assert found.tpot is None
    assert found.itl is None
    assert found.ttft.p50 == 1.0


def test_end_to_end_is_until_the_last_content_not_the_end_of_the_stream():
    assert figures([trace(0, (1.0, 2.0), ended=2.5)]).e2e.p50 == 2.0


def test_without_streaming_there_is_no_ttft():
    found = figures([trace(0, (2.0,), tokens=3)], is_streaming=False)
    assert (found.ttft, found.ttft_scheduled, found.itl, found.tpot) == (None,) * 4
    assert found.tokens_per_chunk is None
    assert found.e2e.p50 == 2.0


def test_rates_count_what_came_in_the_window():
    traces = [
        trace(0, (1, 2, 3)),  # ended in the window: 3 tokens
        trace(8, (9, 10, 11, 12), max_new_tokens=4),  # two of four tokens in it
        trace(9, (11, 12)),  # nothing in it
    ]
    found = figures(traces)
    assert found.requests_per_s == pytest.approx(1 / 10)
    assert found.output_tokens == 5
    assert found.output_tokens_per_s == pytest.approx(0.5)
    assert found.input_tokens_per_s == pytest.approx(2 * 64 / 10)
    # All three were sent in it: their latencies count.
    assert found.e2e.count == 3


def test_the_servers_count_of_the_prompt_is_preferred_and_compared():
    traces = [
        trace(0, (1,), server_prompt_tokens=66),
        trace(0, (1,), server_prompt_tokens=64),
        trace(0, (1,), is_counted_by_server=False),
    ]
    found = figures(traces)
    assert found.input_tokens_per_s == pytest.approx((66 + 64 + 64) / 10)
    assert found.share_other_prompt_length == 0.5
    assert found.mean_prompt_length_difference == 1.0
    assert found.share_counted_by_server == pytest.approx(2 / 3)


def test_short_outputs_and_new_connections():
    found = figures([trace(0, (1, 2, 3)), trace(0, (1, 2), connected_ns=5)])
    assert found.share_short_outputs == 0.5
    assert found.num_new_connections == 1


def test_failed_requests_count_in_nothing_but_errors():
    failed = {"failure": "timeout", "failure_message": "no end after 5 s"}
    traces = [
        trace(0, (1, 2, 3)),
        trace(0, (1, 2), ended=5, **failed),
        trace(0, (), ended=1, failure="refused"),
        trace(0, (), ended=1, failure="refused"),
    ]
    found = figures(traces)
    assert found.failures == {"refused": 2, "timeout": 1}
    assert (found.num_ok, found.num_failed, found.error_rate) == (1, 3, 0.75)
    assert found.output_tokens == 3
    assert found.requests_per_s == pytest.approx(0.1)
    assert found.e2e.count == found.ttft.count == 1


def test_unfinished_requests_are_neither_done_nor_failed():
    found = figures([trace(0, (1, 2, 3)), trace(5, (6, 7), ended=None, is_unfinished=True)])
    assert (found.num_ok, found.num_failed, found.num_unfinished) == (1, 0, 1)
    assert found.error_rate == 0.0
    assert found.e2e.count == 1
    assert found.output_tokens == 5  # generated all the same


def test_in_flight_is_time_in_flight_over_the_window():
    # 4 s, 2 s that end as others begin, and one that goes on beyond the window: 5 of its s
    traces = [trace(0, (4,)), trace(4, (6,)), trace(5, (20,))]
    found = figures(traces)
    assert found.in_flight == pytest.approx((4 + 2 + 5) / 10)
    assert found.max_in_flight == 2
    assert figures([trace(0, (2,)), trace(2, (4,))]).max_in_flight == 1


def test_goodput_counts_requests_that_meet_the_conditions():
    traces = [trace(0, (1,)), trace(0, (2,)), trace(0, (3,))]
    found = figures(traces, meets=lambda one: one.content_ns[0] <= 2 * S)
    assert found.goodput == pytest.approx(0.2)
    assert figures(traces).goodput is None


def test_what_was_asked_and_what_was_sent_per_second():
    # every 0.1 s by schedule, every 0.2 s in truth
    traces = [trace(0.2 * n, (9,), scheduled=0.1 * n) for n in range(11)]
    found = figures(traces)
    assert found.scheduled_per_s == pytest.approx(10.0)
    assert found.sent_per_s == pytest.approx(5.0)


def test_rates_of_bursts_are_those_of_whole_bursts():
    # 10 at once every 0.5 s: 20/s. The last burst, which has no time after it, may be cut off.
    traces = [trace(0.5 * (n // 10), (9,)) for n in range(34)]
    found = figures(traces)
    assert found.scheduled_per_s == pytest.approx(20.0)
    assert found.sent_per_s == pytest.approx(20.0)
    assert figures(traces[:10]).scheduled_per_s is None


def test_a_burst_that_was_sent_late_is_still_one_burst():
    # Each request of a burst 10 ms after the one before: the bursts are 0.5 s apart all the same.
    traces = [
        trace(0.5 * (n // 10) + 0.01 * (n % 10), (9,), scheduled=0.5 * (n // 10)) for n in range(30)
    ]
    assert figures(traces).sent_per_s == pytest.approx(20.0)


def test_what_was_due_in_the_steady_window_of_an_open_loop():
    # 10/s for 5 s, each answered in 0.2 s: the window begins at 0.2 s.
    traces = [trace(n / 10, (n / 10 + 0.2,)) for n in range(50)]
    found = figures(traces, window_s=5.0, is_open_loop=True)
    assert found.steady_scheduled_per_s == pytest.approx(10.0)
    # 48 are due in it; one more or less by chance is an error of half a request.
    assert found.steady_scheduled_error == pytest.approx(10 * 0.5 / 48, rel=0.05)
    assert figures(traces, window_s=5.0).steady_scheduled_per_s is None


def test_figures_of_nothing_are_none():
    found = figures([], window_s=0.0)
    record = found.as_record()
    for name in (*LATENCIES, "requests_per_s", "error_rate", "steady_requests_per_s", "in_flight"):
        assert record[name] is None, name
    assert (found.num_requests, found.max_in_flight) == (0, 0)


def test_a_request_that_was_never_sent():
    found = figures([trace(0, (), sent_ns=None, is_unfinished=True), trace(0, (1,))])
    assert found.num_unfinished == 1
    assert found.send_lateness.count == 1


def test_figures_survive_json():
    found = figures([trace(0, (1, 2, 3)), trace(0, (), ended=1, failure="refused")])
    assert PointFigures.from_record(json.loads(json.dumps(found.as_record()))) == found


def test_figures_carry_the_names_of_the_metrics():
    names = set(figures([]).as_record())
    serving = metrics.METRICS[metrics.METRICS.index(metrics.TTFT) :]
    assert {metric.name for metric in serving} <= names


@pytest.mark.parametrize(
    ("load", "stopped", "window", "steady"),
    [
        # all sent: until the last end; steady until the last sending
        (Load(concurrency=2, num_requests=3), None, 7.0, 4.0),
        # ended by time: all of it, although nothing came after 7 s
        (Load(concurrency=2, duration_s=9.0), None, 9.0, 9.0),
        (Load(concurrency=2, num_requests=50, duration_s=9.0), None, 9.0, 9.0),
        # all sent before the time was over
        (Load(concurrency=2, num_requests=3, duration_s=9.0), None, 7.0, 4.0),
        (Load(concurrency=2, num_requests=3, duration_s=5.0), None, 5.0, 4.0),
        # ended from outside
        (Load(concurrency=2, num_requests=50), 6.0, 6.0, 6.0),
    ],
)
def test_measured_window(load, stopped, window, steady):
    traces = [trace(0, (3,)), trace(0, (4,)), trace(4, (7,))]
    found = measured_window(load, traces, stopped_after_s=stopped)
    assert (found.window_s, found.steady_end_s) == (window, steady)


def closed_loop(concurrency, capacity, *, service_s=0.1, duration_s=2.5, pause_s=0.0, draw=None):
    """What a server with `capacity` slots and a queue gives to so many clients."""
    slots = [0.0] * capacity
    clients = [(0.0, client) for client in range(concurrency)]
    traces = []
    while clients[0][0] < duration_s:
        sent, client = heapq.heappop(clients)
        end = max(sent, heapq.heappop(slots)) + (draw() if draw else service_s)
        heapq.heappush(slots, end)
        heapq.heappush(clients, (end + pause_s, client))
        traces.append(trace(sent, (end - service_s / 2, end)))
    return traces


def steady(concurrency, capacity, **options):
    return figures(closed_loop(concurrency, capacity, **options), window_s=2.5)


@pytest.mark.parametrize("concurrency", [1, 3, 8, 9, 13, 16, 32])
def test_steady_throughput_of_a_queue_is_exact(concurrency):
    # 0.1 s of service in 8 slots: 10 requests/s a client, 80 at most. The count of ended requests
    # would be off by up to 8 in 200.
    found = steady(concurrency, 8)
    assert found.steady_requests_per_s == pytest.approx(min(concurrency, 8) * 10, rel=0.002)
    assert found.steady_output_tokens_per_s == pytest.approx(min(concurrency, 8) * 20, rel=0.002)
    assert found.steady_standard_error < 1.0
    assert found.steady_in_flight == pytest.approx(concurrency)


def test_steady_throughput_does_not_depend_on_where_the_window_ends():
    for window_s in (2.31, 2.34, 2.39):
        found = figures(closed_loop(8, 8, duration_s=window_s), window_s=window_s)
        assert found.steady_requests_per_s == pytest.approx(80, rel=1e-6)


def test_the_standard_error_shows_a_rate_that_changes():
    # 10 requests/s for 5 s, then 5 requests/s for 5 s
    times = [0.1 * n for n in range(50)] + [5 + 0.2 * n for n in range(25)]
    gaps = [0.1] * 50 + [0.2] * 25
    traces = [trace(at, (at + gap,)) for at, gap in zip(times, gaps, strict=True)]
    found = figures(traces)
    # The window begins after the first answer: 49 of the first half, and 25, in 9.9 s.
    assert found.steady_requests_per_s == pytest.approx(74 / 9.9)
    # 20 slices: 10 with 10/s, 10 with 5/s: deviation 2.56, over the root of 20. Student's t for 19
    # degrees of freedom is 2.093. A moment meets answers of (49 * 0.01 + 25 * 0.04) / 9.9 = 0.15 s
    # on average: a slice of 0.495 s is 3.3 of them, and sees 1 - 1 / 9.9 of the variance.
    expected = 2.565 / 20**0.5 * 2.093 / 1.96 / (1 - 1 / 9.9) ** 0.5
    assert found.steady_standard_error == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("window_s", "is_known"), [(0.35, False), (1.0, True)])
def test_a_window_of_less_than_three_latencies_has_no_standard_error(window_s, is_known):
    # 4 clients of 0.1 s: the steady window begins at 0.1 s, 2.5 or 9 latencies before the end.
    found = figures(closed_loop(4, 4, duration_s=window_s), window_s=window_s)
    assert found.steady_requests_per_s == pytest.approx(40.0)
    assert (found.steady_standard_error is not None) == is_known


def test_fewer_than_eight_answers_have_no_standard_error():
    # One client of 0.1 s, from 0.1 s on: 7 answers, or 9.
    for window_s, is_known in ((0.8, False), (1.0, True)):
        found = figures(closed_loop(1, 1, duration_s=window_s), window_s=window_s)
        assert (found.steady_standard_error is not None) == is_known


def test_a_server_without_variance_has_no_error_after_twelve_rounds():
    found = figures(closed_loop(16, 8, service_s=0.205), window_s=2.5)
    assert found.steady_requests_per_s == pytest.approx(8 / 0.205)
    assert found.steady_standard_error < 1e-6


@pytest.mark.parametrize(("concurrency", "slots"), [(1, 8), (8, 8), (16, 8)])
def test_the_95_percent_interval_covers_the_truth(concurrency, slots):
    # 0.1 s of service with a deviation of 0.03 s: 10 requests/s a slot.
    draw = random.Random(concurrency)  # noqa: S311 - noise, no secret
    inside = 0
    for _ in range(60):
        traces = closed_loop(
            concurrency, slots, duration_s=2.0, draw=lambda: max(0.01, draw.gauss(0.1, 0.03))
        )
        found = figures(traces, window_s=2.0)
        truth = 10 * min(concurrency, slots)
        inside += abs(found.steady_requests_per_s - truth) <= 1.96 * found.steady_standard_error
    assert inside >= 53


def test_an_overloaded_open_loop_counts_answers_where_they_end():
    # 40 requests/s for 5 s into one slot of 0.05 s: it delivers 20/s, and the queue grows.
    traces = [trace(n / 40, ((n + 1) * 0.05,)) for n in range(200)]
    found = figures(traces, window_s=5.0, is_open_loop=True)
    assert found.steady_requests_per_s == pytest.approx(20.0, rel=0.02)
    assert found.requests_per_s == pytest.approx(20.0)


def test_one_request_a_client_has_no_steady_window():
    traces = [trace(0, (1,)), trace(0, (1,))]
    window = measured_window(Load(concurrency=2, num_requests=2), traces)
    found = figures(traces, window_s=window.window_s, steady_end_s=window.steady_end_s)
    assert found.steady_requests_per_s is None
    assert found.requests_per_s == pytest.approx(2.0)


@pytest.mark.parametrize("capacity", [1, 5, 8, 13])
def test_from_traces_to_the_exact_capacity(capacity):
    search = SaturationSearch()
    while (level := search.next_level()) is not None:
        found = steady(level, capacity)
        search.add(level, Observation.from_figures(found, meets_slo=True, is_client_limited=False))
    result = search.result()
    assert result.knee_level == capacity
    assert result.highest_requests_per_s == pytest.approx(10 * capacity, rel=0.01)
    assert search.num_points <= 9


def test_tokens_without_text_count_for_throughput_and_have_no_latency():
    """Half a character is a token with nothing to show: when it arrived is not known."""
    silent = RequestTrace(
        index=0,
        worker=0,
        scheduled_ns=0,
        sent_ns=0,
        connected_ns=None,
        content_ns=[],
        ended_ns=500_000_000,
        prompt_tokens=8,
        max_new_tokens=2,
        output_tokens=2,
        is_counted_by_server=True,
        server_prompt_tokens=8,
        finish_reason="length",
        is_unfinished=False,
        failure=None,
        failure_message=None,
    )
    figures = compute_figures([silent], window_s=1.0, is_streaming=True)
    assert (figures.num_ok, figures.requests_per_s, figures.output_tokens_per_s) == (1, 1.0, 2.0)
    assert (figures.ttft, figures.e2e, figures.tpot, figures.itl) == (None, None, None, None)
