"""How a load is spread over processes, and how what these say is added up; nothing is started."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexbench.core.endpoint import Failure, FailureKind
from flexbench.core.errors import ConfigError, DeadlineError, Interrupted, RunError, WorkerError
from flexbench.core.processes import Deadline, Finished, Item
from flexbench.serving import generators, load
from flexbench.serving.clients.dummy import DummyClient, DummyConfig
from flexbench.serving.config import Limits, Load, PromptConfig, ServingConfig, Sweep
from flexbench.serving.generator import Status
from flexbench.serving.generators import Board, Generators, PartialRun, PointSpec, Topology
from flexbench.serving.load import LocalLoad, choose_topology
from flexbench.serving.spool import SpoolWriter
from flexbench.serving.worker import Done, PointOrder, Prepared, Start, Stop

AnyNumber = SimpleNamespace(requests_per_worker=None)
OneAtATime = SimpleNamespace(requests_per_worker=1)


# --- topology ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "num_cpus", lambda: 8)


def closed(concurrency: int) -> Load:
    return Load(concurrency=concurrency, duration_s=1.0)


def opened(rate: float) -> Load:
    return Load(rate_per_s=rate, duration_s=1.0)


@pytest.mark.parametrize(
    ("asked", "num_loops"),
    [
        # One loop for 128 clients, or for 500 requests/s; never more than CPUs.
        (closed(1), 1),
        (closed(128), 1),
        (closed(129), 2),
        (closed(512), 4),
        (closed(5000), 8),
        (opened(0.5), 1),
        (opened(500), 1),
        (opened(501), 2),
        (opened(100_000), 8),
    ],
)
def test_as_many_loops_as_a_load_needs(asked, num_loops):
    found = choose_topology(AnyNumber, asked, num_workers=None, use_threading=False)
    assert found == Topology(num_workers=num_loops, num_parts=num_loops)
    # Threads: as many loops, in one process.
    found = choose_topology(AnyNumber, asked, num_workers=None, use_threading=True)
    assert found == Topology(num_workers=1, num_parts=num_loops)


def test_a_number_of_workers_is_obeyed_as_far_as_there_are_clients():
    def chosen(asked: Load, num_workers: int) -> int:
        found = choose_topology(AnyNumber, asked, num_workers=num_workers, use_threading=False)
        assert found.num_workers == found.num_parts
        return found.num_workers

    assert chosen(closed(4), 3) == 3
    assert chosen(closed(2), 3) == 2
    assert chosen(closed(1000), 12) == 12
    assert chosen(opened(1), 3) == 3


def test_a_client_whose_places_are_within_a_loop_has_one():
    for asked in (closed(1000), opened(5000)):
        found = choose_topology(DummyClient, asked, num_workers=4, use_threading=False)
        assert found == Topology(num_workers=1, num_parts=1)


def test_a_client_with_one_request_at_a_time_has_a_process_for_each():
    def chosen(asked: Load, num_workers: int | None) -> Topology:
        return choose_topology(OneAtATime, asked, num_workers=num_workers, use_threading=False)

    assert chosen(closed(20), None) == Topology(num_workers=20, num_parts=20)
    assert chosen(opened(3), None) == Topology(num_workers=4, num_parts=4)
    assert chosen(opened(3), 7) == Topology(num_workers=7, num_parts=7)
    with pytest.raises(ConfigError, match=r"--num-workers: .* 20 clients need 20"):
        chosen(closed(20), 19)


def test_every_loop_is_in_one_process():
    topology = Topology(num_workers=2, num_parts=5)
    assert [topology.parts_of(worker) for worker in range(2)] == [(0, 2, 4), (1, 3)]
    second_machine = Topology(num_workers=2, num_parts=3, first_part=3, total_parts=6)
    assert [second_machine.parts_of(worker) for worker in range(2)] == [(3, 5), (4,)]


# --- the board -----------------------------------------------------------------------------------


def test_the_board_adds_up_the_latest_of_every_loop():
    board = Board()
    board.take(Status(part=0, in_flight=3, sent=10, completed=6, failed=1, recent_ttft_s=[0.1]))
    board.take(Status(part=1, in_flight=1, sent=5, completed=4, output_tokens=40, last_failure="timeout: no end"))  # fmt: skip
    board.take(Status(part=0, in_flight=2, sent=12, completed=9, failed=1, recent_ttft_s=[0.2]))
    assert board.counts == {
        "in_flight": 3, "sent": 17, "completed": 13, "failed": 1, "output_tokens": 40,
    }  # fmt: skip
    assert board.recent_ttft_s == [0.1, 0.2]
    assert board.last_failure == "timeout: no end"


def test_the_board_remembers_the_last_thousand_first_tokens():
    board = Board()
    for number in range(3):
        board.take(Status(part=0, recent_ttft_s=[float(number)] * 600))
    assert board.recent_ttft_s == [1.0] * 400 + [2.0] * 600


# --- generators, with a crew of no processes -----------------------------------------------------


class FakeWorker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.reports_open = False


class FakeCrew:
    """Hands out `messages`: (worker's number, payload) or an error to raise; keeps orders."""

    def __init__(self, *messages: Any) -> None:
        self.messages = deque(messages)
        self.workers: list[FakeWorker] = []
        self.orders: list[tuple[str, Any]] = []
        self.ended: list[str] = []
        self.on_release: Any = lambda order: None

    def start(self, name: str, _target: Any) -> FakeWorker:
        self.workers.append(FakeWorker(name))
        return self.workers[-1]

    def release(self, workers: list[FakeWorker], payload: Any) -> float:
        self.orders += [(worker.name, payload) for worker in workers]
        self.on_release(payload)
        return 0.0

    def next_message(self, deadline: Deadline) -> tuple[FakeWorker, Any]:
        if not self.messages:
            raise deadline.error()
        message = self.messages.popleft()
        if isinstance(message, Exception):
            raise message
        number, payload = message
        return self.workers[number], payload if isinstance(payload, Finished) else Item(payload)

    def end(self, workers: list[FakeWorker]) -> None:
        self.ended += [worker.name for worker in workers]

    def orders_of(self, kind: type) -> list[tuple[str, Any]]:
        return [(name, order) for name, order in self.orders if isinstance(order, kind)]


def spec(asked: Load) -> PointSpec:
    return PointSpec(
        api="dummy",
        client_config=DummyConfig(),
        prompts=PromptConfig(model="m", tokenizer="byte"),
        load=asked,
        series=0,
        warmup_requests=1,
        request_timeout_s=5.0,
    )


TWO = Topology(num_workers=2, num_parts=2)


def ready(*failures: Failure, num_warmups: int = 1) -> Prepared:
    return Prepared(num_warmups, failures)


def report(part: int) -> Any:
    return SimpleNamespace(part=part)


def make(
    folder: Path, crew: FakeCrew, *, prepare_timeout_s: float = 5.0, **more: Any
) -> Generators:
    return Generators(crew, spool_folder=folder, prepare_timeout_s=prepare_timeout_s, **more)  # type: ignore[arg-type]


def row(index: int, moment_ns: int) -> tuple[Any, ...]:
    return (index, 0, moment_ns, moment_ns, None, [moment_ns + 5], moment_ns + 6, 4, 2, 2, True, 4,
            "stop", False, None, None)  # fmt: skip


def test_a_point_is_prepared_released_and_read(tmp_path):
    crew = FakeCrew(
        (1, ready()), (0, Status(part=0)), (0, ready()),
        (0, Status(part=0, sent=1)), (1, Done((report(1),))), (0, Done((report(0),))),
    )  # fmt: skip
    seen = []
    made = make(tmp_path, crew)
    prepared = made.prepare(spec(closed(4)), TWO)
    assert (prepared.num_warmups, prepared.failures) == (2, [])
    orders = crew.orders_of(PointOrder)
    assert [name for name, _ in orders] == ["load generator 0", "load generator 1"]
    assert [(order.parts, order.num_parts) for _, order in orders] == [((0,), 2), ((1,), 2)]
    for number, (_, order) in enumerate(orders):
        writer = SpoolWriter(order.spools[0])
        writer.add(row(number, 1_000_000_000 - 100 * number))
        writer.close()

    run = made.run(limits=Limits(), on_status=lambda board: seen.append(board.counts["sent"]), start_ns=500_000_000)  # fmt: skip

    assert [order.start_ns for _, order in crew.orders_of(Start)] == [500_000_000] * 2
    # In the order in which they were scheduled, and since the release.
    assert [(one.index, one.scheduled_ns) for one in run.traces] == [
        (1, 499_999_900),
        (0, 500_000_000),
    ]
    assert (seen, run.stopped_by, len(run.reports)) == ([1], None, 2)
    assert list(tmp_path.iterdir()) == []
    numbers = [order.number for _, order in crew.orders]
    assert numbers == sorted(numbers)


def test_workers_are_started_once_and_only_those_of_a_point_work(tmp_path):
    crew = FakeCrew((0, ready()), (1, ready()), (0, ready()))
    made = make(tmp_path, crew)
    made.prepare(spec(closed(4)), TWO)
    made.prepare(spec(closed(1)), Topology(num_workers=1, num_parts=1))
    assert len(crew.workers) == 2
    assert [name for name, _ in crew.orders] == ["load generator 0", "load generator 1", "load generator 0"]  # fmt: skip


def test_who_is_not_ready_in_time_is_waited_for_no_longer(tmp_path):
    crew = FakeCrew((0, ready()))
    made = make(tmp_path, crew, prepare_timeout_s=0.05)
    with pytest.raises(DeadlineError, match=r"not ready within 0.05 s \(--warmup-timeout\)"):
        made.prepare(spec(closed(2)), TWO)


def test_too_many_failures_end_a_point(tmp_path):
    crew = FakeCrew(
        (0, ready()), (1, ready()),
        (0, Status(part=0, sent=9, completed=5, failed=2)),
        (1, Status(part=1, sent=3, failed=2)),
        (1, Status(part=1, sent=3, failed=3)),
        (0, Done((report(0),))), (1, Done(())),
    )  # fmt: skip
    made = make(tmp_path, crew)
    made.prepare(spec(closed(2)), TWO)
    run = made.run(limits=Limits(max_errors=3), on_status=lambda board: None)
    assert run.stopped_by == "4 requests failed; --max-errors is 3"
    # Once, to both.
    assert len(crew.orders_of(Stop)) == 2


@pytest.mark.parametrize(
    "error",
    [WorkerError("load generator 1", "was killed by SIGKILL"), Interrupted(2), RunError("rank 1 is lost")],
)  # fmt: skip
def test_what_was_measured_comes_with_the_error(tmp_path, error):
    crew = FakeCrew((0, ready()), (1, ready()), (0, Status(part=0, sent=1)), error)
    made = make(tmp_path, crew)
    made.prepare(spec(closed(2)), TWO)
    # The second was killed while it wrote a line.
    spools = [order.spools[0] for _, order in crew.orders_of(PointOrder)]
    spools[0].write_text("")
    writer = SpoolWriter(spools[1])
    writer.add(row(7, 1_000))
    writer.close()
    with spools[1].open("a") as file:
        file.write("[8, 0, 12")
    with pytest.raises(PartialRun) as raised:
        made.run(limits=Limits(), on_status=lambda board: None)
    assert raised.value.error is error
    assert raised.value.exit_code == error.exit_code
    assert [trace.index for trace in raised.value.run.traces] == [7]
    assert len(crew.orders_of(Stop)) == 2
    assert crew.ended == ["load generator 0", "load generator 1"]


def test_a_worker_that_says_nothing_is_frozen(tmp_path, monkeypatch):
    monkeypatch.setattr(generators, "_SILENCE_S", 0.05)
    crew = FakeCrew((0, ready()), (1, ready()), (0, Status(part=0)))
    made = make(tmp_path, crew)
    made.prepare(spec(closed(2)), TWO)
    with pytest.raises(PartialRun) as raised:
        made.run(limits=Limits(), on_status=lambda board: None, start_ns=1)
    assert raised.value.message == "load generator 1 has said nothing for 0.05 s"
    assert isinstance(raised.value.error, DeadlineError)


def test_others_may_end_a_wait(tmp_path):
    def check() -> None:
        raise RunError("rank 1 is lost")

    made = make(tmp_path, FakeCrew(), check=check)
    with pytest.raises(RunError, match="rank 1 is lost"):
        made.prepare(spec(closed(2)), TWO)


# --- the warm-up ---------------------------------------------------------------------------------


def local(tmp_path: Path, crew: FakeCrew) -> LocalLoad:
    prompts = PromptConfig(model="m")
    config = ServingConfig(
        api="dummy",
        client_config=DummyConfig(),
        sweeps=(Sweep(prompts=prompts, loads=(closed(2),)),),
        num_workers=2,
    )
    return LocalLoad(make(tmp_path, crew), AnyNumber, config=config)  # type: ignore[arg-type]


BROKEN = Failure(FailureKind.HTTP_SERVER_ERROR, "HTTP 500: out of memory")
SLOW = Failure(FailureKind.TIMEOUT, "no end of a warm-up request")


def test_without_any_warm_up_request_that_succeeds_nothing_is_measured(tmp_path):
    crew = FakeCrew((0, ready(BROKEN, SLOW, num_warmups=2)), (1, ready(BROKEN, num_warmups=1)))
    with pytest.raises(RunError) as raised:
        local(tmp_path, crew).send(spec(closed(2)), lambda board: None)
    assert raised.value.message == (
        "2 clients: no warm-up request succeeded: 2 x http_5xx: HTTP 500: out of memory; "
        "1 x timeout: no end of a warm-up request"
    )
    assert crew.orders_of(Start) == []


def test_some_failures_of_the_warm_up_are_kept_and_the_point_is_measured(tmp_path):
    crew = FakeCrew((0, ready(BROKEN)), (1, ready()), (0, Done(())), (1, Done(())))
    loaded = local(tmp_path, crew).send(spec(closed(2)), lambda board: None)
    assert loaded.warmup_failures == [BROKEN]
    assert loaded.topology == TWO
