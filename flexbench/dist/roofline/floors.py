"""The least time that counted work takes under measured ceilings. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flexbench.dist.placement import HomeBytes
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.counting import Operation, StageWork, Work


class Bound(StrEnum):
    """What work cannot be faster than."""

    COMPUTE = "compute"
    MEMORY = "memory"
    LINK = "link"
    """Copies between the CPU's memory and where is computed."""
    DISK = "disk"


@dataclass(frozen=True)
class Floor:
    """A least time, in seconds, and what most of it goes to. None: there was nothing to do."""

    seconds: float
    bound_by: Bound | None


def compute_floor(work: Work, ceilings: Ceilings) -> Floor:
    """The sum over operations of max(flops / matmul ceiling, bytes / memory bandwidth).

    A sum of maxima, for they come one after the other: no product can compute while another one
    reads. It is bound by what is the maximum of most of that time.
    """
    seconds = {Bound.COMPUTE: 0.0, Bound.MEMORY: 0.0}
    for operation, count in work.operations.items():
        floor = operation_floor(operation, ceilings)
        if floor.bound_by is not None:
            seconds[floor.bound_by] += floor.seconds * count
    return _floor(sum(seconds.values()), seconds)


def operation_floor(operation: Operation, ceilings: Ceilings) -> Floor:
    """The longer of computing and reading. On the host beside a GPU only reading is known."""
    if operation.is_on_host:
        seconds = {Bound.MEMORY: operation.memory_bytes / ceilings.host_memory_bytes_per_s}
    else:
        seconds = {
            Bound.COMPUTE: operation.flops / ceilings.matmul_flops_per_s,
            Bound.MEMORY: operation.memory_bytes / ceilings.memory_bytes_per_s,
        }
    return _floor(max(seconds.values()), seconds)


def load_floor(moved: HomeBytes, ceilings: Ceilings) -> Floor:
    """The longest of the ways from the homes: these could all be used at once."""
    return _slowest(
        moved,
        link=ceilings.host_to_device_bytes_per_s,
        disk=ceilings.disk_read_bytes_per_s,
        memory=ceilings.memory_bytes_per_s,
    )


def store_floor(moved: HomeBytes, ceilings: Ceilings) -> Floor:
    """The longest of the ways to the homes."""
    return _slowest(
        moved,
        link=ceilings.device_to_host_bytes_per_s,
        disk=ceilings.disk_write_bytes_per_s,
        memory=ceilings.memory_bytes_per_s,
    )


def hidden_floor(work: StageWork, ceilings: Ceilings) -> Floor:
    """Storing and then loading: a layer's input is the output of the one before."""
    stored = store_floor(work.hidden_store, ceilings)
    loaded = load_floor(work.hidden_load, ceilings)
    longer = max(stored, loaded, key=lambda floor: floor.seconds)
    return Floor(stored.seconds + loaded.seconds, longer.bound_by)


def _slowest(moved: HomeBytes, *, link: float, disk: float | None, memory: float) -> Floor:
    assert disk is not None or not moved.disk, "it is measured wherever something is on disk"
    seconds = {
        Bound.MEMORY: moved.gpu / memory,
        Bound.LINK: moved.cpu / link,
        Bound.DISK: moved.disk / disk if disk is not None else 0.0,
    }
    return _floor(max(seconds.values()), seconds)


def _floor(total_s: float, seconds: dict[Bound, float]) -> Floor:
    return Floor(total_s, max(seconds, key=lambda bound: seconds[bound]) if total_s > 0 else None)
