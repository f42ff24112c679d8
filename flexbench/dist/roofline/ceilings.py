"""The ceilings of a machine: the fastest that it was seen to read, multiply and copy. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What one rank's share of a machine can do at best; the others on its host do the same."""

    num_threads: int
    """With which all of it was measured on the CPU."""
    device: str
    """Where is computed: cpu or cuda."""
    dtype: str
    """Of the matrix product."""
    memory_bytes_per_s: float
    """Reading an array that is larger than the caches, where is computed."""
    host_memory_bytes_per_s: float
    """The same in the CPU's memory; on a CPU it is the same number."""
    matmul_flops_per_s: float
    """A matrix product large enough to be bound by computing: 2 operations a multiplication."""
    host_to_device_bytes_per_s: float
    """Bytes copied from the CPU's memory to where is computed; on a CPU within memory."""
    device_to_host_bytes_per_s: float
    """And back."""
    disk_read_bytes_per_s: float | None = None
    """Reading the offload folder as the engine does. None: nothing is on disk."""
    disk_write_bytes_per_s: float | None = None

    def better_of(self, other: Ceilings) -> Ceilings:
        """The higher of each ceiling: both were reached."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if name.endswith("_per_s") and value is not None:
                values[name] = max(value, getattr(other, name) or 0.0)
        return Ceilings(**values)
