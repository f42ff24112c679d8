"""The order of everything a pipeline stage does. Pure: it computes and moves nothing.

A *unit* is one token position of one inner iteration: all prompts of `num_gpu_batches` batches pass
through the stage's layers once. Units go through all stages in the same order,

    for round: for token: for iteration

and within a unit a stage computes

    for span of layers: for batch

where a span is one layer, or several between which nothing is loaded or stored. The three loops of
FlexGen differ only in when they load and store around these steps. Stages are joined by `Exchange`
actions. The last stage's tokens of a unit are the first stage's input of the unit one token later,
`num_iterations` units on.

Why nothing deadlocks. Synchronous: a send ends when its receiver has posted the receive (a
rendezvous). Each stage posts a unit's send and the next unit's receive together, and waits for
both; every other stage can then hold two units, one received and one to be sent. The first stage
has to take results before it gives away more than that. It does so well before: with the unit n it
takes the result of unit n + 1 - S, or that of n + 1 - T, which unit n + 1 needs, if that is later.
Asynchronous: every link holds one more unit, and the first stage takes results S - 1 units later.
`tests/unit/dist/test_schedule.py` plays both through for many S and T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple


class Unit(NamedTuple):
    """One token position of one inner iteration; `number` counts them in the order of work."""

    number: int
    round: int
    token: int
    iteration: int


class Step(NamedTuple):
    """One batch in one layer of one unit, or in a span of layers, of which `layer` is the first.

    `number` counts steps, `visit` counts spans that are passed, so that buffers can take turns.
    """

    number: int
    visit: int
    unit: Unit
    layer: int
    batch: int


class Op(Enum):
    """What is done for a step."""

    LOAD_WEIGHT = "load_weight"
    LOAD_CACHE = "load_cache"
    LOAD_HIDDEN = "load_hidden"
    COMPUTE = "compute"
    STORE_CACHE = "store_cache"
    STORE_HIDDEN = "store_hidden"


class StepAction(NamedTuple):
    """Do `op` for `step`. Loads and stores are begun; `COMPUTE` waits for what it needs."""

    op: Op
    step: Step


class Exchange(NamedTuple):
    """Send the output of one unit, and receive the input of another; either may be None.

    The receive of `post` is only begun: it arrives while the stage computes.
    """

    send: Unit | None
    receive: Unit | None
    post: Unit | None = None


Action = StepAction | Exchange


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How much there is to do. One round is `num_iterations` blocks of `num_batches` batches."""

    num_rounds: int
    num_tokens: int
    num_iterations: int
    num_layers: int
    """Layers of this stage, embeddings included."""
    num_batches: int
    spans: tuple[range, ...] = ()
    """All of them in order, in ranges that are passed through at once. None: each by itself."""

    @cached_property
    def visits(self) -> tuple[range, ...]:
        """The layers that a unit's steps pass through, step by step."""
        return self.spans or tuple(range(layer, layer + 1) for layer in range(self.num_layers))

    def units(self) -> Iterator[Unit]:
        """All units in the order of work."""
        number = 0
        for block in range(self.num_rounds):
            for token in range(self.num_tokens):
                for iteration in range(self.num_iterations):
                    yield Unit(number, block, token, iteration)
                    number += 1

    def unit(self, number: int) -> Unit:
        """The unit of this number."""
        block, rest = divmod(number, self.num_tokens * self.num_iterations)
        return Unit(number, block, *divmod(rest, self.num_iterations))

    @property
    def num_units(self) -> int:
        """Units of all rounds."""
        return self.num_rounds * self.num_tokens * self.num_iterations

    def steps(self) -> Iterator[Step]:
        """All steps in the order of work."""
        number = visit = 0
        for unit in self.units():
            for span in self.visits:
                for batch in range(self.num_batches):
                    yield Step(number, visit, unit, span.start, batch)
                    number += 1
                visit += 1


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Where this stage stands, and how it talks to its neighbours."""

    rank: int = 0
    num_stages: int = 1
    is_async: bool = False

    def before(self, workload: Workload) -> Exchange:
        """What has to be received before the first unit."""
        first = workload.unit(0)
        return Exchange(None, self._input(workload, first), self._posted(workload, first))

    def after(self, workload: Workload, unit: Unit) -> Exchange:
        """What is sent and received between `unit` and the next one."""
        following = unit.number + 1
        if self.rank == 0:
            receive = self._result(workload, following)
            return Exchange(self._output(workload, unit), receive)
        if following == workload.num_units:
            return Exchange(self._output(workload, unit), None)
        after = workload.unit(following)
        return Exchange(
            self._output(workload, unit),
            self._input(workload, after),
            self._posted(workload, after),
        )

    def _output(self, workload: Workload, unit: Unit) -> Unit | None:
        if self.num_stages == 1:
            return None
        is_last = self.rank == self.num_stages - 1
        # Nobody needs the last token of a prompt as an input.
        return None if is_last and unit.token == workload.num_tokens - 1 else unit

    def _input(self, workload: Workload, unit: Unit) -> Unit | None:  # noqa: ARG002
        return unit if self.rank > 0 else None

    def _posted(self, workload: Workload, unit: Unit) -> Unit | None:
        if not self.is_async or self.rank == 0 or unit.number + 1 == workload.num_units:
            return None
        return workload.unit(unit.number + 1)

    def _result(self, workload: Workload, following: int) -> Unit | None:
        """The unit whose tokens the first stage takes before it computes unit `following`."""
        if self.num_stages == 1:
            return None
        in_flight = 2 * self.num_stages - 1 if self.is_async else self.num_stages
        number = following - min(workload.num_iterations, in_flight)
        if number < 0:
            return None
        unit = workload.unit(number)
        return None if unit.token == workload.num_tokens - 1 else unit


Loop = Callable[[Workload, Pipeline], Iterator[Action]]


def normal(workload: Workload, pipeline: Pipeline) -> Iterator[Action]:
    """Load, compute, store, one after the other: nothing overlaps. Easy to follow and to debug."""
    yield pipeline.before(workload)
    for step, following in _with_next(workload):
        if step.batch == 0:
            yield StepAction(Op.LOAD_WEIGHT, step)
        for op in Op:
            if op is not Op.LOAD_WEIGHT:
                yield StepAction(op, step)
        if _ends_unit(step, following):
            yield pipeline.after(workload, step.unit)


def overlap_one_batch(workload: Workload, pipeline: Pipeline) -> Iterator[Action]:
    """While a layer computes, the next layer's weights and cache are loaded.

    With one batch, the next layer's input is this layer's output: it cannot be loaded before.
    """
    return _overlap(workload, pipeline, load_hidden_ahead=False)


def overlap_multi_batch(workload: Workload, pipeline: Pipeline) -> Iterator[Action]:
    """While a batch computes, the next batch's cache and input, and the next weights are loaded."""
    return _overlap(workload, pipeline, load_hidden_ahead=workload.num_batches > 1)


def _overlap(
    workload: Workload, pipeline: Pipeline, *, load_hidden_ahead: bool
) -> Iterator[Action]:
    # With a single step a token, the next step's cache is what this step is about to store.
    cache_ahead = workload.num_iterations * len(workload.visits) * workload.num_batches > 1
    yield pipeline.before(workload)
    is_loaded = False  # the input of the coming step
    for step, following in _with_next(workload):
        if step.number == 0:
            yield StepAction(Op.LOAD_WEIGHT, step)
            yield StepAction(Op.LOAD_CACHE, step)
        if not is_loaded:
            yield StepAction(Op.LOAD_HIDDEN, step)
        ends_unit = _ends_unit(step, following)
        is_loaded = load_hidden_ahead and following is not None and not ends_unit
        if following is not None:
            if step.batch == 0:
                yield from _load_next_weight(workload, step)
            if cache_ahead:
                yield StepAction(Op.LOAD_CACHE, following)
            if is_loaded:
                yield StepAction(Op.LOAD_HIDDEN, following)
        yield StepAction(Op.COMPUTE, step)
        yield StepAction(Op.STORE_CACHE, step)
        yield StepAction(Op.STORE_HIDDEN, step)
        if ends_unit:
            yield pipeline.after(workload, step.unit)
        if following is not None and not cache_ahead:
            yield StepAction(Op.LOAD_CACHE, following)


def _load_next_weight(workload: Workload, step: Step) -> Iterator[Action]:
    visit = step.visit + 1
    unit_number, index = divmod(visit, len(workload.visits))
    if unit_number < workload.num_units:
        number = visit * workload.num_batches
        layer = workload.visits[index].start
        following = Step(number, visit, workload.unit(unit_number), layer, 0)
        yield StepAction(Op.LOAD_WEIGHT, following)


def _with_next(workload: Workload) -> Iterator[tuple[Step, Step | None]]:
    step = None
    for step, following in pairwise(workload.steps()):
        yield step, following
        step = following
    yield (step or next(workload.steps())), None


def _ends_unit(step: Step, following: Step | None) -> bool:
    return following is None or following.unit != step.unit


def idle_fraction(
    workload: Workload, num_stages: int, *, prefill_s: float = 1.0, decode_s: float = 1.0
) -> float:
    """The share of time in which stages wait for each other, if all are equally fast.

    A unit takes every stage `prefill_s` when it is a prompt, `decode_s` when it is one token.
    A stage begins a unit when it has ended the one before and the stage before has ended this one;
    the first stage, moreover, when the last has the tokens that it needs.
    """
    ends = [[0.0] * workload.num_units for _ in range(num_stages)]
    work = 0.0
    for unit in workload.units():
        n = unit.number
        duration = prefill_s if unit.token == 0 else decode_s
        work += duration
        for stage in range(num_stages):
            ready = [ends[stage][n - 1]] if n else [0.0]
            if stage > 0:
                ready.append(ends[stage - 1][n])
            elif unit.token > 0:
                ready.append(ends[-1][n - workload.num_iterations])
            ends[stage][n] = max(ready) + duration
    return 1 - work / ends[-1][-1]
