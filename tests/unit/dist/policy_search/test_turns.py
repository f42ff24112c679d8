"""Measurements that are repeated until they agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist.policy_search import turns
from flexbench.dist.policy_search.probe import Times
from flexbench.dist.policy_search.turns import take_turns


def times(seconds: float) -> Times:
    return Times(
        prefill_s={"attention": seconds},
        decode_s={"attention": seconds / 10},
        prefill_compute_s=seconds,
        decode_compute_s=seconds / 10,
        busy_s={"weight": 0.0},
        stalled_s=0.0,
        num_decoded=2,
    )


@pytest.mark.parametrize(
    ("takes", "num_runs", "expected"),
    [
        ([1.0, 1.02, 1.01, 9.0], 3, 1.005),
        # Disturbed once, or for two turns in which it was as long: three runs at least tell.
        ([5.0, 1.0, 1.02, 9.0], 3, 1.01),
        ([5.0, 5.0, 1.0, 1.02, 9.0], 4, 1.01),
        # Never twice the same: the two fastest of six.
        ([5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0], 6, 1.75),
    ],
)
def test_the_fastest_that_agree_count(takes: list[float], num_runs: int, expected: float) -> None:
    left = iter(takes)
    calls: list[str] = []

    def measure(key: str) -> Times:
        calls.append(key)
        return times(next(left))

    found = take_turns(["only"], measure)["only"]
    assert len(calls) == num_runs
    assert found.prefill_s == pytest.approx({"attention": expected})
    assert found.decode_s == pytest.approx({"attention": expected / 10})


def test_prefill_and_decoding_agree_each_for_itself() -> None:
    """A long prefill would hide what disturbed a short decoding."""
    runs = [times(1.0), times(1.0), times(1.0), times(1.2), times(9.0)]
    decodes = [0.3, 0.2, 0.11, 0.1, 9.0]
    left = iter(
        replace(run, decode_s={"attention": seconds})
        for run, seconds in zip(runs, decodes, strict=True)
    )

    found = take_turns(["only"], lambda _: next(left))["only"]

    assert len(list(left)) == 1
    assert found.prefill_s == {"attention": 1.0}
    assert found.decode_s == pytest.approx({"attention": 0.105})


def test_two_turns_are_enough_where_they_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(turns.time, "monotonic", lambda: next(clock))
    calls: list[str] = []

    def measure(key: str) -> Times:
        calls.append(key)
        return times(float(len(calls)))

    take_turns(["only"], measure)

    assert len(calls) == 2


def test_turns_go_around_all_and_then_those_that_do_not_agree() -> None:
    left = {"calm": iter([1.0, 1.0, 1.0]), "busy": iter([4.0, 3.0, 2.0, 1.0, 1.0])}
    calls: list[str] = []

    def measure(key: str) -> Times:
        calls.append(key)
        return times(next(left[key]))

    found = take_turns(["calm", "busy"], measure)
    assert calls == ["calm", "busy"] * 3 + ["busy"] * 2
    assert {key: run.prefill_compute_s for key, run in found.items()} == {"calm": 1.0, "busy": 1.0}
