"""What a run of `flexbench serving` has left, and how it compares with what a server did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flexbench.serving.point_files import decode_traces
from flexbench.serving.traces import RequestTrace

MS = 1_000_000
# Prompts and answers that take next to no time.
SHORT = ("--prompt-length", 32, "--max-new-tokens", 8, "--max-new-tokens-var", 0)


@dataclass
class LeftPoint:
    """A point's file."""

    path: Path
    record: dict[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["figures"]
        return found

    @property
    def released_ns(self) -> int:
        found: int = self.record["released_at_ns"]
        return found

    @property
    def traces(self) -> list[RequestTrace]:
        return decode_traces(self.record["requests"])

    @property
    def failures(self) -> dict[int, str | None]:
        """How each request failed, by its number; None: it did not."""
        return {trace.index: trace.failure for trace in self.traces}


def points_in(folder: Path, results: str = "results/serving") -> list[LeftPoint]:
    """The points below `folder`, from light to heavy; not the curves that are beside them."""
    records = {path: json.loads(path.read_text()) for path in (folder / results).glob("*.json")}
    found = [LeftPoint(path, record) for path, record in records.items() if "requests" in record]

    def weight(point: LeftPoint) -> float:
        load = point.record["configuration"]["load"]
        return load["concurrency"] or load["rate_per_s"]

    return sorted(found, key=weight)


def only_point_in(folder: Path) -> LeftPoint:
    (point,) = points_in(folder)
    return point


@dataclass
class Pair:
    """A request as both sides saw it. Times are in ns, on the clock that both have."""

    trace: RequestTrace
    sent: int
    content: list[int]
    served: dict[str, Any]

    @property
    def arrived(self) -> int:
        found: int = self.served["arrived_ns"]
        return found

    @property
    def written(self) -> list[int]:
        found: list[int] = self.served["written_ns"]
        return found


def pair(point: LeftPoint, truth: dict[str, Any]) -> list[Pair]:
    """The measured requests, each with what the server knows of it.

    Requests that were sent in some order arrive in that order, but for those of the same moment:
    of these, prompts of different lengths are told apart.
    """
    released = point.released_ns
    served = [one for one in truth["requests"] if one["arrived_ns"] >= released]
    traces = [trace for trace in point.traces if trace.sent_ns is not None]
    assert len(served) == len(traces)
    key = sorted(traces, key=lambda trace: (trace.prompt_tokens, trace.sent_ns))
    served.sort(key=lambda one: (one["prompt_bytes"], one["arrived_ns"]))
    assert [trace.prompt_tokens for trace in key] == [one["prompt_bytes"] for one in served]
    return [
        Pair(
            trace=trace,
            sent=released + trace.sent_ns,
            content=[released + moment for moment in trace.content_ns],
            served=one,
        )
        for trace, one in zip(key, served, strict=True)
        if trace.sent_ns is not None
    ]


def median_ms(values_ns: Any) -> float:
    """The median of times in ns, in ms."""
    return median(values_ns) / MS
