"""What a stage spent its time with."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from flexbench.core.timeline import What
from flexbench.dist.lanes import synchronize
from flexbench.dist.schedule import Step
from flexbench.dist.timeline import Timeline


@dataclass(kw_only=True)
class StageTimes:
    """The times of one stage for one call of `generate`, in seconds.

    `busy` is what loads and stores took, most of it while computing; `waited` is how long the
    computing stood still for them. Without overlap that is all of the time.
    """

    started_at: float = 0.0
    """On time.perf_counter."""
    wall_s: float = 0.0
    prefill_compute_s: float = 0.0
    decode_compute_s: float = 0.0
    send_s: float = 0.0
    receive_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    waited_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    layer_s: dict[tuple[bool, int], float] = field(default_factory=lambda: defaultdict(float))
    """Time of all that was done for each layer, by (whether it is the prefill, layer)."""

    @property
    def compute_s(self) -> float:
        """How long was computed, prefill and decoding together."""
        return self.prefill_compute_s + self.decode_compute_s

    @property
    def stalled_s(self) -> float:
        """How long computing stood still for loads and stores."""
        return sum(self.waited_s.values())

    def add_to_layer(self, step: Step, seconds: float) -> None:
        """Note the time of something that was done for a step's layer."""
        self.layer_s[step.unit.token == 0, step.layer] += seconds

    def give_to_layer(self, layer: int, step: Step, seconds: float) -> None:
        """Note that of the time of a step's layer, this was for another one of its span."""
        is_prefill = step.unit.token == 0
        self.layer_s[is_prefill, layer] += seconds
        self.layer_s[is_prefill, step.layer] -= seconds

    def layer_seconds(self, *, is_prefill: bool) -> dict[int, float]:
        """Whole time of each executed layer, in the prefill or in decoding."""
        return {
            layer: seconds
            for (of_prefill, layer), seconds in self.layer_s.items()
            if of_prefill is is_prefill
        }

    token_ends: list[float] = field(default_factory=list)
    """When each token was there for all prompts of a round, from the start."""
    timeline: Timeline = field(default_factory=Timeline)

    def add_wait(self, name: str, begun_at: float) -> None:
        """Note that computing stood still until now for a load or a store."""
        ended_at = time.perf_counter()
        self.waited_s[name] += ended_at - begun_at
        self.timeline.add(What.LOADING, begun_at, ended_at)


class ComputeClock:
    """Times computing, with events where it is asynchronous, so that it stays so."""

    def __init__(self, device: torch.device, times: StageTimes) -> None:
        self._device = device
        self._times = times
        self._events: list[tuple[bool, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, *, is_prefill: bool) -> Iterator[None]:
        """Time what is done in this block."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._events.append((is_prefill, begin, end))
            return
        started_at = time.perf_counter()
        yield
        self._add(time.perf_counter() - started_at, is_prefill=is_prefill)

    def harvest(self) -> None:
        """Wait for all blocks until now, add them to the stage's times, and let go of events."""
        synchronize(self._device)
        for is_prefill, begin, end in self._events:
            self._add(begin.elapsed_time(end) / 1000, is_prefill=is_prefill)
        self._events.clear()

    def _add(self, seconds: float, *, is_prefill: bool) -> None:
        if is_prefill:
            self._times.prefill_compute_s += seconds
        else:
            self._times.decode_compute_s += seconds
