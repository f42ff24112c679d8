"""The GPUs of a server: given, detected, or the sizes that cards commonly have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexbench.core.environment import visible_gpus
from flexbench.core.errors import ConfigError
from flexbench.core.units import format_bytes, parse_bytes
from flexbench.server_config.budget import GIB, MAX_UNEVENNESS

# From RTX 3050 to B200: what is sold, or was until recently.
COMMON_CARD_GIB = (8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 192)
_MAX_SWEEP = 1000


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. All but `memory_bytes` is known only of one that is in this machine.

    `device` is torch's name of it, 'cuda:0'. Without `is_known` its memory cannot be read, and no
    GpuSet takes it.
    """

    memory_bytes: int
    free_bytes: int | None = None
    name: str | None = None
    device: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether the driver tells how much memory it has: `memory_bytes` is 0 otherwise."""
        return self.memory_bytes > 0


@dataclass(frozen=True, kw_only=True)
class GpuSet:
    """The GPUs that one server uses together, and how their memory is known.

    `source` is 'given', 'detected' or 'common card size'.
    """

    gpus: tuple[Gpu, ...]
    source: str

    def __post_init__(self) -> None:
        """Raise ConfigError for a GPU whose memory cannot be read."""
        for gpu in self.gpus:
            if not gpu.is_known:
                raise ConfigError(
                    "--gpu-memory",
                    f"the memory of {gpu.device} cannot be read (MIG?); please give it",
                )

    @property
    def memory_bytes(self) -> int:
        """What Petals counts with: the smallest one's memory, times their number."""
        return min(gpu.memory_bytes for gpu in self.gpus) * len(self.gpus)

    @property
    def free_bytes(self) -> int | None:
        """The same for what is free now; None where that is not known."""
        free = [gpu.free_bytes for gpu in self.gpus if gpu.free_bytes is not None]
        return min(free) * len(self.gpus) if len(free) == len(self.gpus) else None

    @property
    def is_uneven(self) -> bool:
        """Whether Petals refuses to choose a number of blocks for them."""
        memories = [gpu.memory_bytes for gpu in self.gpus]
        return max(memories) / min(memories) > MAX_UNEVENNESS

    @property
    def wasted_share(self) -> float:
        """The share of all memory that stays unused because the smallest GPU sets the measure."""
        total = sum(gpu.memory_bytes for gpu in self.gpus)
        return 1 - self.memory_bytes / total


def parse_gpu_memory(values: Sequence[str]) -> tuple[GpuSet, ...]:
    """The values of --gpu-memory: one set of GPUs, or for a sweep one set a size.

    '24GiB' is a GPU, repeated it is several; '8GiB:192GiB' are all common sizes from one to the
    other, '8GiB:192GiB:8GiB' all in steps. Raises ConfigError.
    """
    if any(":" in value for value in values):
        if len(values) > 1:
            raise ConfigError("--gpu-memory", "a sweep A:B cannot be combined with other values")
        return tuple(
            GpuSet(gpus=(Gpu(memory_bytes=size),), source="given") for size in _sweep(values[0])
        )
    sizes = [_parse_size(value) for value in values]
    return (GpuSet(gpus=tuple(Gpu(memory_bytes=size) for size in sizes), source="given"),)


def _parse_size(text: str) -> int:
    size = parse_bytes("--gpu-memory", text)
    if size < 1:
        raise ConfigError("--gpu-memory", f"must be above 0, not {text!r}")
    return size


def _sweep(text: str) -> list[int]:
    parts = [_parse_size(part) for part in text.split(":")]
    if len(parts) > 3:
        raise ConfigError("--gpu-memory", f"must be A:B or A:B:STEP, not {text!r}")
    first, last = parts[0], parts[1]
    if first > last:
        raise ConfigError("--gpu-memory", f"the first size of {text!r} is larger than the second")
    if len(parts) == 2:
        common = (gib * GIB for gib in COMMON_CARD_GIB)
        return sorted({first, last, *(size for size in common if first <= size <= last)})
    step = parts[2]
    if (last - first) // step >= _MAX_SWEEP:
        raise ConfigError("--gpu-memory", f"{text!r} has more than {_MAX_SWEEP} sizes")
    return list(range(first, last + 1, step))


def common_cards() -> tuple[GpuSet, ...]:
    """One GPU of each size that cards commonly have."""
    return tuple(
        GpuSet(gpus=(Gpu(memory_bytes=gib * GIB),), source="common card size")
        for gib in COMMON_CARD_GIB
    )


@dataclass(frozen=True, kw_only=True)
class Detection:
    """The GPUs that torch would see here, the n-th as cuda:n.

    `problem` says why there are none although there may be some. `is_order_uncertain`: they differ,
    and torch may number them in another order, unless CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """

    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None
    is_order_uncertain: bool = False


def detect() -> Detection:
    """Ask the driver's own tool, within some seconds.

    torch reports a little less memory than the driver, which keeps some for itself.
    """
    listing = visible_gpus()
    gpus = tuple(
        Gpu(
            memory_bytes=gpu.memory_bytes or 0,
            free_bytes=gpu.free_bytes,
            name=gpu.name,
            device=f"cuda:{number}",
        )
        for number, gpu in enumerate(listing.gpus)
    )
    return Detection(
        gpus=gpus, problem=listing.problem, is_order_uncertain=listing.is_order_uncertain
    )


def detect_gpus() -> tuple[Gpu, ...]:
    """Only the GPUs of `detect`."""
    return detect().gpus


def describe_gpus(gpus: GpuSet) -> str:
    """'2 x 24 GiB', with the name where it is known."""
    first = gpus.gpus[0]
    size = format_bytes(first.memory_bytes)
    if len({gpu.memory_bytes for gpu in gpus.gpus}) > 1:
        return " + ".join(format_bytes(gpu.memory_bytes) for gpu in gpus.gpus)
    count = f"{len(gpus.gpus)} x " if len(gpus.gpus) > 1 else ""
    return f"{count}{first.name}, {size}" if first.name else f"{count}{size}"
