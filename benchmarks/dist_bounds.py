"""The roofline of a point, as `flexbench dist --roofline` has it, by itself.

Ceilings are measured in this process while those that are compared are frozen, again and again:
others on the host lower them for minutes, and what was measured meanwhile with them. So what
something took stands beside the better of the ceilings right before and right after it. What a
point takes at least is counted as `--roofline` counts it, for a model that lies in memory whole.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks.dist_turns import Point
from flexbench.dist.config import DistConfig
from flexbench.dist.homes import ExecutionEnv, TorchDevice, TorchDisk, TorchMixedDevice
from flexbench.dist.plan import make_plan
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.counting import count_stage
from flexbench.dist.roofline.floors import compute_floor
from flexbench.dist.roofline.measuring import measure_ceilings


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of a point, in seconds."""

    point: Point
    first_s: float
    """Of the prompts, with the first token of each."""
    decode_s: float
    """Of all later tokens."""

    @property
    def total_s(self) -> float:
        """Of the whole call."""
        return self.first_s + self.decode_s

    @property
    def step_s(self) -> float:
        """Of each token after the first."""
        return self.decode_s / (self.point.gen_len - 1)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Ceilings, and when they were measured, in seconds since the epoch."""

    began_at: float
    ended_at: float
    ceilings: Ceilings


class Bounds:
    """The ceilings of this machine's CPU in one precision, as they were from time to time."""

    def __init__(self, dtype: str, num_threads: int) -> None:
        self._dtype, self._num_threads = dtype, num_threads
        self.samples: list[Sample] = []
        """In the order of their times."""

    def measure(self) -> None:
        """Takes about a second and 256 MiB; all threads compute meanwhile."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        began_at = time.time()
        try:
            found = _measure(getattr(torch, self._dtype))
        finally:
            torch.set_num_threads(before)
        self.samples.append(Sample(began_at=began_at, ended_at=time.time(), ceilings=found))

    @property
    def last_began_at(self) -> float:
        """When they were last measured; -inf: never."""
        return self.samples[-1].began_at if self.samples else -math.inf

    def around(self, began_at: float, ended_at: float) -> Ceilings:
        """The better of the last ones before and the first ones after; both were measured."""
        before = [each for each in self.samples if each.ended_at <= began_at][-1]
        after = next(each for each in self.samples if each.began_at >= ended_at)
        return before.ceilings.better_of(after.ceilings)


def _measure(dtype: torch.dtype) -> Ceilings:
    """Of the CPU, also where there is a GPU."""
    cpu = TorchDevice("cpu")
    with tempfile.TemporaryDirectory(prefix="fb-") as folder:
        disk = TorchDisk(folder)
        try:
            env = ExecutionEnv(
                gpu=cpu, cpu=cpu, disk=disk, mixed=TorchMixedDevice((cpu, cpu, disk))
            )
            return measure_ceilings(env, dtype, with_disk=False)
        finally:
            disk.close()


def floor_of(point: Point, model: str, dtype: str, ceilings: Ceilings) -> Floor:
    """The floor of a point with a published model, or one in a folder, on one machine."""
    config = DistConfig(
        model=model,
        dtype=dtype,
        prompt_len=point.prompt_len,
        gen_len=point.gen_len,
        gpu_batch_size=point.batch_size,
    )
    work = count_stage(make_plan(config, num_stages=1, has_gpu=False), 0)
    return Floor(
        point=point,
        first_s=compute_floor(work.prefill, ceilings).seconds,
        decode_s=compute_floor(work.decode, ceilings).seconds,
    )
