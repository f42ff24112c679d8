"""The search as a command does it: measured on rank 0, and the same policy for all ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from flexbench.core.environment import usable_cpus
from flexbench.core.errors import ConfigError
from flexbench.core.progress import Progress
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.hosts import num_threads
from flexbench.dist.plan import DistPlan
from flexbench.dist.policy_search.calibration import Calibration
from flexbench.dist.policy_search.constants import Constants
from flexbench.dist.policy_search.memory import Limits, find_limits, with_policy
from flexbench.dist.policy_search.request import PolicyRequest
from flexbench.dist.policy_search.search import batch_sizes, choose
from flexbench.dist.stage import fingerprint, memory_errors
from flexbench.ranks.clocks import host_id
from flexbench.ranks.group import Group, open_ranks
from flexbench.ranks.launch import Launch

_NOTHING_ELSEWHERE = (100.0, 0.0) * 3


def search_policy(
    plan: DistPlan,
    request: PolicyRequest,
    launch: Launch,
    *,
    head_ip: str | None,
    port: int | None,
    progress: Progress,
) -> DistPlan:
    """`plan` with the policy that rank 0 found for all; rank 0's has the search with it.

    All ranks have to call it. Raises ConfigError when nothing fits, or ranks are on several hosts.
    """
    options = json.dumps([fingerprint(plan), asdict(request)], sort_keys=True)
    with open_ranks(
        launch,
        purpose="dist plan",
        head_ip=head_ip,
        port=port,
        timeout_s=plan.config.comm_timeout_s,
        fingerprint=options,
    ) as group:
        places = group.gather("place", {"host": host_id(), "cpus": usable_cpus()})
        found = None
        if places is not None:
            found = _search(plan, request, launch, places, progress)
        return _share(group, plan, found)


def _share(group: Group, plan: DistPlan, found: DistPlan | None) -> DistPlan:
    policy = None
    if found is not None:
        config = found.config
        policy = [list(config.percent), config.gpu_batch_size, config.num_gpu_batches]
    percent, batch_size, num_batches = group.broadcast("policy", policy)
    if found is not None:
        return found
    return with_policy(plan, tuple(percent), batch_size, num_batches)


def _search(
    plan: DistPlan,
    request: PolicyRequest,
    launch: Launch,
    places: list[dict[str, Any]],
    progress: Progress,
) -> DistPlan:
    if len({place["host"] for place in places}) > 1:
        raise ConfigError(
            "--policy", "auto measures one host, and these ranks are on several; say --percent"
        )
    limits = find_limits(plan, request)
    sharing = sum(place["cpus"] == places[0]["cpus"] for place in places)
    with _threads(num_threads(len(places[0]["cpus"]) // sharing)):
        constants = _measure(plan, request, limits, launch, progress)
    chosen, search = choose(plan, request, limits, constants)
    return replace(chosen, search=search)


def _measure(
    plan: DistPlan,
    request: PolicyRequest,
    limits: Limits,
    launch: Launch,
    progress: Progress,
) -> Constants:
    env = ExecutionEnv.create(plan.config.offload_dir, local_rank=launch.local_rank)
    calibration = Calibration(
        model=plan.model,
        config=plan.config,
        env=env,
        batches=batch_sizes(plan, request),
        homes=_homes(plan, request, limits),
    )
    with progress.phase("Measuring layers", total=calibration.num_parts) as phase, memory_errors():
        return calibration.measure(phase.advance)


def _homes(plan: DistPlan, request: PolicyRequest, limits: Limits) -> list[str]:
    """Where anything may have to be besides the gpu."""
    if request.is_percent_fixed:
        policy = plan.policy
        kinds = (policy.weights, policy.cache, policy.activations)
        homes = {"cpu": [kind.cpu for kind in kinds], "disk": [kind.disk for kind in kinds]}
        return [home for home, shares in homes.items() if any(shares)]
    size = batch_sizes(plan, request)[-1]
    count = plan.config.num_gpu_batches if request.is_num_batches_fixed else 1
    largest = with_policy(plan, _NOTHING_ELSEWHERE, size, count)
    if not limits.excess([stage.total for stage in largest.stages]):
        return []
    # Without a GPU, the cpu is where the gpu is, and only slower.
    return ["cpu", "disk"] if plan.has_gpu else ["disk"]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads for the time of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
