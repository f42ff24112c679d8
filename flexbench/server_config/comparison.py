"""What was predicted of a server beside what it turned out to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexbench.core import environment
from flexbench.core.results import RECORD_SCHEMA_VERSION
from flexbench.core.units import format_bytes
from flexbench.petals_runtime.server_process import ServerFacts
from flexbench.server_config.estimate import Estimate
from flexbench.server_config.sections import Section

PACKAGES = ("petals", "hivemind", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of a server. `predicted` is None where the estimate has none."""

    name: str
    unit: str
    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """How far the prediction is above (+) or below (-) the measurement, as a share of it."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1


def compare(estimate: Estimate, facts: ServerFacts) -> tuple[Comparison, ...]:
    """The figures that a server can be asked for.

    Its memory grows by weights and adapters when it loads its blocks; the attention cache is taken
    only when sessions need it.
    """
    throughput = estimate.throughput
    is_known = throughput is not None and not throughput.is_upper_bound
    rows: Sequence[tuple[str, str, float | None, float | None]] = (
        ("Blocks", "blocks", estimate.num_blocks, facts.num_blocks),
        ("Weights", "bytes", estimate.weights_bytes + estimate.adapter_bytes, facts.weights_bytes),
        ("Attention cache", "bytes", estimate.cache_bytes, facts.cache_bytes),
        (
            "Cache tokens announced",
            "tokens",
            estimate.announced_cache_tokens,
            facts.cache_tokens_left,
        ),
        (
            "Memory taken by loading",
            "bytes",
            estimate.weights_bytes + estimate.adapter_bytes,
            facts.loaded_bytes,
        ),
        (
            "Throughput announced",
            "tokens/s",
            throughput.tokens_per_s if throughput is not None and is_known else None,
            facts.throughput,
        ),
        (
            "Forward, one block",
            "tokens/s",
            estimate.compute.forward_rps,
            facts.forward_rps,
        ),
        (
            "Inference, one block",
            "tokens/s",
            estimate.compute.inference_rps,
            facts.inference_rps,
        ),
        ("Network", "tokens/s", estimate.network_rps, facts.network_rps),
    )
    return tuple(
        Comparison(name=name, unit=unit, predicted=predicted, measured=measured)
        for name, unit, predicted, measured in rows
    )


def server_section(facts: ServerFacts) -> Section:
    """Where others find the server."""
    rows = [
        ("Blocks", f"{facts.start}:{facts.end}"),
        ("Peer", facts.peer_id),
    ]
    return Section(
        title="The server is online",
        headers=("Server", ""),
        rows=tuple(rows),
        is_list=True,
        note="Servers and clients join its swarm with one of these:",
        lines=tuple(f"--initial-peers {address}" for address in facts.visible_addresses),
    )


def comparison_section(comparisons: Sequence[Comparison]) -> Section:
    """The figures side by side, for people."""
    return Section(
        title="Predicted and measured",
        headers=("Figure", "predicted", "measured", "error"),
        rows=tuple(
            (
                one.name,
                _format(one.predicted, one.unit),
                _format(one.measured, one.unit),
                "" if one.error is None else f"{one.error:+.1%}",
            )
            for one in comparisons
        ),
        note=(
            "Weights and cache as the server counts them; the cache is taken when sessions need "
            "it. Memory taken by loading is that of its main process, 5 to 10 MiB for other "
            "things included. Speeds are those that it announces; Petals keeps its own "
            "measurements for later servers."
        ),
    )


def _format(value: float | None, unit: str) -> str:
    if value is None:
        return "not known"
    if unit == "bytes":
        return format_bytes(value)
    if unit in ("blocks", "tokens"):
        return f"{value:.0f}"
    return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def to_comparison_record(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The figures as plain data; null: not known."""
    return [asdict(one) | {"error": one.error} for one in comparisons]


def server_record(
    *,
    started_at: str,
    configuration: Mapping[str, Any],
    predicted: Mapping[str, Any],
    facts: ServerFacts,
    comparisons: Sequence[Comparison],
) -> dict[str, Any]:
    """The record of a launched server, for a line of JSON.

    `started_at` is in UTC, in ISO 8601; `configuration` is what was asked for, and `predicted` the
    estimate as plain data.
    """
    return {
        "schema_version": RECORD_SCHEMA_VERSION,
        "system": "server-config",
        "status": "ok",
        "started_at": started_at,
        "configuration": dict(configuration),
        "predicted": dict(predicted),
        "measured": asdict(facts) | {"num_blocks": facts.num_blocks},
        "comparison": to_comparison_record(comparisons),
        **environment.describe_run(PACKAGES),
    }
