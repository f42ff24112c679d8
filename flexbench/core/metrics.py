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

PREFILL_LATENCY = Metric(
    name="prefill_latency",
    label="Prefill latency",
    unit="s",
    formula="sum over rounds of (first tokens of all prompts there - round began)",
    higher_is_better=False,
)

PREFILL_THROUGHPUT = Metric(
    name="prefill_throughput",
    label="Prefill throughput",
    unit="tokens/s",
    formula="num_prompts * prompt_len / prefill_latency",
    higher_is_better=True,
)

DECODE_LATENCY = Metric(
    name="decode_latency",
    label="Decode latency",
    unit="s",
    formula="sum over rounds of (last tokens of all prompts there - first tokens there)",
    higher_is_better=False,
)

DECODE_THROUGHPUT = Metric(
    name="decode_throughput",
    label="Decode throughput",
    unit="tokens/s",
    formula="(total_tokens - num_prompts) / decode_latency",
    higher_is_better=True,
)

TOTAL_LATENCY = Metric(
    name="total_latency",
    label="Total latency",
    unit="s",
    formula="prefill_latency + decode_latency",
    higher_is_better=False,
)

TOTAL_THROUGHPUT = Metric(
    name="total_throughput",
    label="Total throughput",
    unit="tokens/s",
    formula="total_tokens / total_latency",
    higher_is_better=True,
)

BUBBLE_FRACTION = Metric(
    name="bubble_fraction",
    label="Bubble",
    unit="1",
    formula="mean over stages of 1 - (wall_s - send_s - receive_s) / longest wall_s",
    higher_is_better=False,
)

FORWARD_RPS = Metric(
    name="forward_rps",
    label="Forward",
    unit="tokens/s",
    formula="10 * 1024 / seconds of 10 passes of 1024 tokens through one block",
    higher_is_better=True,
)

INFERENCE_RPS = Metric(
    name="inference_rps",
    label="Inference",
    unit="tokens/s",
    formula="100 / seconds of 100 steps of one token through one block",
    higher_is_better=True,
)

NETWORK_RPS = Metric(
    name="network_rps",
    label="Network",
    unit="tokens/s",
    formula="min(download, upload) / (hidden_size * 16 bits)",
    higher_is_better=True,
)

ANNOUNCED_THROUGHPUT = Metric(
    name="announced_throughput",
    label="Announced throughput",
    unit="tokens/s",
    formula="min(forward_rps / ((num_blocks + 1) / 2), network_rps * (0.2 over a relay))",
    higher_is_better=True,
)

STEPS_PER_S = Metric(
    name="steps_per_s",
    label="Steps of one client",
    unit="steps/s",
    formula="1 / (num_layers / inference_rps + hops * (0.018 s + delay) + delay)",
    higher_is_better=True,
)

METRICS = (
    THROUGHPUT,
    MEAN_LATENCY,
    PREFILL_LATENCY,
    PREFILL_THROUGHPUT,
    DECODE_LATENCY,
    DECODE_THROUGHPUT,
    TOTAL_LATENCY,
    TOTAL_THROUGHPUT,
    BUBBLE_FRACTION,
    FORWARD_RPS,
    INFERENCE_RPS,
    NETWORK_RPS,
    ANNOUNCED_THROUGHPUT,
    STEPS_PER_S,
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
