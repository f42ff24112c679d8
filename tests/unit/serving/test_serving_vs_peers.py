"""The arithmetic of benchmarks/serving_vs_peers.py."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("psutil", reason="the benchmark needs psutil")

from benchmarks.load_generators import Reported, Scenario, crc32
from benchmarks.serving_vs_peers import Figures, median_of, steady_middle, ttft_errors

MS = 1_000_000


def served(arrived_ms: int, ttft_ms: int, **more: Any) -> dict[str, Any]:
    times = {"arrived_ns": arrived_ms * MS, "written_ns": [(arrived_ms + ttft_ms) * MS]}
    return {"streaming": True, "request_id": "", "prompt_crc32": 0, **times, **more}


def test_ideal_rate() -> None:
    # 50 ms and 31 times 5 ms are 205 ms.
    assert Scenario(name="A", title="", concurrency=256).ideal_rate == pytest.approx(256 / 0.205)
    assert Scenario(name="E", title="", concurrency=64, capacity=8).ideal_rate == pytest.approx(
        8 / 0.205
    )
    assert Scenario(name="C", title="", concurrency=64, ttft_ms=0, itl_ms=0).ideal_rate is None


def test_steady_middle_is_the_half_around_the_middle() -> None:
    assert steady_middle({"first_ns": 1000, "last_ns": 1400}) == (1100, 1300)


def test_requests_are_matched_by_id() -> None:
    rows = [served(0, 50, request_id="a"), served(1, 60, request_id="b")]
    reported = [Reported(63, 0.0, request_id="b"), Reported(51, 1.0, request_id="a")]
    assert ttft_errors(rows, reported) == (1, 3, 2)


def test_requests_of_the_same_prompt_are_matched_in_their_order() -> None:
    rows = [served(n, 50 + n, prompt_crc32=crc32("x")) for n in range(3)]
    reported = [Reported(52 + n, float(n), prompt_crc32=crc32("x")) for n in (2, 0, 1)]
    assert ttft_errors(rows, reported) == (2, 2, 3)


def test_without_names_requests_are_matched_by_order_and_those_of_a_warm_up_come_first() -> None:
    rows = [served(0, 900), served(1, 50), served(2, 60)]
    assert ttft_errors(rows, [Reported(61, 0.2), Reported(52, 0.1)]) == (1, 2, 2)


def test_what_cannot_be_matched_is_compared_as_distributions() -> None:
    rows = [served(0, 50)]
    assert ttft_errors(rows, [Reported(53, 0.1), Reported(55, 0.2)]) == (3, 5, 0)
    assert ttft_errors(rows, []) == (None, None, 0)
    assert ttft_errors([served(0, 50, streaming=False)], [Reported(53, 0.1)]) == (None, None, 0)


def test_median_leaves_out_what_is_not_known() -> None:
    runs = [Figures(start_s=1.0), Figures(start_s=5.0, in_flight=7.0), Figures(start_s=2.0)]
    median = median_of(runs)
    assert (median.start_s, median.in_flight, median.found) == (2.0, 7.0, None)
