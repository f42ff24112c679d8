"""The search: every size of batches, the best placement of each, and of these the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from flexbench.core.errors import ConfigError
from flexbench.core.units import format_bytes
from flexbench.dist.placement import HomeBytes
from flexbench.dist.plan import DistPlan
from flexbench.dist.policy_search.constants import Constants
from flexbench.dist.policy_search.costs import pass_costs, with_batches
from flexbench.dist.policy_search.linear import HomeSpeeds, Problem, best_placement
from flexbench.dist.policy_search.memory import Limits, MemoryModel, with_policy
from flexbench.dist.policy_search.prediction import Prediction, predict
from flexbench.dist.policy_search.request import PolicyRequest

# Of placements that are about as fast, the one with the fewest prompts: it is done the soonest.
_ABOUT = 0.02
_NEAR = 0.1
_NUM_CANDIDATES = 8
# A rounded placement that is too large is looked for again, within less.
_MAX_ATTEMPTS = 12
_MAX_NUM_BATCHES = 32


@dataclass(frozen=True, kw_only=True)
class PolicySearch:
    """What was chosen, from what, and what is expected of it."""

    constants: Constants
    limits: Limits
    request: PolicyRequest
    prediction: Prediction
    num_solved: int
    """Sizes of batches for which there was a placement."""

    def as_json(self) -> dict[str, Any]:
        """For the record. What is infinitely fast is null there."""
        prediction = self.prediction
        described: dict[str, Any] = _finite(
            {
                "constants": asdict(self.constants),
                "limits": asdict(self.limits),
                "request": asdict(self.request),
                "predicted": asdict(prediction)
                | {"total_s": prediction.total_s, "total_throughput": prediction.throughput},
            }
        )
        return described


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def choose(
    plan: DistPlan, request: PolicyRequest, limits: Limits, constants: Constants
) -> tuple[DistPlan, PolicySearch]:
    """The plan with the policy of highest predicted throughput that fits `limits`.

    Raises ConfigError when nothing fits.
    """
    candidates = _candidates(plan, request, limits, constants)
    if not candidates:
        raise _nothing_fits(plan, request, limits)
    predicted = [(candidate, predict(candidate, constants)) for candidate in _promising(candidates)]
    best = max(prediction.throughput for _, prediction in predicted)
    chosen, prediction = min(
        (pair for pair in predicted if pair[1].throughput >= (1 - _ABOUT) * best),
        key=lambda pair: (pair[1].num_prompts, -pair[1].throughput),
    )
    return chosen, PolicySearch(
        constants=constants,
        limits=limits,
        request=request,
        prediction=prediction,
        num_solved=len(candidates),
    )


def _promising(candidates: list[tuple[float, DistPlan]]) -> list[DistPlan]:
    """The fastest by the linear model, and the smallest of those that come near."""
    by_speed = sorted(candidates, key=lambda candidate: candidate[0])
    near = [(s, plan) for s, plan in by_speed if s <= (1 + _NEAR) * by_speed[0][0]]
    by_size = sorted(near, key=lambda candidate: candidate[1].num_prompts)
    chosen = by_speed[:_NUM_CANDIDATES] + by_size[:_NUM_CANDIDATES]
    return list({id(plan): plan for _, plan in chosen}.values())


def batch_sizes(plan: DistPlan, request: PolicyRequest) -> list[int]:
    """The batch sizes among which is chosen, in order."""
    if request.is_batch_fixed:
        return [plan.config.gpu_batch_size]
    batches = plan.config.num_gpu_batches if request.is_num_batches_fixed else 1
    most = max(1, request.max_batch // (plan.num_inner_iterations * batches))
    return [size for size in _steps() if size < most] + [most]


def _steps() -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ...: powers of two, and the middle between two."""
    return sorted({2**n for n in range(20)} | {3 * 2**n for n in range(20)})


def _all_batches(plan: DistPlan, request: PolicyRequest) -> Iterator[tuple[int, int]]:
    for size in batch_sizes(plan, request):
        if request.is_num_batches_fixed:
            yield size, plan.config.num_gpu_batches
            continue
        most = max(1, request.max_batch // (plan.num_inner_iterations * size))
        for count in _steps():
            if count <= min(most, _MAX_NUM_BATCHES):
                yield size, count


def _candidates(
    plan: DistPlan, request: PolicyRequest, limits: Limits, constants: Constants
) -> list[tuple[float, DistPlan]]:
    """Plans that fit, with their seconds a prompt by the linear model."""
    memory = MemoryModel(plan)
    found = []
    for size, count in _all_batches(plan, request):
        placed = _place(plan, request, limits, constants, memory, size, count)
        if placed is not None:
            found.append(placed)
    return found


def _place(
    plan: DistPlan,
    request: PolicyRequest,
    limits: Limits,
    constants: Constants,
    memory: MemoryModel,
    size: int,
    count: int,
) -> tuple[float, DistPlan] | None:
    policy = with_batches(plan.policy, size, count)
    costs = [pass_costs(plan, policy, stage.stage, constants) for stage in plan.stages]
    demands = memory.demands(size, count)
    tightened = limits
    for _ in range(_MAX_ATTEMPTS):
        placement = best_placement(
            Problem(
                prefill=[prefill for prefill, _ in costs],
                decode=[decode for _, decode in costs],
                num_tokens=plan.config.gen_len,
                demands=demands,
                limits=tightened,
                speeds={
                    home: HomeSpeeds(computing=times.compute_speed, loading=times.load_speed)
                    for home, times in constants.homes.items()
                },
                percent=plan.config.percent if request.is_percent_fixed else None,
            )
        )
        if placement is None:
            return None
        found = with_policy(plan, placement.percent, size, count)
        excess = limits.excess([stage.total for stage in found.stages])
        if not excess:
            return placement.seconds / (size * count), found
        if request.is_percent_fixed:
            return None
        tightened = tightened.less(excess)
    return None


def _nothing_fits(plan: DistPlan, request: PolicyRequest, limits: Limits) -> ConfigError:
    """Names what the smallest policy would take."""
    config = plan.config
    size = config.gpu_batch_size if request.is_batch_fixed else 1
    count = config.num_gpu_batches if request.is_num_batches_fixed else 1
    percent = config.percent if request.is_percent_fixed else (0.0,) * 6
    smallest = with_policy(plan, percent, size, count)
    totals = [stage.total for stage in smallest.stages]
    host = sum(totals, HomeBytes())
    option = "--cpu-memory"
    if limits.gpu is not None and "gpu" in limits.excess(totals):
        option = "--gpu-memory"
    on_host = host.cpu if limits.gpu is not None else host.cpu + host.gpu
    gpu = "" if limits.gpu is None else f"{format_bytes(max(t.gpu for t in totals))} of a GPU, "
    where = "the given placement" if request.is_percent_fixed else "with everything on disk"
    return ConfigError(
        option,
        f"no policy fits into {limits.describe()}: {size * count} prompts a block, {where}, take "
        f"{gpu}{format_bytes(on_host)} of memory and {format_bytes(host.disk)} of disk",
    )
