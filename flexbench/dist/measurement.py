"""What the stages observed of one run, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexbench.core import metrics
from flexbench.core.results import ResultRow
from flexbench.core.timeline import COLUMNS
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.lines import StageRoofline, roofline_figures
from flexbench.dist.schedule import Workload, idle_fraction
from flexbench.dist.timeline import Span


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What one stage reports of the timed run. Times in seconds, sizes in bytes."""

    rank: int
    num_threads: int
    """With which it computed on the CPU."""
    layers: tuple[int, int]
    """Its transformer layers: the first, and the one after the last."""
    wall_s: float
    """From the common start to the end of the stage's own work."""
    compute_s: float
    prefill_compute_s: float
    """The prefill's part of it; decoding has the rest."""
    decode_compute_s: float
    weight_load_s: float
    """What loading weights took, beside the computing if it overlaps; the next three likewise."""
    cache_load_s: float
    cache_store_s: float
    hidden_s: float
    stalled_s: float
    """How long computing stood still for loads and stores."""
    send_s: float
    """Waiting for the next stage to take a message."""
    receive_s: float
    """Waiting for the stage before."""
    gpu_peak_bytes: int
    """On a GPU, all that was allocated there. Without one, what the 'gpu' home held."""
    cpu_peak_bytes: int
    """The process's largest resident set."""
    disk_peak_bytes: int
    prefill_layer_s: dict[int, float]
    """Whole time of each of the stage's layers, embeddings included, in the prefill."""
    decode_layer_s: dict[int, float]
    """And in decoding, all tokens together."""
    token_ends_s: tuple[float, ...]
    """When each token was there for all prompts, as this stage saw it."""
    timeline: tuple[Span, ...] = ()
    """What it did when, of a very long run the beginning."""
    ceilings: Ceilings | None = None
    """What its machine can do, if that was asked for."""
    disk_access: str | None = None
    """How the offload folder was read: direct, page cache or memory. None: nothing was there."""

    @property
    def busy_s(self) -> float:
        """Time that was not spent waiting for other stages."""
        return self.wall_s - self.send_s - self.receive_s

    def idle_fraction(self, run_s: float) -> float:
        """The share of the run in which the stage waited for others."""
        return max(0.0, 1 - self.busy_s / run_s) if run_s > 0 else 0.0

    def bottleneck(self) -> str:
        """What the stage's own time went to, most of all."""
        parts = {"compute": self.compute_s, "weights, cache and activations": self.stalled_s}
        return max(parts, key=lambda name: parts[name])

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StageReport:
        """The report that `asdict` and JSON have made of one."""
        fields = dict(values)
        for name in ("layers", "token_ends_s"):
            fields[name] = tuple(fields[name])
        for name in ("prefill_layer_s", "decode_layer_s"):
            fields[name] = {int(layer): time for layer, time in fields[name].items()}
        fields["timeline"] = tuple((what, start, end) for what, start, end in fields["timeline"])
        if fields["ceilings"] is not None:
            fields["ceilings"] = Ceilings(**fields["ceilings"])
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Which part of the whole was done, for figures that are projected from it."""

    num_tokens: int
    gen_len: int
    layers: dict[int, float]
    """By executed layer: how many layers of the model it stands for."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The observations of one run."""

    num_prompts: int
    gpu_batch_size: int
    num_micro_batches: int
    prompt_len: int
    gen_len: int
    generated_tokens: int
    """Tokens of all prompts, up to their stop tokens. Of a projected run, those of the whole."""
    workload: Workload
    stages: Sequence[StageReport]
    projection: Projection | None
    roofline: Sequence[StageRoofline] = ()
    """Of each stage, if it was asked for."""

    @property
    def run_s(self) -> float:
        """From the common start to the end of the last stage."""
        return max(stage.wall_s for stage in self.stages)

    @property
    def latencies_s(self) -> tuple[float, float]:
        """Prefill and decode latency, projected if only a part was done."""
        prefill, decode = self._measured_latencies()
        projection = self.projection
        if projection is None:
            return prefill, decode
        if projection.layers:
            last = self.stages[-1]
            prefill = _weighted(last.prefill_layer_s, projection.layers)
            decode = _weighted(last.decode_layer_s, projection.layers)
        if projection.num_tokens > 1:
            decode *= (projection.gen_len - 1) / (projection.num_tokens - 1)
        return prefill, decode

    def _measured_latencies(self) -> tuple[float, float]:
        """The last stage has a prompt's token; a round's first ends its prefill."""
        ends = self.stages[-1].token_ends_s
        per_round = self.workload.num_tokens
        prefill = decode = 0.0
        for index, end in enumerate(ends):
            duration = end - (ends[index - 1] if index else 0.0)
            if index % per_round == 0:
                prefill += duration
            else:
                decode += duration
        return prefill, decode

    def figures(self) -> dict[str, Any]:
        """All figures, by the names in docs/metrics.md. None: there was nothing to measure."""
        prefill, decode = self.latencies_s
        total = prefill + decode
        prompt_tokens = self.num_prompts * self.prompt_len
        # The first token of each prompt is the prefill's.
        decode_tokens = max(0, self.generated_tokens - self.num_prompts)
        return {
            "prefill_latency": prefill,
            "prefill_throughput": metrics.throughput(prompt_tokens, prefill),
            "decode_latency": decode,
            "decode_throughput": metrics.throughput(decode_tokens, decode) if decode else None,
            "total_latency": total,
            "total_throughput": metrics.throughput(self.generated_tokens, total),
            "total_tokens": self.generated_tokens,
            "prompt_tokens": prompt_tokens,
            "projected": self.projection is not None,
            "bubble_fraction": self.bubble_fraction,
            "bubble_theory": self.bubble_theory,
            "bubble_of_schedule": self.bubble_of_schedule,
            "bottleneck_stage": self.bottleneck.rank,
            **roofline_figures(self.roofline),
        }

    @property
    def bubble_fraction(self) -> float:
        """The share of all stages' time that was spent waiting for each other."""
        idle = [stage.idle_fraction(self.run_s) for stage in self.stages]
        return sum(idle) / len(idle)

    @property
    def bubble_theory(self) -> float:
        """(S - 1) / (T + S - 1): a pipeline of S equal stages, filled by T blocks and drained."""
        num_stages = len(self.stages)
        return (num_stages - 1) / (self.workload.num_iterations + num_stages - 1)

    @property
    def bubble_of_schedule(self) -> float:
        """What this run's schedule gives with equal stages, and the times that units took.

        It is not filled and drained at every token: the next one follows at once where T >= S.
        """
        prefill_s = sum(sum(stage.prefill_layer_s.values()) for stage in self.stages)
        decode_s = sum(sum(stage.decode_layer_s.values()) for stage in self.stages)
        return idle_fraction(
            self.workload,
            len(self.stages),
            prefill_s=prefill_s,
            decode_s=decode_s / max(1, self.workload.num_tokens - 1),
        )

    @property
    def bottleneck(self) -> StageReport:
        """The stage that had most to do."""
        return max(self.stages, key=lambda stage: stage.busy_s)

    def row(self) -> ResultRow:
        """The run's line in the results."""
        figures = self.figures()
        return ResultRow(
            batch_size=self.gpu_batch_size,
            num_micro_batches=self.num_micro_batches,
            num_processes=len(self.stages),
            sequence_length=self.prompt_len,
            max_tokens=self.gen_len,
            throughput=figures["total_throughput"],
            mean_latency=figures["total_latency"],
        )

    def observations(self) -> dict[str, Any]:
        """What the figures follow from, for the record."""
        observed: dict[str, Any] = {"stages": [_observed(stage) for stage in self.stages]}
        if self.roofline:
            observed["roofline"] = {"stages": [stage.to_json() for stage in self.roofline]}
        return observed


def _observed(stage: StageReport) -> dict[str, Any]:
    """A report as the record has it; the ceilings stand beside the roofline."""
    values = asdict(stage) | {"timeline": {"columns": COLUMNS, "rows": stage.timeline}}
    del values["ceilings"]
    return values


def _weighted(times: dict[int, float], weights: dict[int, float]) -> float:
    return sum(time * weights[layer] for layer, time in times.items())
