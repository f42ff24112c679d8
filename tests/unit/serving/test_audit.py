"""When a point is the client's and not the service's."""

from __future__ import annotations

import json

import pytest

from flexbench.serving.audit import Audit, AuditInput, audit

GOOD = {
    "worker_busy": (0.2, 0.5),
    "loop_lag_p50_s": 0.0001,
    "loop_lag_p99_s": 0.002,
    "ttft_p50_s": 0.05,
    "e2e_p50_s": 0.2,
    "send_lateness_p99_s": 0.001,
    "concurrency": 100,
    "steady_in_flight": 99.0,
    "error_rate": 0.0,
    "requests_per_s": 500.0,
    "generator_requests_per_s": 5000.0,
    "generator_error_p99_s": 0.001,
}
OPEN = {"concurrency": None, "steady_in_flight": 10.0, "scheduled_per_s": 50.0, "sent_per_s": 49.9}


def test_a_good_point_has_no_reasons():
    verdict = audit(AuditInput(**GOOD))
    assert not verdict.is_client_limited
    assert verdict.reasons == ()
    assert verdict.worker_busy_max == 0.5
    assert audit(AuditInput(**GOOD | OPEN)).reasons == ()


def test_what_is_not_known_is_not_held_against_a_point():
    verdict = audit(AuditInput())
    assert not verdict.is_client_limited
    assert verdict.worker_busy_max is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"worker_busy": (0.2, 0.95)}, "a worker's event loop was busy 95% of the time"),
        ({"steady_in_flight": 35.0}, "35 requests were in flight on average, not 100"),
        (
            OPEN | {"send_lateness_p99_s": 0.03},
            "1 % of the requests were sent 30 ms after their time or later",
        ),
        (
            OPEN | {"sent_per_s": 40.0},
            "40 requests/s were sent, not the 50 of the schedule",
        ),
        (
            {"generator_requests_per_s": 555.0},
            "500 requests/s are 90% of what the generators can send",
        ),
    ],
)
def test_each_reason_is_a_sentence_with_numbers(changes, reason):
    verdict = audit(AuditInput(**GOOD | changes))
    assert verdict.is_client_limited
    assert verdict.reasons == (reason,)
    assert not verdict.is_timing_uncertain


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"loop_lag_p99_s": 0.006},
            "1 % of a worker's events were handled 6 ms late or later, which is much beside first "
            "tokens after 50 ms (median)",
        ),
        (
            {"loop_lag_p99_s": 0.03, "ttft_p50_s": None},
            "1 % of a worker's events were handled 30 ms late or later, which is much beside "
            "answers after 200 ms (median)",
        ),
        (
            {"generator_error_p99_s": 0.02},
            "against the dummy, the generators measured up to 20 ms too much (99th percentile), "
            "which is much beside first tokens after 50 ms (median)",
        ),
    ],
)
def test_late_timestamps_are_told_apart_from_a_limit_of_throughput(changes, reason):
    verdict = audit(AuditInput(**GOOD | changes))
    assert verdict.is_timing_uncertain
    assert verdict.timing_reasons == (reason,)
    assert not verdict.is_client_limited


@pytest.mark.parametrize(
    "changes",
    [
        {"worker_busy": (0.9,)},
        {"loop_lag_p99_s": 0.005, "ttft_p50_s": 0.01},  # 50 %, but only 5 ms
        {"loop_lag_p99_s": 0.05, "ttft_p50_s": 0.5},  # 50 ms, but only 10 %
        {"steady_in_flight": 95.0},
        {"steady_in_flight": 35.0, "error_rate": 0.5},  # the service ends them early
        {"send_lateness_p99_s": 1.0},  # in a closed loop, what is in flight tells it
        OPEN | {"send_lateness_p99_s": 0.02},  # 10 % of the latency
        OPEN | {"sent_per_s": 47.5},
        {"generator_requests_per_s": 625.0},
    ],
)
def test_at_the_limit_a_point_is_still_good(changes):
    verdict = audit(AuditInput(**GOOD | changes))
    assert verdict.reasons == ()
    assert verdict.timing_reasons == ()


def test_several_reasons_are_all_given():
    verdict = audit(AuditInput(**GOOD | {"worker_busy": (1.0,), "steady_in_flight": 1.0}))
    assert len(verdict.reasons) == 2


def test_a_verdict_survives_json():
    verdict = audit(AuditInput(**GOOD | {"worker_busy": (0.2, 0.99)}))
    assert Audit.from_record(json.loads(json.dumps(verdict.as_record()))) == verdict
