"""What was observed of one run, and the figures and the record that follow from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flexbench.core import metrics
from flexbench.core.checks import check_count
from flexbench.core.results import ResultRow
from flexbench.petals.client import RequestLatency


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one run asks: P clients, M rounds each, B prompts of S tokens a round, T new tokens."""

    num_processes: int
    num_micro_batches: int
    batch_size: int
    sequence_length: int
    max_tokens: int

    def __post_init__(self) -> None:
        """Raise ConfigError for counts that make no run."""
        for name, value in vars(self).items():
            option = f"--{name.replace('_', '-')}"
            check_count(option, value, minimum=0 if name == "max_tokens" else 1)


@dataclass(kw_only=True)
class Measurement:
    """The observations of one run, filled in as they arrive. Times are in seconds.

    `released_at` is on time.monotonic, like the traces of the requests.
    """

    load: Load
    warmup_s: dict[int, float] = field(default_factory=dict)
    """Per client: from the start of its process to the end of its warm-up."""
    released_at: float | None = None
    released_at_utc: str | None = None
    """The same moment on the clock of the world, in ISO 8601."""
    latencies: dict[int, list[RequestLatency]] = field(default_factory=dict)
    """Per client, one for each finished round."""

    @property
    def all_latencies(self) -> list[RequestLatency]:
        """The latencies of all clients."""
        return [latency for client in self.latencies.values() for latency in client]

    @property
    def wall_clock_s(self) -> float:
        """From the release of the clients to the end of the last request."""
        assert self.released_at is not None
        return max(latency.trace.ended_at for latency in self.all_latencies) - self.released_at

    @property
    def total_tokens(self) -> int:
        """Tokens generated, as counted by the clients."""
        return sum(latency.trace.generated_tokens for latency in self.all_latencies)

    def row(self) -> ResultRow:
        """The run's line in the results."""
        return ResultRow(
            batch_size=self.load.batch_size,
            num_micro_batches=self.load.num_micro_batches,
            num_processes=self.load.num_processes,
            sequence_length=self.load.sequence_length,
            max_tokens=self.load.max_tokens,
            throughput=metrics.throughput(self.total_tokens, self.wall_clock_s),
            mean_latency=metrics.mean_latency(self.all_latencies),
        )

    def figures(self) -> dict[str, Any]:
        """The run's figures for its record."""
        row = self.row()
        prompt_tokens = len(self.all_latencies) * self.load.batch_size * self.load.sequence_length
        return {
            "throughput": row.throughput,
            "mean_latency": row.mean_latency,
            "total_tokens": self.total_tokens,
            "wall_clock_s": self.wall_clock_s,
            "prompt_tokens": prompt_tokens,
        }

    def observations(self) -> dict[str, Any]:
        """What the figures follow from, for the record: every client's warm-up and requests."""
        return {"released_at": self.released_at_utc, "clients": self._clients()}

    def _clients(self) -> list[dict[str, Any]]:
        return [
            {
                "process_index": index,
                "warmup_s": self.warmup_s.get(index),
                "requests": [self._request(latency) for latency in self.latencies.get(index, [])],
            }
            for index in range(self.load.num_processes)
        ]

    def _request(self, latency: RequestLatency) -> dict[str, Any]:
        trace = latency.trace
        assert self.released_at is not None
        return {
            "latency_s": float(latency),
            "started_after_release_s": trace.started_at - self.released_at,
            "generated_tokens": trace.generated_tokens,
            "failed_attempts": trace.failed_attempts,
            "route": [asdict(hop) for hop in trace.route],
        }
