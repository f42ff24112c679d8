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

PREFILL_ROOFLINE = Metric(
    name="prefill_roofline",
    label="Prefill of roofline",
    unit="1",
    formula="sum over stages of floor of the prefill / sum of its prefill_compute_s",
    higher_is_better=True,
)

DECODE_ROOFLINE = Metric(
    name="decode_roofline",
    label="Decode of roofline",
    unit="1",
    formula="sum over stages of floor of decoding / sum of its decode_compute_s",
    higher_is_better=True,
)

WEIGHT_LOAD_ROOFLINE = Metric(
    name="weight_load_roofline",
    label="Weight load of roofline",
    unit="1",
    formula="sum over stages of floor of loading weights / sum of its weight_load_s",
    higher_is_better=True,
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

TTFT = Metric(
    name="ttft",
    label="Time to first token",
    unit="s",
    formula="first content - sent",
    higher_is_better=False,
)

TTFT_SCHEDULED = Metric(
    name="ttft_scheduled",
    label="Time to first token from schedule",
    unit="s",
    formula="first content - scheduled",
    higher_is_better=False,
)

ITL = Metric(
    name="itl",
    label="Inter-token latency",
    unit="s",
    formula="chunk j - chunk j-1, gaps of all requests together",
    higher_is_better=False,
)

TPOT = Metric(
    name="tpot",
    label="Time per output token",
    unit="s",
    formula="(e2e - ttft) / (output tokens - 1), for more than one output token",
    higher_is_better=False,
)

E2E = Metric(
    name="e2e",
    label="End-to-end latency",
    unit="s",
    formula="last content - sent",
    higher_is_better=False,
)

E2E_SCHEDULED = Metric(
    name="e2e_scheduled",
    label="End-to-end latency from schedule",
    unit="s",
    formula="last content - scheduled",
    higher_is_better=False,
)

SEND_LATENESS = Metric(
    name="send_lateness",
    label="Lateness of sends",
    unit="s",
    formula="sent - scheduled",
    higher_is_better=False,
)

REQUESTS_PER_S = Metric(
    name="requests_per_s",
    label="Requests",
    unit="requests/s",
    formula="answers that ended well in the window / window",
    higher_is_better=True,
)

OUTPUT_TOKENS_PER_S = Metric(
    name="output_tokens_per_s",
    label="Output tokens",
    unit="tokens/s",
    formula="output tokens that arrived in the window / window",
    higher_is_better=True,
)

INPUT_TOKENS_PER_S = Metric(
    name="input_tokens_per_s",
    label="Input tokens",
    unit="tokens/s",
    formula="prompt tokens of requests with first content in the window / window",
    higher_is_better=True,
)

GOODPUT = Metric(
    name="goodput",
    label="Goodput",
    unit="requests/s",
    formula="answers that ended in the window and met every condition / window",
    higher_is_better=True,
)

STEADY_REQUESTS_PER_S = Metric(
    name="steady_requests_per_s",
    label="Requests, steady",
    unit="requests/s",
    formula="sum over answers of (part of sent..ended in the steady window) / steady window",
    higher_is_better=True,
)

IN_FLIGHT = Metric(
    name="in_flight",
    label="In flight",
    unit="requests",
    formula="sum over requests of (time of sent..ended in the window) / window",
    higher_is_better=True,
)

TOKENS_PER_CHUNK = Metric(
    name="tokens_per_chunk",
    label="Tokens per chunk",
    unit="tokens",
    formula="output tokens / chunks with content",
    higher_is_better=False,
)

ERROR_RATE = Metric(
    name="error_rate",
    label="Errors",
    unit="1",
    formula="failed / (failed + ended well)",
    higher_is_better=False,
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
    PREFILL_ROOFLINE,
    DECODE_ROOFLINE,
    WEIGHT_LOAD_ROOFLINE,
    FORWARD_RPS,
    INFERENCE_RPS,
    NETWORK_RPS,
    ANNOUNCED_THROUGHPUT,
    STEPS_PER_S,
    TTFT,
    TTFT_SCHEDULED,
    ITL,
    TPOT,
    E2E,
    E2E_SCHEDULED,
    SEND_LATENESS,
    REQUESTS_PER_S,
    OUTPUT_TOKENS_PER_S,
    INPUT_TOKENS_PER_S,
    GOODPUT,
    STEADY_REQUESTS_PER_S,
    IN_FLIGHT,
    TOKENS_PER_CHUNK,
    ERROR_RATE,
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
