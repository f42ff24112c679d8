"""`flexbench serving` on our own two systems: a curve of each through the same command."""

from __future__ import annotations

import json

import pytest

from tests.integration.serving.points import points_in

LOAD = (
    *("--num-clients", 1, 2),
    *("--min-requests", 4),
    *("--num-requests-per-client", 2),
    *("--prompt-length", 8, "--prompt-length-var", 0),
    *("--max-new-tokens", 4, "--max-new-tokens-var", 0),
)


def assert_is_a_curve(tmp_path) -> None:
    points = points_in(tmp_path)
    assert [one.record["configuration"]["load"]["concurrency"] for one in points] == [1, 2]
    for point in points:
        assert point.record["status"] == "ok"
        assert point.figures["num_ok"] == 4
        assert point.figures["num_failed"] == 0
        # Four requests of four tokens, each of which arrived by itself.
        assert sum(trace.output_tokens for trace in point.traces) == 16
        assert {len(trace.content_ns) for trace in point.traces} == {4}
        assert 0 < point.figures["ttft"]["p50"] < point.figures["e2e"]["p50"]
    (curve,) = (tmp_path / "results" / "serving").glob("*-curve-*.json")
    written = json.loads(curve.read_text())
    assert [point["file"] for point in written["points"]] == [one.path.name for one in points]


def test_a_curve_of_a_dist_pipeline(flexbench, tmp_path):
    pytest.importorskip("torch", reason="--api dist needs torch")
    command = flexbench("serving", "--api", "dist", "--model", "facebook/opt-125m", *LOAD)
    assert command.finish(170) == 0, command.stderr()
    command.assert_nothing_left()
    assert_is_a_curve(tmp_path)


@pytest.mark.swarm
def test_a_curve_of_a_petals_swarm(flexbench, tmp_path):
    command = flexbench(
        "serving", "--api", "petals", "--model", "opt-125m", "--dtype", "float32", *LOAD
    )
    assert command.finish(170) == 0, command.stderr()
    command.assert_nothing_left()
    assert_is_a_curve(tmp_path)
