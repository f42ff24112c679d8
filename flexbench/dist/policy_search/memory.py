"""What policies take of every home, and what there is to be had.

`plan.make_plan` is the judge of a policy. To search, its figures are taken apart into what grows in
proportion to a share, and what is there as soon as anything is elsewhere.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

import torch

from flexbench.core import environment
from flexbench.core.errors import ConfigError
from flexbench.core.units import format_bytes
from flexbench.dist.placement import HomeBytes
from flexbench.dist.plan import DistPlan, plan_stages
from flexbench.dist.policy_search.request import GIB, PolicyRequest

# Of free memory: estimates are none to the byte, and the search itself leaves something behind.
_FREE_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes that a policy may take. Without a GPU, gpu and cpu together have `cpu`."""

    gpu: int | None
    """Of one GPU; None without any."""
    cpu: int
    """Of the host, for all ranks."""
    disk: int

    def excess(self, totals: list[HomeBytes]) -> dict[str, int]:
        """By home, how much too much the stages on this host take; nothing if they fit."""
        host = sum(totals, HomeBytes())
        found = {
            "cpu": host.cpu + (host.gpu if self.gpu is None else 0) - self.cpu,
            "disk": host.disk - self.disk,
        }
        if self.gpu is not None:
            found["gpu"] = max(total.gpu for total in totals) - self.gpu
        return {home: size for home, size in found.items() if size > 0}

    def less(self, excess: dict[str, int]) -> Limits:
        """Tighter ones, for a search that came out a little too large."""
        return Limits(
            gpu=None if self.gpu is None else self.gpu - excess.get("gpu", 0),
            cpu=self.cpu - excess.get("cpu", 0),
            disk=self.disk - excess.get("disk", 0),
        )

    def describe(self) -> str:
        """For people."""
        gpu = "" if self.gpu is None else f"{format_bytes(self.gpu)} of each GPU, "
        return f"{gpu}{format_bytes(self.cpu)} of memory, {format_bytes(self.disk)} of disk"


def find_limits(plan: DistPlan, request: PolicyRequest) -> Limits:
    """What is asked for, or else nine tenths of what is free now.

    Raises ConfigError for a limit of a GPU where there is none.
    """
    folder = plan.config.offload_dir.expanduser()
    while not folder.exists():
        folder = folder.parent
    disk = int(_FREE_SHARE * shutil.disk_usage(folder).free)
    gpu = None
    if plan.has_gpu:
        free, _ = torch.cuda.mem_get_info()
        gpu = int(_FREE_SHARE * free)
        if request.gpu_memory is not None:
            gpu = int(request.gpu_memory * GIB)
    elif request.gpu_memory is not None:
        raise ConfigError(
            "--gpu-memory",
            "there is no CUDA here: 'gpu' and 'cpu' are the same memory; use --cpu-memory",
        )
    if request.cpu_memory is not None:
        return Limits(gpu=gpu, cpu=int(request.cpu_memory * GIB), disk=disk)
    available = environment.available_memory_bytes()
    if available is None:
        raise ConfigError("--cpu-memory", "this system does not tell what is free; say it")
    return Limits(gpu=gpu, cpu=int(_FREE_SHARE * available), disk=disk)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one stage takes: its placed data at any shares, and what computing adds."""

    weights: int
    cache: int
    activations: int
    fixed: HomeBytes
    """Whatever the placement."""
    weight_buffers: HomeBytes
    """As soon as some weights are not on the gpu."""
    activation_buffers: HomeBytes
    cache_buffers: dict[str, HomeBytes]
    """In proportion to the cache's share of a home."""


class MemoryModel:
    """What stages take with any sizes of batches. Probes the plan once, and extends its lines."""

    def __init__(self, plan: DistPlan) -> None:
        self._plan = plan
        corners = {
            "gpu": (100, 0, 100, 0, 100, 0),
            "weights": (0, 0, 100, 0, 100, 0),
            "cache cpu": (100, 0, 0, 100, 100, 0),
            "cache disk": (100, 0, 0, 0, 100, 0),
            "activations": (100, 0, 100, 0, 0, 0),
        }
        self._probes = {
            (corner, size, batches): plan_stages(_sized(plan, percent, size, batches))
            for corner, percent in corners.items()
            for size in (1, 2)
            for batches in (1, 2)
        }

    def demands(self, batch_size: int, num_batches: int) -> list[Demand]:
        """Of every stage."""
        return [
            self._demand(index, batch_size, num_batches) for index in range(self._plan.num_stages)
        ]

    def _demand(self, index: int, size: int, batches: int) -> Demand:
        base = self._probes["gpu", 1, 1][index]
        gpu = self._computing("gpu", index, size, batches)

        def extra(corner: str) -> HomeBytes:
            return _difference(self._computing(corner, index, size, batches), gpu)

        return Demand(
            weights=base.weights.total,
            cache=base.cache.total * size * batches,
            activations=base.activations.total * size * batches,
            fixed=gpu,
            weight_buffers=extra("weights"),
            activation_buffers=extra("activations"),
            cache_buffers={home: extra(f"cache {home}") for home in ("cpu", "disk")},
        )

    def _computing(self, corner: str, index: int, size: int, batches: int) -> HomeBytes:
        """Bilinear in both sizes."""
        a, b, c, d = (
            self._probes[corner, s, n][index].computing for s, n in ((1, 1), (2, 1), (1, 2), (2, 2))
        )
        x, y = size - 1, batches - 1

        def line(name: str) -> int:
            at, by_x, by_y, both = (getattr(probe, name) for probe in (a, b, c, d))
            return int(at + (by_x - at) * x + (by_y - at) * y + (both - by_x - by_y + at) * x * y)

        return HomeBytes(line("gpu"), line("cpu"), line("disk"))


def _difference(one: HomeBytes, other: HomeBytes) -> HomeBytes:
    return HomeBytes(one.gpu - other.gpu, one.cpu - other.cpu, one.disk - other.disk)


def _sized(
    plan: DistPlan, percent: tuple[float, ...], batch_size: int, num_batches: int
) -> DistPlan:
    config = replace(
        plan.config,
        percent=percent,
        gpu_batch_size=batch_size,
        num_gpu_batches=num_batches,
    )
    return replace(plan, config=config, policy=config.policy())


def with_policy(
    plan: DistPlan, percent: tuple[float, ...], batch_size: int, num_batches: int
) -> DistPlan:
    """`plan` with another policy, and what its stages take then."""
    sized = _sized(plan, percent, batch_size, num_batches)
    return replace(sized, stages=plan_stages(sized))
