"""Measures the ceilings of this machine.

Every ceiling is the best of several short tries, with as many threads as the rank computes with.
Other programs can only make a try slower, so the best is closest to what the machine can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from flexbench.dist.homes import ExecutionEnv, TorchDisk, aligned_empty
from flexbench.dist.kernels.linear import PackedMap, can_be_packed
from flexbench.dist.lanes import synchronize
from flexbench.dist.roofline.ceilings import Ceilings

NUM_PARTS = 4
"""How often `measure_ceilings` calls `on_part`: memory, products, copies, disk."""

_MIB = 2**20
# Far beyond the caches that a rank's threads share.
_ARRAY_BYTES, _GPU_ARRAY_BYTES = 256 * _MIB, 1024 * _MIB
_COPY_BYTES = 128 * _MIB
_DISK_BYTES = 128 * _MIB
# Both sides of square matrices whose product is bound by computing.
_CPU_WIDTH, _GPU_WIDTH = 2048, 8192
_LEAST_TRIES, _MOST_TRIES = 3, 30
_BUDGET_S = 0.25  # of the tries of one ceiling, once there are enough of them


def measure_ceilings(
    env: ExecutionEnv,
    dtype: torch.dtype,
    *,
    with_disk: bool,
    on_part: Callable[[], None] = lambda: None,
) -> Ceilings:
    """Measure this machine for a few seconds with torch's current number of threads.

    `dtype` is that of the matrix product. Takes up to 256 MiB of memory, of a GPU 1 GiB, and with
    `with_disk` 128 MiB in the offload folder; all is given back. `on_part` is called NUM_PARTS
    times on the way. Raises RunError when the disk refuses.
    """
    device = env.gpu.device
    with torch.inference_mode():
        memory = _memory_bandwidth(device)
        host_memory = _memory_bandwidth(env.cpu.device) if env.has_gpu else memory
        on_part()
        matmul = _matmul_speed(device, dtype)
        on_part()
        to_device, to_host = _copy_bandwidths(env)
        on_part()
        if env.has_gpu:
            torch.cuda.empty_cache()
        disk = _disk_bandwidths(env) if with_disk else (None, None)
        on_part()
    return Ceilings(
        num_threads=torch.get_num_threads(),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        memory_bytes_per_s=memory,
        host_memory_bytes_per_s=host_memory,
        matmul_flops_per_s=matmul,
        host_to_device_bytes_per_s=to_device,
        device_to_host_bytes_per_s=to_host,
        disk_read_bytes_per_s=disk[0],
        disk_write_bytes_per_s=disk[1],
    )


def _memory_bandwidth(device: torch.device) -> float:
    """Bytes/s of reading: the better of two reductions, which differ in how they use the cores."""
    num_bytes = _GPU_ARRAY_BYTES if device.type == "cuda" else _ARRAY_BYTES
    array = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    floats = array.view(torch.float32)
    fastest = min(_best_seconds(work, device) for work in (array.sum, floats.amax))
    return float(array.nbytes) / fastest


def _matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations/s, two a multiplication with its addition."""
    width = _GPU_WIDTH if device.type == "cuda" else _CPU_WIDTH
    x, weight = (torch.ones((width, width), device=device).to(dtype) for _ in range(2))
    return 2 * width**3 / min(_best_seconds(work, device) for work in _products(x, weight))


def _products(x: torch.Tensor, weight: torch.Tensor) -> Iterator[Callable[[], object]]:
    """The ways that the engine may have to compute x W^T with weights that stay where they are."""
    yield lambda: functional.linear(x, weight)
    if can_be_packed(weight):
        packed = PackedMap(weight)
        yield lambda: packed.apply(x)


def _copy_bandwidths(env: ExecutionEnv) -> tuple[float, float]:
    """Bytes copied/s to the device and back. With CUDA the host's memory is page-locked."""
    num_bytes = _COPY_BYTES
    on_host = env.cpu.allocate((num_bytes,), torch.uint8, pin=True)
    on_device = torch.ones(num_bytes, dtype=torch.uint8, device=env.gpu.device)
    try:
        on_host.tensor.fill_(1)  # or its pages would not be there
        device = env.gpu.device
        to_device = _best_seconds(lambda: on_host.read(0, on_device), device)
        if not env.has_gpu:
            return num_bytes / to_device, num_bytes / to_device
        to_host = _best_seconds(lambda: on_host.write(0, on_device), device)
        return num_bytes / to_device, num_bytes / to_host
    finally:
        on_host.close()


def _disk_bandwidths(env: ExecutionEnv) -> tuple[float, float]:
    """Bytes/s of reading and writing the offload folder, with the engine's own reads and writes."""
    disk = TorchDisk(env.disk.folder)  # a branch would count among what the run had at most
    host = torch.device("cpu")
    try:
        part = disk.allocate((_DISK_BYTES,), torch.uint8)
        data = aligned_empty(_DISK_BYTES, host)
        # Not all the same: some disks store nothing for what is only zeros.
        data.view(torch.int64).random_()
        write_s = _best_seconds(lambda: part.write(0, data), host)
        read_s = _best_seconds(lambda: part.read(0, data), host)
        part.close()
        return _DISK_BYTES / read_s, _DISK_BYTES / write_s
    finally:
        disk.close()


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of several tries, after one that nobody counts."""
    work()
    synchronize(device)
    fastest = float("inf")
    ends_at = time.perf_counter() + _BUDGET_S
    for number in range(1, _MOST_TRIES + 1):
        started_at = time.perf_counter()
        work()
        synchronize(device)
        ended_at = time.perf_counter()
        fastest = min(fastest, ended_at - started_at)
        if number >= _LEAST_TRIES and ended_at >= ends_at:
            break
    return fastest
