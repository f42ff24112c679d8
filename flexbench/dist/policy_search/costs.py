"""What a stage's passes cost, at any placement, for the linear programme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flexbench.dist.partition import Stage
from flexbench.dist.plan import DistPlan
from flexbench.dist.policy import Policy
from flexbench.dist.policy_search.constants import Constants
from flexbench.dist.policy_search.durations import Durations
from flexbench.dist.policy_search.linear import Load, PassCost
from flexbench.dist.policy_search.placing import placed


def pass_costs(
    plan: DistPlan, policy: Policy, stage: Stage, constants: Constants
) -> tuple[PassCost, PassCost]:
    """A block's prefill, and a step in the middle of decoding."""
    past = plan.config.prompt_len + max(0, plan.config.gen_len - 2) / 2
    prefill, decode = (_pass_cost(plan, policy, stage, constants, past=at) for at in (None, past))
    return prefill, decode


def _pass_cost(
    plan: DistPlan, policy: Policy, stage: Stage, constants: Constants, *, past: float | None
) -> PassCost:
    def durations(home: str) -> Durations:
        return Durations(
            model=plan.model,
            policy=placed(policy, home, 100),
            stage=stage,
            constants=constants,
            prompt_len=plan.config.prompt_len,
        )

    context = None if past is None else past - constants.short_context
    batches = policy.num_gpu_batches

    def computing(at: Durations) -> float:
        return batches * sum(at.compute(layer, context) for layer in at.layers)

    on_gpu = computing(durations("gpu"))
    away = durations(next(iter(constants.homes))) if constants.homes else None
    loads = [load for home in constants.homes for load in _loads(durations(home), home, past)]
    return PassCost(
        computing=on_gpu,
        loaded_computing=0.0 if away is None else computing(away) - on_gpu,
        loads=loads,
        is_overlapped=policy.overlap,
        serial_kinds=frozenset({"activations"} if batches == 1 else ()),
    )


def _loads(durations: Durations, home: str, past: float | None) -> Iterator[Load]:
    batches = durations.policy.num_gpu_batches
    layers = durations.layers
    weights = sum(layer.weight.seconds[home] for layer in layers)
    cache = durations.cache_store(is_prefill=past is None).total
    if past is not None:
        cache += durations.cache_load(past).total
    num_whole = durations.num_whole_stored if past is None else 0
    hidden = 2 * (
        num_whole * durations.hidden(is_prefill=True).total
        + (len(layers) - 1 - num_whole) * durations.hidden(is_prefill=False).total
    )
    num_caches = sum(layer.has_cache for layer in layers)
    yield Load(kind="weights", home=home, seconds=weights)
    yield Load(kind="cache", home=home, seconds=batches * num_caches * cache)
    yield Load(kind="activations", home=home, seconds=batches * hidden)


def with_batches(policy: Policy, batch_size: int, num_batches: int) -> Policy:
    """`policy` with other batches."""
    return replace(policy, gpu_batch_size=batch_size, num_gpu_batches=num_batches)
