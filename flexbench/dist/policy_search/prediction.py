"""How long a plan will take, and what will bound it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from flexbench.core import metrics
from flexbench.dist.plan import DistPlan
from flexbench.dist.policy_search.constants import Constants
from flexbench.dist.policy_search.durations import Durations
from flexbench.dist.policy_search.simulation import UnitTimes, simulate


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of all prompts of a run, in seconds."""

    num_prompts: int
    gen_len: int
    prefill_s: float
    decode_s: float
    prefill_bound: str
    """What the prefill's time goes to, most of all."""
    decode_bound: str

    @property
    def total_s(self) -> float:
        """Prefill and decoding."""
        return self.prefill_s + self.decode_s

    @property
    def throughput(self) -> float:
        """New tokens a second, as `total_throughput` is measured."""
        return metrics.throughput(self.num_prompts * self.gen_len, self.total_s)


def predict(plan: DistPlan, constants: Constants) -> Prediction:
    """Play one block through every stage, and the stages' times through the pipeline.

    The messages between stages are not counted.
    """
    config = plan.config
    units = [
        simulate(
            Durations(
                model=plan.model,
                policy=plan.policy,
                stage=stage.stage,
                constants=constants,
                prompt_len=config.prompt_len,
            ),
            decode_past=config.prompt_len + max(0, config.gen_len - 2) / 2,
        )
        for stage in plan.stages
    ]
    prefill_s, total_s = _run_pipeline(units, config.gen_len, plan.num_inner_iterations)
    return Prediction(
        num_prompts=plan.num_prompts,
        gen_len=config.gen_len,
        prefill_s=prefill_s,
        decode_s=total_s - prefill_s,
        prefill_bound=_largest(max(units, key=lambda unit: unit.prefill_s).prefill_parts),
        decode_bound=_largest(max(units, key=lambda unit: unit.decode_s).decode_parts),
    )


def _run_pipeline(
    stages: list[UnitTimes], num_tokens: int, num_iterations: int
) -> tuple[float, float]:
    """When the last stage has ended the prefill, and all; see `schedule.idle_fraction`."""
    ends: list[list[float]] = [[0.0] * num_iterations for _ in stages]
    prefill_s = 0.0
    for token in range(num_tokens):
        for iteration in range(num_iterations):
            for index, stage in enumerate(stages):
                before = ends[index][iteration - 1]  # of the last token for the first iteration
                ready = ends[index - 1][iteration] if index > 0 else ends[-1][iteration]
                duration = stage.prefill_s if token == 0 else stage.decode_s
                ends[index][iteration] = max(before, ready) + duration
        if token == 0:
            prefill_s = ends[-1][-1]
    return prefill_s, ends[-1][-1]


def _largest(parts: dict[str, float]) -> str:
    if not parts:
        return "nothing"
    ((name, _),) = Counter(parts).most_common(1)
    return name
