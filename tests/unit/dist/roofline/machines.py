"""Ceilings of a machine that there is not, for arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flexbench.dist.roofline.ceilings import Ceilings

_SLOW = Ceilings(
    num_threads=2,
    device="cpu",
    dtype="float32",
    memory_bytes_per_s=1e6,
    host_memory_bytes_per_s=1e6,
    matmul_flops_per_s=1e6,
    host_to_device_bytes_per_s=5e5,
    device_to_host_bytes_per_s=5e5,
)


def ceilings(**changed: Any) -> Ceilings:
    """Of a CPU that reads and multiplies a million a second, with nothing on disk, by default."""
    return replace(_SLOW, **changed)
