"""The order of work: nothing is used before it is there, and no stage waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.dist.schedule import (
    Action,
    Exchange,
    Loop,
    Op,
    Pipeline,
    Step,
    StepAction,
    Unit,
    Workload,
    idle_fraction,
    normal,
    overlap_multi_batch,
    overlap_one_batch,
)

LOOPS: dict[str, Loop] = {
    "normal": normal,
    "overlap_one_batch": overlap_one_batch,
    "overlap_multi_batch": overlap_multi_batch,
}
LOADS = (Op.LOAD_WEIGHT, Op.LOAD_CACHE, Op.LOAD_HIDDEN)

with_every_loop = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
# Every product of one and more than one, and 3 where 2 could be mistaken for a buffer's turn.
SHAPES = [
    *product((1, 2), (1, 2, 3), (1, 2), (1, 2, 3), (1, 2, 3)),
    (3, 4, 3, 5, 1),
    (2, 4, 5, 4, 4),
]


def workload_of(
    rounds: int, tokens: int, iterations: int, layers: int = 1, batches: int = 1
) -> Workload:
    return Workload(
        num_rounds=rounds,
        num_tokens=tokens,
        num_iterations=iterations,
        num_layers=layers,
        num_batches=batches,
    )


def steps_of(actions: list[Action], op: Op) -> list[Step]:
    return [a.step for a in actions if isinstance(a, StepAction) and a.op is op]


class Place(NamedTuple):
    round: int
    token: int
    iteration: int
    layer: int
    batch: int


def place_of(step: Step) -> Place:
    return Place(step.unit.round, step.unit.token, step.unit.iteration, step.layer, step.batch)


def nested_loops(shape: tuple[int, int, int, int, int]) -> list[Place]:
    return [Place(*place) for place in product(*map(range, shape))]


# --- the order of computing ---


@with_every_loop
@pytest.mark.parametrize("shape", SHAPES)
def test_computes_in_the_order_of_nested_loops(
    loop: Loop, shape: tuple[int, int, int, int, int]
) -> None:
    actions = list(loop(workload_of(*shape), Pipeline()))

    computed = steps_of(actions, Op.COMPUTE)
    assert [place_of(step) for step in computed] == nested_loops(shape)
    assert [step.number for step in computed] == list(range(len(computed)))


@pytest.mark.parametrize("shape", SHAPES)
def test_visits_count_the_layers_that_are_passed(shape: tuple[int, int, int, int, int]) -> None:
    seen: dict[tuple[Unit, int], int] = {}
    for step in workload_of(*shape).steps():
        seen.setdefault((step.unit, step.layer), step.visit)
        assert seen[step.unit, step.layer] == step.visit

    assert list(seen.values()) == list(range(len(seen)))


@settings(deadline=None)
@given(*(st.integers(1, 4) for _ in range(3)))
def test_a_unit_is_found_by_its_number(rounds: int, tokens: int, iterations: int) -> None:
    workload = workload_of(rounds, tokens, iterations)
    units = list(workload.units())

    assert [tuple(unit)[1:] for unit in units] == [
        *product(range(rounds), range(tokens), range(iterations))
    ]
    assert [workload.unit(number) for number in range(workload.num_units)] == units


# --- data hazards ---


class Data:
    """Follows the actions of one stage, and objects to whatever uses something that is not there."""

    def __init__(self, shape: tuple[int, int, int, int, int], num_buffers: int) -> None:
        self.batches = shape[4]
        self.num_buffers = num_buffers
        self.loaded: set[tuple[Op, Place]] = set()
        self.unused: set[tuple[Op, Place]] = set()
        self.buffers: dict[tuple[Op, int], Place] = {}
        """What is in the buffers, from its load to the last compute that needs it."""
        self.computed: set[Place] = set()
        self.stored: set[tuple[Op, Place]] = set()

    def follow(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, StepAction):
                if action.op in LOADS:
                    self.load(action.op, action.step)
                elif action.op is Op.COMPUTE:
                    self.compute(action.step)
                else:
                    self.store(action.op, action.step)
        assert self.unused == set(), "loaded for nothing"

    def load(self, op: Op, step: Step) -> None:
        place = place_of(step)
        assert (op, place) not in self.loaded, f"{op} twice for {place}"
        assert place not in self.computed, f"{op} too late for {place}"
        if op is Op.LOAD_WEIGHT:
            assert place.batch == 0, "weights are loaded once for all batches"
        elif op is Op.LOAD_CACHE and place.token > 0:
            before = place._replace(token=place.token - 1)
            assert (Op.STORE_CACHE, before) in self.stored, f"nothing to load for {place}"
        elif op is Op.LOAD_HIDDEN and place.layer > 0:
            before = place._replace(layer=place.layer - 1)
            assert (Op.STORE_HIDDEN, before) in self.stored, f"nothing to load for {place}"
        turn = step.visit if op is Op.LOAD_WEIGHT else step.number
        buffer = (op, turn % self.num_buffers)
        assert buffer not in self.buffers, f"{op} for {place} overwrites {self.buffers[buffer]}"
        self.buffers[buffer] = place
        self.loaded.add((op, place))
        self.unused.add((op, place))

    def compute(self, step: Step) -> None:
        place = place_of(step)
        needed = {
            Op.LOAD_WEIGHT: place._replace(batch=0),
            Op.LOAD_CACHE: place,
            Op.LOAD_HIDDEN: place,
        }
        for op, loaded in needed.items():
            # There is no cache yet; and the first layer's input comes from elsewhere.
            is_nothing = (op is Op.LOAD_CACHE and place.token == 0) or (
                op is Op.LOAD_HIDDEN and place.layer == 0
            )
            assert is_nothing or (op, loaded) in self.loaded, f"{op} is missing for {place}"
            self.unused.discard((op, loaded))
            is_needed_on = op is Op.LOAD_WEIGHT and place.batch < self.batches - 1
            for buffer, content in list(self.buffers.items()):
                if buffer[0] is op and content == loaded and not is_needed_on:
                    del self.buffers[buffer]
        self.computed.add(place)

    def store(self, op: Op, step: Step) -> None:
        place = place_of(step)
        assert place in self.computed, f"{op} before {place} is computed"
        assert (op, place) not in self.stored, f"{op} twice for {place}"
        self.stored.add((op, place))


@with_every_loop
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_there_when_it_is_used(
    loop: Loop, shape: tuple[int, int, int, int, int]
) -> None:
    # Without overlap there is but one buffer.
    data = Data(shape, num_buffers=1 if loop is normal else 2)

    data.follow(list(loop(workload_of(*shape), Pipeline())))

    everything = nested_loops(shape)
    assert data.stored >= {(Op.STORE_HIDDEN, place) for place in everything}
    assert data.stored >= {(Op.STORE_CACHE, place) for place in everything}


@with_every_loop
@pytest.mark.parametrize("shape", SHAPES)
def test_spans_are_passed_as_layers_are(loop: Loop, shape: tuple[int, int, int, int, int]) -> None:
    """What is done for a span of layers is what would be done for one, under its first's number."""
    plain = workload_of(*shape)
    starts = [0, 1, 4, 6, 11, 12][: plain.num_layers + 1]
    spans = tuple(range(start, stop) for start, stop in pairwise(starts))
    joined = replace(plain, num_layers=starts[-1], spans=spans)

    def renamed(action: Action) -> Action:
        if isinstance(action, Exchange):
            return action
        step = action.step
        return StepAction(action.op, step._replace(layer=starts[step.layer]))

    for pipeline in (Pipeline(), Pipeline(rank=1, num_stages=3, is_async=True)):
        expected = [renamed(action) for action in loop(plain, pipeline)]
        assert list(loop(joined, pipeline)) == expected


def test_overlapping_loops_load_ahead() -> None:
    def ahead(loop: Loop, op: Op) -> int:
        """How many loads come before the compute of an earlier step."""
        computed = -1
        count = 0
        for action in loop(workload_of(2, 3, 1, 4, 2), Pipeline()):
            if isinstance(action, StepAction):
                if action.op is op:
                    count += action.step.number > computed + 1
                elif action.op is Op.COMPUTE:
                    computed = action.step.number
        return count

    assert [ahead(normal, op) for op in LOADS] == [0, 0, 0]
    # Of 24 visits and 48 steps: all but the first; none of the first input of the 6 units.
    assert [ahead(overlap_multi_batch, op) for op in LOADS] == [23, 47, 42]
    assert [ahead(overlap_one_batch, op) for op in LOADS] == [23, 47, 0]


@pytest.mark.parametrize("loop", [overlap_one_batch, overlap_multi_batch])
def test_weights_have_the_time_of_all_batches_to_come(loop: Loop) -> None:
    actions = [a for a in loop(workload_of(2, 2, 1, 3, 3), Pipeline()) if isinstance(a, StepAction)]

    loaded = 0
    for action in actions:
        if action.op is Op.LOAD_WEIGHT:
            loaded = action.step.visit
        elif action.op is Op.COMPUTE:
            assert loaded == min(action.step.visit + 1, 11)


# --- messages ---

# Stages, inner iterations, tokens, rounds, asynchronous.
PIPELINES = [
    (stages, iterations, tokens, rounds, is_async)
    for stages in range(1, 6)
    for iterations in range(1, 2 * stages + 3)
    for tokens in range(1, 5)
    for rounds in range(1, 4)
    for is_async in (False, True)
]


def stage_actions(
    loop: Loop, workload: Workload, stages: int, *, is_async: bool
) -> list[list[Action]]:
    return [
        list(loop(workload, Pipeline(rank=rank, num_stages=stages, is_async=is_async)))
        for rank in range(stages)
    ]


def exchanges(actions: list[Action]) -> list[Exchange]:
    return [action for action in actions if isinstance(action, Exchange)]


def test_all_loops_exchange_the_same() -> None:
    workload = workload_of(2, 3, 3, 2, 2)
    for rank, is_async in product(range(3), (False, True)):
        pipeline = Pipeline(rank=rank, num_stages=3, is_async=is_async)
        messages, *others = (exchanges(list(loop(workload, pipeline))) for loop in LOOPS.values())
        assert others == [messages, messages]


def test_a_single_stage_sends_nothing() -> None:
    for is_async in (False, True):
        for exchange in exchanges(
            stage_actions(normal, workload_of(2, 3, 4), 1, is_async=is_async)[0]
        ):
            assert (exchange.send, exchange.receive) == (None, None)


def test_what_is_sent_is_what_is_received() -> None:
    for stages, iterations, tokens, rounds, is_async in PIPELINES:
        workload = workload_of(rounds, tokens, iterations)
        done = [exchanges(a) for a in stage_actions(normal, workload, stages, is_async=is_async)]
        for rank in range(stages):
            sent = [e.send for e in done[rank] if e.send]
            received = [e.receive for e in done[(rank + 1) % stages] if e.receive]
            case = (stages, iterations, tokens, rounds, is_async, rank)
            assert sent == received, case
            if stages > 1:
                is_last = rank == stages - 1
                expected = [
                    u for u in workload.units() if not is_last or u.token < workload.num_tokens - 1
                ]
                assert sent == expected, case


@with_every_loop
def test_a_unit_is_received_before_it_is_computed(loop: Loop) -> None:
    for stages, iterations, tokens, rounds, is_async in PIPELINES:
        if stages == 1:
            continue
        workload = workload_of(rounds, tokens, iterations, 1, 2)
        for rank, actions in enumerate(stage_actions(loop, workload, stages, is_async=is_async)):
            case = (stages, iterations, tokens, rounds, is_async, rank)
            received: set[Unit | None] = set()
            computed: set[Unit] = set()
            for action in actions:
                if isinstance(action, Exchange):
                    received.add(action.receive)
                    assert action.send is None or action.send in computed, case
                elif action.op is Op.COMPUTE:
                    unit = action.step.unit
                    needed: Unit | None = unit
                    if rank == 0:
                        number = unit.number - iterations
                        needed = workload.unit(number) if unit.token > 0 else None
                    assert needed is None or needed in received, (case, unit)
                    if action.step.batch == 1:
                        computed.add(unit)


def test_a_receive_that_is_posted_is_the_next_one() -> None:
    for stages, iterations, tokens, rounds, is_async in PIPELINES:
        workload = workload_of(rounds, tokens, iterations)
        for actions in stage_actions(normal, workload, stages, is_async=is_async):
            posted: Unit | None = None
            for exchange in exchanges(actions):
                assert posted is None or exchange.receive == posted
                posted = exchange.post
            assert posted is None


# --- deadlocks: a simulator ---


class Do(NamedTuple):
    """What a stage does with its links; `unit` is for `begin_send` and `post`."""

    what: str
    unit: Unit | None = None


def as_operations(actions: list[Action], *, is_async: bool) -> Iterator[Do]:
    """What the transport does for the exchanges of a stage."""
    is_posted = False
    for exchange in exchanges(actions):
        if exchange.send is not None:
            yield Do("await_send")  # the one before; synchronous stages have waited for it already
            yield Do("begin_send", exchange.send)
        if exchange.receive is not None:
            if not is_posted:
                yield Do("post", exchange.receive)
            yield Do("await_receive")
            is_posted = False
        if not is_async:
            yield Do("await_send")
        if exchange.post is not None:
            yield Do("post", exchange.post)
            is_posted = True
    yield Do("await_send")


class Ring:
    """Stages whose sends are rendezvous: one is over when its receiver has posted the receive."""

    def __init__(self, programs: list[list[Do]]) -> None:
        self.programs = programs
        self.positions = [0] * len(programs)
        self.begun: list[list[Unit | None]] = [[] for _ in programs]
        """What each stage has begun to send to the next."""
        self.posted: list[list[Unit | None]] = [[] for _ in programs]
        """What each stage has begun to receive from the one before."""

    def run(self) -> list[int]:
        """The ranks that never come to their end."""
        has_advanced = True
        while has_advanced:
            has_advanced = any(self.advance(rank) for rank in range(len(self.programs)))
        return [
            rank
            for rank, program in enumerate(self.programs)
            if self.positions[rank] < len(program)
        ]

    def advance(self, rank: int) -> bool:
        """Let a stage go on until it has to wait; whether it could do anything at all."""
        start = self.positions[rank]
        program = self.programs[rank]
        while self.positions[rank] < len(program) and self.can_do(
            rank, program[self.positions[rank]]
        ):
            self.positions[rank] += 1
        return self.positions[rank] > start

    def can_do(self, rank: int, do: Do) -> bool:
        following = (rank + 1) % len(self.programs)
        before = (rank - 1) % len(self.programs)
        if do.what == "begin_send":
            self.begun[rank].append(do.unit)
        elif do.what == "post":
            self.posted[rank].append(do.unit)
        elif do.what == "await_send":
            return len(self.posted[following]) >= len(self.begun[rank])
        else:
            return len(self.begun[before]) >= len(self.posted[rank])
        return True


def test_no_stage_waits_for_ever() -> None:
    for stages, iterations, tokens, rounds, is_async in PIPELINES:
        workload = workload_of(rounds, tokens, iterations)
        actions = stage_actions(normal, workload, stages, is_async=is_async)
        ring = Ring([list(as_operations(a, is_async=is_async)) for a in actions])

        assert ring.run() == [], (stages, iterations, tokens, rounds, is_async)
        for rank in range(stages):
            assert ring.begun[rank] == ring.posted[(rank + 1) % stages]


def naive_order(workload: Workload, stages: int) -> list[list[Do]]:
    """One after the other: a stage receives what its next unit needs, and sends when it is done.

    The first stage takes a result just before the unit that it is the input of.
    """

    def receive(unit: Unit) -> list[Do]:
        return [Do("post", unit), Do("await_receive")]

    def send(unit: Unit) -> list[Do]:
        return [Do("begin_send", unit), Do("await_send")]

    first: list[Do] = []
    for unit in workload.units():
        if unit.token > 0:
            first += receive(workload.unit(unit.number - workload.num_iterations))
        first += send(unit)
    programs = [first]
    for rank in range(1, stages):
        program: list[Do] = []
        for unit in workload.units():
            program += receive(unit)
            if rank < stages - 1 or unit.token < workload.num_tokens - 1:
                program += send(unit)
        programs.append(program)
    return programs


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_the_simulator_finds_the_deadlock_of_the_naive_order(stages: int) -> None:
    def stuck(iterations: int) -> list[int]:
        return Ring(naive_order(workload_of(1, 3, iterations), stages)).run()

    # The first stage sends unit T - 1 while all others hold a unit that they cannot get rid of.
    for iterations in (stages + 1, stages + 2, 3 * stages):
        assert stuck(iterations) == list(range(stages))
    assert stuck(1) == []


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_the_simulator_finds_a_first_stage_that_takes_results_too_late(
    monkeypatch: pytest.MonkeyPatch, stages: int, is_async: bool
) -> None:
    """All others hold two units each, one received and one to be sent; a link may hold one more."""
    can_hold = 1 + (3 if is_async else 2) * (stages - 1)

    def is_stuck(in_flight: int) -> bool:
        def result(pipeline: Pipeline, workload: Workload, following: int) -> Unit | None:
            number = following - min(workload.num_iterations, in_flight)
            unit = workload.unit(max(number, 0))
            return None if number < 0 or unit.token == workload.num_tokens - 1 else unit

        monkeypatch.setattr(Pipeline, "_result", result)
        actions = stage_actions(normal, workload_of(1, 3, 4 * stages), stages, is_async=is_async)
        return Ring([list(as_operations(a, is_async=is_async)) for a in actions]).run() != []

    assert not is_stuck(can_hold)
    assert is_stuck(can_hold + 1)


# --- what a pipeline costs ---


@pytest.mark.parametrize(
    ("shape", "stages", "busy"),
    [
        ((3, 4, 2), 1, 1),
        # Enough under way: a stage waits only for the first unit to come, and the last to go.
        ((1, 1, 8), 4, 8 / 11),
        ((2, 5, 4), 4, 40 / 43),
        ((2, 5, 7), 4, 70 / 73),
        # Too little: each token takes a way through all stages.
        ((1, 5, 1), 4, 5 / 20),
        ((1, 5, 2), 4, 10 / (5 * 4 + 1)),
        # The next round's prompts need no token of this one's.
        ((2, 1, 1), 4, 2 / 5),
    ],
)
def test_stages_are_idle_as_long_as_they_wait(
    shape: tuple[int, int, int], stages: int, busy: float
) -> None:
    assert idle_fraction(workload_of(*shape), stages) == pytest.approx(1 - busy)
