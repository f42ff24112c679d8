"""Where the bytes of weights, cache and activations lie. Pure arithmetic: nothing is allocated.

A tensor is split by its rows: the first are on the gpu, the next on the cpu, the rest on disk. The
weights of a layer are laid out one after the other and split as one, so that what is asked is met
within one row of one tensor; a layer's share of each home is then one contiguous range of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flexbench.dist.policy import Percent

_ALIGNMENT = 64  # a cache line, and a multiple of every element's size


@dataclass(frozen=True)
class RowSplit:
    """How many rows each home has."""

    gpu: int
    cpu: int
    disk: int

    @property
    def total(self) -> int:
        """All rows."""
        return self.gpu + self.cpu + self.disk

    def ranges(self) -> tuple[range, range, range]:
        """The rows of gpu, cpu and disk."""
        cpu_end = self.gpu + self.cpu
        return range(self.gpu), range(self.gpu, cpu_end), range(cpu_end, self.total)


def split_rows(num_rows: int, percent: Percent) -> RowSplit:
    """Split rows as `percent` says, each boundary rounded to the nearest row."""
    gpu = _round(num_rows * percent.gpu / 100)
    cpu_end = _round(num_rows * (percent.gpu + percent.cpu) / 100)
    return RowSplit(gpu, cpu_end - gpu, num_rows - cpu_end)


def most_rows(max_rows: int, percent: Percent) -> RowSplit:
    """What each home needs at most for any number of rows up to `max_rows`.

    The cpu's share is the difference of two rounded numbers: one row more may be needed.
    """
    split = split_rows(max_rows, percent)
    spare = 1 if percent.cpu > 0 and split.cpu < max_rows else 0
    return RowSplit(split.gpu, split.cpu + spare, split.disk)


def _round(value: float) -> int:
    return int(value + 0.5)  # round() would round halves to even: 0.5 to 0, 1.5 to 2


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as it is stored: `rows` pieces of `row_bytes` bytes. A vector is one piece."""

    name: str
    rows: int
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class LayerLayout:
    """A layer's tensors in one range of bytes: [0, gpu_end) on gpu, [gpu_end, cpu_end) on cpu.

    The rest, up to `num_bytes`, is on disk.
    """

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    num_bytes: int
    gpu_end: int
    cpu_end: int

    @property
    def home_bytes(self) -> HomeBytes:
        """Bytes at each home."""
        return HomeBytes(self.gpu_end, self.cpu_end - self.gpu_end, self.num_bytes - self.cpu_end)

    @cached_property
    def load_start(self) -> int:
        """Where the part begins that has to be in a buffer while the layer is computed.

        It is the begin of the first tensor that is not wholly on the gpu: a tensor in two homes is
        put together in the buffer.
        """
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            if offset + tensor.num_bytes > self.gpu_end:
                return offset
        return self.num_bytes


def lay_out(tensors: Sequence[TensorSpec], percent: Percent) -> LayerLayout:
    """Put tensors one after the other, and set the two boundaries at rows next to `percent`."""
    offsets = []
    end = 0
    for tensor in tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        offsets.append(start)
        end = start + tensor.num_bytes
    gpu_end = _nearest_row(tensors, offsets, end, percent.gpu)
    cpu_end = _nearest_row(tensors, offsets, end, percent.gpu + percent.cpu)
    return LayerLayout(tuple(tensors), tuple(offsets), end, gpu_end, max(gpu_end, cpu_end))


def _nearest_row(
    tensors: Sequence[TensorSpec], offsets: Sequence[int], num_bytes: int, percent: float
) -> int:
    target = num_bytes * percent / 100
    boundary = 0
    for tensor, offset in zip(tensors, offsets, strict=True):
        if offset > target:
            break
        rows = min(tensor.rows, _round((target - offset) / tensor.row_bytes))
        if rows:
            boundary = offset + rows * tensor.row_bytes
    return boundary


@dataclass(frozen=True)
class HomeBytes:
    """Bytes at each of the three homes."""

    gpu: int = 0
    cpu: int = 0
    disk: int = 0

    def __add__(self, other: HomeBytes) -> HomeBytes:
        return HomeBytes(self.gpu + other.gpu, self.cpu + other.cpu, self.disk + other.disk)

    def __mul__(self, factor: int) -> HomeBytes:
        return HomeBytes(self.gpu * factor, self.cpu * factor, self.disk * factor)

    @property
    def total(self) -> int:
        """Bytes of all homes."""
        return self.gpu + self.cpu + self.disk

    @property
    def percent(self) -> tuple[float, float, float]:
        """What each home has of the total; 100, 0, 0 of nothing."""
        if not self.total:
            return (100.0, 0.0, 0.0)
        gpu, cpu, disk = (100 * part / self.total for part in (self.gpu, self.cpu, self.disk))
        return gpu, cpu, disk


def bytes_of_rows(split: RowSplit, row_bytes: int) -> HomeBytes:
    """Bytes at each home of rows that are split."""
    return HomeBytes(split.gpu * row_bytes, split.cpu * row_bytes, split.disk * row_bytes)
