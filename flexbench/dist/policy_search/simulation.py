"""Plays the engine's schedule through with durations, to learn how long it takes.

There is one computing thread and a lane each for weights, cache loads, cache stores and hidden
states, as in `flexbench.dist.transfers`; what a lane does begins when what it was given before is
done. Loads from the same home share its bandwidth, and where computing and loading disturb each
other, both go on at the speeds that were measured.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from flexbench.dist.policy_search.constants import HomeTimes
from flexbench.dist.policy_search.durations import Durations, Transfer
from flexbench.dist.schedule import (
    Op,
    Pipeline,
    Step,
    StepAction,
    Workload,
    normal,
    overlap_multi_batch,
    overlap_one_batch,
)
from flexbench.dist.transfers import MAX_PENDING_STORES

COMPUTING = "computing"
_NOTHING = 1e-12
# The prefill, and decoding three times: the first step still waits for what the prefill left, and
# the last one loads nothing for a next one.
_NUM_TOKENS = 4
_MIDDLE = -2


@dataclass(frozen=True, kw_only=True)
class UnitTimes:
    """What a stage takes for all batches of one block, and what for."""

    prefill_s: float
    decode_s: float
    """For one position in the middle of decoding."""
    prefill_parts: dict[str, float]
    """Computing, and by lane and home how long it stood still for that."""
    decode_parts: dict[str, float]


def simulate(durations: Durations, *, decode_past: float) -> UnitTimes:
    """One block's prefill and one decoding step, with `decode_past` positions behind it."""
    workload = Workload(
        num_rounds=1,
        num_tokens=_NUM_TOKENS,
        num_iterations=1,
        num_layers=len(durations.layers),
        num_batches=durations.policy.num_gpu_batches,
    )
    return _Player(durations, decode_past, workload).play()


@dataclass(eq=False)
class _Task:
    remaining_s: float
    home: str
    after: _Task | None = None
    is_done: bool = False


@dataclass
class _Player:
    durations: Durations
    decode_past: float
    workload: Workload
    now: float = 0.0
    lanes: dict[str, deque[_Task]] = field(default_factory=lambda: defaultdict(deque))
    parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        policy = self.durations.policy
        self.is_overlapped = policy.overlap
        self.context = self.decode_past - self.durations.constants.short_context
        self.weights: dict[int, _Task] = {}
        self.cache_loads: dict[int, _Task] = {}
        self.cache_stores: dict[tuple[int, int], _Task] = {}
        self.pending: deque[_Task] = deque()
        self.hidden_loads: dict[int, _Task] = {}
        self.hidden_stores: dict[int, _Task] = {}
        durations = self.durations
        self.cache_load = durations.cache_load(self.decode_past)
        self.cache_store = {p: durations.cache_store(is_prefill=p) for p in (True, False)}
        # Of all positions of a prompt, or of one.
        self.hidden = {p: durations.hidden(is_prefill=p) for p in (True, False)}

    def play(self) -> UnitTimes:
        if not self.is_overlapped:
            loop = normal
        elif self.workload.num_batches == 1:
            loop = overlap_one_batch
        else:
            loop = overlap_multi_batch
        do = {
            Op.LOAD_WEIGHT: self.load_weight,
            Op.LOAD_CACHE: self.load_cache,
            Op.LOAD_HIDDEN: self.load_hidden,
            Op.COMPUTE: self.compute,
            Op.STORE_CACHE: self.store_cache,
            Op.STORE_HIDDEN: self.store_hidden,
        }
        ends: list[float] = []
        parts: list[dict[str, float]] = []
        for action in loop(self.workload, Pipeline()):
            if isinstance(action, StepAction):
                do[action.op](action.step)
            else:  # before the first unit, and after each
                ends.append(self.now)
                parts.append(dict(self.parts))
                self.parts.clear()
        return UnitTimes(
            prefill_s=ends[1],
            decode_s=ends[_MIDDLE] - ends[_MIDDLE - 1],
            prefill_parts=parts[1],
            decode_parts=parts[_MIDDLE],
        )

    # --- the engine's actions ---

    def load_weight(self, step: Step) -> None:
        work = self.durations.layers[step.layer]
        self.weights[step.visit] = self.submit("weights", work.weight)

    def load_cache(self, step: Step) -> None:
        if step.unit.token > 0 and self.durations.layers[step.layer].has_cache:
            stored = self.cache_stores.get((step.layer, step.batch))
            self.cache_loads[step.number] = self.submit("cache", self.cache_load, after=stored)

    def load_hidden(self, step: Step) -> None:
        if step.layer > 0:
            stored = self.hidden_stores.get(step.batch)
            is_whole = step.unit.token == 0 and step.layer <= self.durations.num_whole_stored
            self.hidden_loads[step.number] = self.submit(
                "activations", self.hidden[is_whole], after=stored
            )

    def compute(self, step: Step) -> None:
        for name, tasks, number in (
            ("weights", self.weights, step.visit),
            ("cache", self.cache_loads, step.number),
            ("activations", self.hidden_loads, step.number),
        ):
            task = tasks.pop(number, None)
            if task is not None:
                self.wait(name, task)
        context = None if step.unit.token == 0 else self.context
        seconds = self.durations.compute(self.durations.layers[step.layer], context)
        began_at = self.now
        self.advance_computing(seconds)
        self.parts[COMPUTING] += self.now - began_at

    def store_cache(self, step: Step) -> None:
        is_last = step.unit.token == self.workload.num_tokens - 1
        if not self.durations.layers[step.layer].has_cache or is_last:
            return
        task = self.submit("cache stores", self.cache_store[step.unit.token == 0])
        self.cache_stores[step.layer, step.batch] = task
        self.pending.append(task)
        if len(self.pending) > MAX_PENDING_STORES:
            self.wait("cache", self.pending.popleft())

    def store_hidden(self, step: Step) -> None:
        if step.layer < self.workload.num_layers - 1:
            is_whole = step.unit.token == 0 and step.layer < self.durations.num_whole_stored
            self.hidden_stores[step.batch] = self.submit("activations", self.hidden[is_whole])

    # --- time ---

    def submit(self, lane: str, transfer: Transfer, *, after: _Task | None = None) -> _Task:
        task = _Task(transfer.total, transfer.link, after)
        if transfer.total <= _NOTHING:
            task.is_done = after is None or after.is_done
        if not task.is_done:
            self.lanes[lane].append(task)
            self.settle()
        if not self.is_overlapped:
            self.wait(lane, task)
        return task

    def wait(self, name: str, task: _Task) -> None:
        began_at = self.now
        home = task.home
        while not task.is_done:
            self.advance(None)
        self.parts[f"{name}: {home}"] += self.now - began_at

    def advance_computing(self, seconds: float) -> None:
        remaining = seconds
        while remaining > _NOTHING:
            remaining = self.advance(remaining)

    def advance(self, computing_s: float | None) -> float:
        """Go on to the next end of anything; returns what is left of the computing."""
        active = self.active()
        sharing: dict[str, int] = defaultdict(int)
        for task in active:
            sharing[task.home] += 1
        homes = self.durations.constants.homes
        disturbing = [homes[home] for home in sharing if home in homes]
        speed = min((times.compute_speed for times in disturbing), default=1.0)
        speeds = [self.load_speed(task, sharing, computing_s, homes) for task in active]
        spans = [task.remaining_s / rate for task, rate in zip(active, speeds, strict=True)]
        if computing_s is not None:
            spans.append(computing_s / speed)
        if not spans:
            assert not any(self.lanes.values()), "somebody waits for what nobody does"
            return 0.0
        span = min(spans)
        self.now += span
        for task, rate in zip(active, speeds, strict=True):
            task.remaining_s -= span * rate
        self.settle()
        return 0.0 if computing_s is None else computing_s - span * speed

    def load_speed(
        self,
        task: _Task,
        sharing: dict[str, int],
        computing_s: float | None,
        homes: dict[str, HomeTimes],
    ) -> float:
        times = homes.get(task.home)
        disturbed = times.load_speed if times is not None and computing_s is not None else 1.0
        return disturbed / sharing[task.home]

    def active(self) -> list[_Task]:
        """What each lane does now."""
        return [lane[0] for lane in self.lanes.values() if lane and self._may_begin(lane[0])]

    def settle(self) -> None:
        """End what has nothing left to do, and what that was all that others waited for."""
        is_changed = True
        while is_changed:
            is_changed = False
            for lane in self.lanes.values():
                while lane and lane[0].remaining_s <= _NOTHING and self._may_begin(lane[0]):
                    lane.popleft().is_done = True
                    is_changed = True

    def _may_begin(self, task: _Task) -> bool:
        return task.after is None or task.after.is_done
