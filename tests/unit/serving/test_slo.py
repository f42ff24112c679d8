"""Conditions: how they are written, when a point and a request meet them."""

from __future__ import annotations

import pytest

from flexbench.core.errors import ConfigError
from flexbench.serving.figures import compute_figures
from flexbench.serving.slo import Condition, check, check_measurable, meets, parse_slo
from flexbench.serving.traces import RequestTrace

MS = 1_000_000


def trace(content_ms=(100,), *, scheduled_ms=0, sent_ms=0, tokens=None, **changes):
    values = {
        "index": 0,
        "worker": 0,
        "scheduled_ns": scheduled_ms * MS,
        "sent_ns": sent_ms * MS,
        "connected_ns": None,
        "content_ns": [at * MS for at in content_ms],
        "ended_ns": max(content_ms, default=10) * MS,
        "prompt_tokens": 4,
        "max_new_tokens": 4,
        "output_tokens": len(content_ms) if tokens is None else tokens,
        "is_counted_by_server": True,
        "server_prompt_tokens": None,
        "finish_reason": "stop",
        "is_unfinished": False,
        "failure": None,
        "failure_message": None,
    }
    return RequestTrace(**values | changes)


def figures(*traces):
    return compute_figures(traces, window_s=1.0, is_streaming=True)


@pytest.mark.parametrize(
    ("text", "metric", "statistic", "limit", "is_limit_allowed"),
    [
        ("ttft:p99<200ms", "ttft", "p99", 0.2, False),
        (" TTFT : p99.9 <= 1.5 s ", "ttft", "p99.9", 1.5, True),
        ("itl:mean<500us", "itl", "mean", 0.0005, False),
        ("e2e_scheduled:max<2s", "e2e_scheduled", "max", 2.0, False),
        ("errors<1%", "errors", None, 0.01, False),
        ("errors<=0.05", "errors", None, 0.05, True),
        ("errors<=0", "errors", None, 0.0, True),
    ],
)
def test_parse(text, metric, statistic, limit, is_limit_allowed):
    assert parse_slo(text) == (
        Condition(
            metric=metric,
            statistic=statistic,
            limit=pytest.approx(limit),
            is_limit_allowed=is_limit_allowed,
        ),
    )


def test_several_in_a_text_and_in_several_texts():
    found = parse_slo(["ttft:p99<200ms, errors<1%", "tpot:mean<=0.05s"])
    assert [str(one) for one in found] == ["ttft:p99<200ms", "errors<1%", "tpot:mean<=50ms"]
    assert parse_slo([]) == ()
    assert str(*parse_slo("ttft:p99<200.0625ms")) == "ttft:p99<200.0625ms"
    assert parse_slo([str(one) for one in found]) == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "write it like ttft:p99<200ms"),
        ("ttft", "write it like"),
        ("ttft:p99>200ms", "write it like"),
        ("ttft:p99<<200ms", "write it like"),
        ("ttft:p99<200ms,", "'' is no condition"),
        ("ttft<200ms", "needs one of p50, p90, p95, p99, p99.9, mean, max, as in ttft:p99<200ms"),
        ("ttft:p42<200ms", "needs one of p50"),
        ("speed:p99<200ms", "about none of ttft, itl, tpot, e2e"),
        ("errors:p99<1%", "about none of"),
        ("ttft:p99<200", "must be a number with a unit, such as 10ms"),
        ("ttft:p99<0ms", "must be above 0"),
        ("errors<1s", "must be a share such as 1% or 0.01"),
        ("errors<200%", "must be a share"),
    ],
)
def test_what_is_no_condition_is_refused_with_an_example(text, problem):
    with pytest.raises(ConfigError, match=r"^--slo: ") as caught:
        parse_slo(text)
    assert problem in caught.value.message


def test_streaming_figures_need_streaming():
    with pytest.raises(ConfigError, match=r"tpot:p50<10ms: there is no tpot without --streaming"):
        check_measurable(parse_slo("e2e:p99<1s,tpot:p50<10ms"), is_streaming=False)
    check_measurable(parse_slo("e2e:p99<1s,errors<1%"), is_streaming=False)
    check_measurable(parse_slo("tpot:p50<10ms"), is_streaming=True)


def test_violations_give_both_numbers():
    found = figures(trace((250, 300)), trace(failure="refused", content_ms=()))
    conditions = parse_slo("ttft:p99<200ms,ttft:max<=250ms,ttft:max<250ms,errors<1%,e2e:mean<1s")
    assert check(conditions, found) == [
        "ttft p99 is 250ms, not below 200ms",
        "ttft max is 250ms, not below 250ms",
        "error rate is 50%, not below 1%",
    ]


def test_what_was_not_measured_is_violated():
    assert check(parse_slo("tpot:p50<1s,errors<1%"), figures()) == [
        "tpot p50 is not known: no request gave it",
        "error rate is not known: no request gave it",
    ]


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        ("ttft:p99<100ms", False),
        ("ttft:p50<=100ms", True),
        ("ttft_scheduled:p50<=100ms", False),  # 20 ms more
        ("ttft_scheduled:p50<=120ms", True),
        ("e2e:p99<=200ms", True),
        ("e2e:p99<200ms", False),
        ("tpot:p99<=50ms", True),  # 100 ms for two tokens
        ("itl:max<90ms", False),  # its gaps are 10 and 90 ms
        ("itl:mean<=50ms", True),
        ("itl:p50<60ms,e2e:max<1ms", False),
        ("errors<1%", True),
    ],
)
def test_a_request_meets_conditions_by_its_own_figures(slo, is_met):
    one = trace((120, 130, 220), sent_ms=20)
    assert meets(one, parse_slo(slo)) is is_met


def test_a_figure_that_a_request_cannot_have_is_no_fault():
    assert meets(trace((100,)), parse_slo("itl:max<1us,tpot:p50<1us"))


def test_requests_without_an_answer_meet_nothing():
    assert not meets(trace(failure="timeout"), parse_slo("e2e:p50<9s"))
    assert not meets(trace(is_unfinished=True), parse_slo("e2e:p50<9s"))
    assert not meets(trace(failure="timeout"), ())
