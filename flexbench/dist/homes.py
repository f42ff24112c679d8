"""The homes of tensors: gpu, cpu and disk, and all three together. Only here do devices differ.

A home allocates *parts*. A part is an array of rows that can be written and read in runs of rows,
which lie one after the other in memory or in a file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from flexbench.core.errors import ConfigError, RunError
from flexbench.dist.offload_file import BLOCK_BYTES, Access, Bytes, OffloadFile

_HUGE_PAGE_BYTES = 2 << 20


class Part(Protocol):
    """Rows of a tensor in one home."""

    @property
    def num_rows(self) -> int:
        """How many rows there are."""

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Put `rows`, of any device, in place of the rows from `start` on."""

    def read(self, start: int, out: torch.Tensor) -> None:
        """Copy rows from `start` on into `out`, which is contiguous and of any device."""

    def close(self) -> None:
        """Give the space back."""


class Ledger:
    """How many bytes a home has given away, now and at most."""

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.peak_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Note an allocation; a negative number gives back."""
        self.allocated_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)


class MemoryPart:
    """Rows in the memory of a device; `tensor` has them in place."""

    def __init__(self, tensor: torch.Tensor, ledger: Ledger, *, pin: bool = False) -> None:
        self.tensor = tensor
        self._ledger = ledger
        self._is_pinned = False
        ledger.take(tensor.nbytes)
        if pin:
            self._is_pinned = _page_lock(tensor)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.tensor)

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Copy `rows` into the memory; theirs may be several dimensions where it has one."""
        target = self.tensor[start : start + len(rows)]
        target.view(rows.shape).copy_(rows, non_blocking=True)

    def read(self, start: int, out: torch.Tensor) -> None:
        """Copy rows out of the memory."""
        out.copy_(self.tensor[start : start + len(out)], non_blocking=True)

    def close(self) -> None:
        """Let go of the memory."""
        self._ledger.take(-self.tensor.nbytes)
        self._unlock()
        self.tensor = self.tensor[:0].clone()

    def _unlock(self) -> None:
        if self._is_pinned:
            self._is_pinned = False
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())

    def __del__(self) -> None:
        self.close()


def _page_lock(tensor: torch.Tensor) -> bool:
    """Lock host memory to its place, for CUDA to copy faster; whether there was need to.

    Torch's own pinned memory is rounded up to a power of two, and not given back.
    """
    if tensor.device.type != "cpu" or not tensor.nbytes or not torch.cuda.is_available():
        return False
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(error) != 0:
        raise RunError(f"{tensor.nbytes} bytes of host memory cannot be page-locked: {error}")
    return True


class DiskPart:
    """Rows in a file, from the byte `offset` on. The file belongs to its TorchDisk."""

    def __init__(
        self,
        disk: TorchDisk,
        file: OffloadFile,
        offset: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self._disk = disk
        self._file = file
        self._is_open = True
        self._offset = offset
        self._shape = tuple(shape)
        self._dtype = dtype
        self._row_bytes = prod(self._shape[1:]) * dtype.itemsize

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self._shape[0]

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Write `rows` to the file. Raises RunError when the disk refuses."""
        data = _bytes_of(rows.to("cpu", self._dtype).contiguous())
        try:
            self._file.write(self._offset + start * self._row_bytes, data)
        except OSError as error:
            raise RunError(f"cannot write to the offload folder: {error.strerror}") from error

    def read(self, start: int, out: torch.Tensor) -> None:
        """Read rows from the file. Raises RunError when the disk refuses.

        What lies at a multiple of BLOCK_BYTES in memory, as `aligned_empty` gives it, is read
        without a copy.
        """
        # A GPU gets them through host memory, which torch keeps page-locked for the next time.
        is_on_cpu = out.device.type == "cpu"
        target = out if is_on_cpu else torch.empty_like(out, device="cpu", pin_memory=True)
        try:
            self._file.read(self._offset + start * self._row_bytes, _bytes_of(target))
        except OSError as error:
            raise RunError(f"cannot read from the offload folder: {error.strerror}") from error
        if target is not out:
            out.copy_(target)

    def close(self) -> None:
        """Note that nobody needs it; the space itself is given back with the whole file."""
        if self._is_open:
            self._is_open = False
            self._disk.give_back(self._shape[0] * self._row_bytes)


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    """The memory of a contiguous CPU tensor."""
    assert tensor.is_contiguous(), "a copy would be filled, not the tensor"
    data: Bytes = tensor.flatten().view(torch.uint8).numpy()
    return data


def aligned_empty(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory with anything in it, uint8, at a multiple of BLOCK_BYTES: files are read into it.

    Large memory is made of huge pages where the system has them: a disk gets few large orders
    instead of many, as pages of 4 KiB are seldom neighbours.
    """
    if device.type != "cpu":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if num_bytes < _HUGE_PAGE_BYTES:
        memory, alignment = torch.empty(num_bytes + BLOCK_BYTES, dtype=torch.uint8), BLOCK_BYTES
    else:
        memory, alignment = _huge_pages(num_bytes + _HUGE_PAGE_BYTES), _HUGE_PAGE_BYTES
    start = -memory.data_ptr() % alignment
    return memory[start : start + num_bytes]


def _huge_pages(num_bytes: int) -> torch.Tensor:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class TorchDevice:
    """The memory of a device: 'cuda:0', say, or 'cpu'."""

    def __init__(self, name: str | torch.device) -> None:
        self.device = torch.device(name)
        self.ledger = Ledger()

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, *, pin: bool = False
    ) -> MemoryPart:
        """Rows of any content. `pin` locks host memory to its place, for CUDA to copy faster."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return MemoryPart(tensor, self.ledger, pin=pin)


class TorchDisk:
    """A file in a folder, which is made if it is missing.

    The file has no name: it is gone when the process is, however that ends. What `allocate` gives
    lies in it, and is given back with it by `close`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self.ledger = Ledger()
        self._file: OffloadFile | None = None
        self._access: Access | None = None
        self._end = self._num_bytes = 0

    def branch(self) -> TorchDisk:
        """Another file in the same folder; what it takes counts here, too."""
        disk = TorchDisk(self.folder)
        disk.ledger = self.ledger
        return disk

    def check(self) -> None:
        """Find out whether a file can be made. Raises ConfigError naming --offload-dir."""
        self._new_file().close()

    @property
    def access(self) -> Access:
        """How files in the folder are read: 'direct', past the system's cache; else 'page cache'.

        'memory' is a folder without a disk. Found out with a file of its own, once; raises as
        `allocate` does.
        """
        if self._access is None:
            file = self._new_file()
            try:
                self._reserve(file, 0, BLOCK_BYTES)
                self._access = file.access
            finally:
                file.close()
        return self._access

    def allocate(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        pin: bool = False,  # noqa: ARG002
    ) -> DiskPart:
        """Rows of zeros. The disk reserves the space now; raises RunError if it cannot."""
        if self._file is None:
            self._file = self._new_file()
        offset = -(-self._end // BLOCK_BYTES) * BLOCK_BYTES
        num_bytes = prod(shape) * dtype.itemsize
        self._reserve(self._file, offset, num_bytes)
        self._end = offset + num_bytes
        self._num_bytes += num_bytes
        self.ledger.take(num_bytes)
        return DiskPart(self, self._file, offset, shape, dtype)

    def _reserve(self, file: OffloadFile, offset: int, num_bytes: int) -> None:
        try:
            file.reserve(offset, num_bytes)
        except OSError as error:
            raise RunError(
                f"--offload-dir: {self.folder} has no room for {num_bytes} bytes: {error.strerror}"
            ) from error

    def give_back(self, num_bytes: int) -> None:
        """Note that so much is not needed any more. After `close` nothing is left to be noted."""
        if self._file is not None:
            self._num_bytes -= num_bytes
            self.ledger.take(-num_bytes)

    def _new_file(self) -> OffloadFile:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return OffloadFile(self.folder)
        except OSError as error:
            raise ConfigError(
                "--offload-dir", f"cannot write to {self.folder}: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        """Let go of the file, and so of its space. Its parts cannot be used any more."""
        if self._file is not None:
            self.ledger.take(-self._num_bytes)
            file, self._file, self._end, self._num_bytes = self._file, None, 0, 0
            file.close()

    def __del__(self) -> None:
        self.close()


@dataclass
class Parts:
    """A tensor's rows at the homes that have any, in the order gpu, cpu, disk."""

    gpu: MemoryPart | None = None
    cpu: MemoryPart | None = None
    disk: DiskPart | None = None

    @property
    def homes(self) -> tuple[Part | None, Part | None, Part | None]:
        """The parts of gpu, cpu and disk."""
        return self.gpu, self.cpu, self.disk

    def close(self) -> None:
        """Give all space back."""
        for part in self.homes:
            if part is not None:
                part.close()


Shape = Sequence[int]


class TorchMixedDevice:
    """Three homes that share a tensor."""

    def __init__(self, homes: tuple[TorchDevice, TorchDevice, TorchDisk]) -> None:
        self._gpu, self._cpu, self._disk = homes

    def allocate(
        self, shapes: tuple[Shape, Shape, Shape], dtype: torch.dtype, *, pin: bool = False
    ) -> Parts:
        """Rows at gpu, cpu and disk; a home with an empty shape gets no part."""
        gpu, cpu, disk = shapes
        return Parts(
            gpu=self._gpu.allocate(gpu, dtype) if prod(gpu) else None,
            cpu=self._cpu.allocate(cpu, dtype, pin=pin) if prod(cpu) else None,
            disk=self._disk.allocate(disk, dtype) if prod(disk) else None,
        )


@dataclass
class ExecutionEnv:
    """The homes of a run. Without CUDA, the 'gpu' is the CPU, and all else stays as it is."""

    gpu: TorchDevice
    cpu: TorchDevice
    disk: TorchDisk
    mixed: TorchMixedDevice

    @classmethod
    def create(cls, offload_dir: str | os.PathLike[str], *, local_rank: int = 0) -> ExecutionEnv:
        """The homes of this machine; `local_rank` chooses among several GPUs."""
        has_gpu = torch.cuda.is_available()
        name = f"cuda:{local_rank % torch.cuda.device_count()}" if has_gpu else "cpu"
        gpu, cpu, disk = TorchDevice(name), TorchDevice("cpu"), TorchDisk(offload_dir)
        return cls(gpu=gpu, cpu=cpu, disk=disk, mixed=TorchMixedDevice((gpu, cpu, disk)))

    def branch(self) -> ExecutionEnv:
        """The same homes, but for a file of its own on disk."""
        disk = self.disk.branch()
        mixed = TorchMixedDevice((self.gpu, self.cpu, disk))
        return ExecutionEnv(gpu=self.gpu, cpu=self.cpu, disk=disk, mixed=mixed)

    @property
    def has_gpu(self) -> bool:
        """Whether the 'gpu' is one."""
        return bool(self.gpu.device.type == "cuda")
