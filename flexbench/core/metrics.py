"""Every figure that flexbench reports, defined once.

docs/metrics.md is the same list in prose; a test keeps the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure: what it is called in files, what people read, and how it is computed."""

    name: str
    label: str
    unit: str
    formula: str
    higher_is_better: bool


THROUGHPUT = Metric(
    name="throughput",
    label="Throughput",
    unit="tokens/s",
    formula="total_tokens / wall_clock_time, total_tokens = P * M * B * T",
    higher_is_better=True,
)

MEAN_LATENCY = Metric(
    name="mean_latency",
    label="Mean latency",
    unit="s",
    formula="(1 / (P * M)) * sum(per_request_latencies)",
    higher_is_better=False,
)


def throughput(total_tokens: int, wall_clock_s: float) -> float:
    """Generated tokens per second of the whole run.

    `wall_clock_s` runs from the release of the clients to the end of the last request. Source: the
    throughput definition of the FlexGen decentralized benchmark, with the tokens counted, not
    assumed. 0.0 when nothing was generated (a prefill-only run).
    """
    if wall_clock_s <= 0:
        raise ValueError(f"wall_clock_s must be above 0, not {wall_clock_s}")
    return total_tokens / wall_clock_s


def mean_latency(latencies_s: Sequence[float]) -> float:
    """Mean duration of one request in seconds, over all clients and rounds."""
    if not latencies_s:
        raise ValueError("mean_latency needs at least one latency")
    return sum(latencies_s) / len(latencies_s)
