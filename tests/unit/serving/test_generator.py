"""The load generator against clients that do what a test wants: who sends what, when, and what is
noted of it."""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.core.endpoint import (
    Exchange,
    Failure,
    FailureKind,
    GenerationRequest,
    Response,
)
from flexbench.serving import generator
from flexbench.serving.arrivals import send_times
from flexbench.serving.config import Arrival, Load
from flexbench.serving.generator import LoadLoop, LoopReport, Part, Status, Warmup
from flexbench.serving.spool import SpoolWriter, read_spool
from flexbench.serving.traces import RequestTrace

# On a loaded machine, what takes a moment may take this long.
LONG_S = 20.0

Answer = Callable[[GenerationRequest, Exchange], Awaitable[None]]


class Prompts:
    """A prompt is its number."""

    is_slow = False

    def request(self, index: int) -> GenerationRequest:
        return GenerationRequest(
            index=index,
            prompt=str(index),
            prompt_tokens=len(str(index)),
            max_new_tokens=2,
            is_streaming=True,
        )

    def count_tokens(self, texts: Sequence[str]) -> int:
        return len("".join(texts).split())


class FakeClient:
    """Answers as `answer` does, and keeps what it was called for, in order."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.calls: list[tuple[str, int]] = []
        self.opened: list[int] = []
        self.in_flight = self.most_in_flight = 0
        self.answers: dict[int, Response] = {}
        self.cut: list[int] = []

    async def open(self, num_connections: int) -> None:
        self.opened.append(num_connections)

    def prepare_request(self, request: GenerationRequest) -> GenerationRequest:
        self.calls.append(("prepare", request.index))
        return request

    async def send_request(self, prepared: GenerationRequest, exchange: Exchange) -> None:
        self.calls.append(("send", prepared.index))
        exchange.sent_at = time.monotonic_ns()
        exchange.status = prepared.index  # for process_response to know it again
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self._answer(prepared, exchange)
        except asyncio.CancelledError:
            self.cut.append(prepared.index)
            raise
        finally:
            self.in_flight -= 1

    def process_response(self, exchange: Exchange) -> Response:
        self.calls.append(("process", exchange.status))
        found = self.answers.get(exchange.status)
        if found is not None:
            return found
        return Response(content_times=list(exchange.arrivals), texts=list(exchange.pieces))

    def numbers(self, what: str) -> list[int]:
        return [index for done, index in self.calls if done == what]


def answer_after(seconds: float = 0.0) -> Answer:
    async def answer(request: GenerationRequest, exchange: Exchange) -> None:
        await asyncio.sleep(seconds)
        give(exchange, "once upon")

    return answer


def give(exchange: Exchange, *pieces: str, is_end: bool = True) -> None:
    for piece in pieces:
        exchange.arrivals.append(time.monotonic_ns())
        exchange.pieces.append(piece)
    if is_end:
        exchange.ended_at = time.monotonic_ns()


class Sent:
    """What a loop did."""

    def __init__(self) -> None:
        self.traces: list[RequestTrace] = []
        self.statuses: list[Status] = []
        self.warmup: Warmup
        self.report: LoopReport
        self.started_ns = 0

    def by_index(self) -> dict[int, RequestTrace]:
        return {trace.index: trace for trace in self.traces}

    def failures(self) -> Counter[str]:
        return Counter(trace.failure for trace in self.traces if trace.failure is not None)


class Ground:
    """Runs loops, with spools in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def send(
        self,
        client: FakeClient,
        load: Load,
        *,
        part: int = 0,
        num_parts: int = 1,
        warmup_requests: int = 0,
        request_timeout_s: float = LONG_S,
        is_stopped: Callable[[], bool] = lambda: False,
        spool: Any = None,
    ) -> Sent:
        """Prepare and send it; what came of that. What is measured is read from the spool."""
        self._number += 1
        path = self._folder / f"spool-{self._number}"
        writer = SpoolWriter(path)
        sent = Sent()
        loop = LoadLoop(
            client,  # type: ignore[arg-type]
            Prompts(),  # type: ignore[arg-type]
            Part(load=load, number=part, num_parts=num_parts),
            spool or writer,
            seed=3,
            request_timeout_s=request_timeout_s,
            on_status=lambda status: sent.statuses.append(
                Status(**{name: getattr(status, name) for name in Status.__dataclass_fields__})
            ),
            is_stopped=is_stopped,
        )

        async def run() -> None:
            sent.warmup = await loop.prepare(warmup_requests)
            sent.started_ns = time.monotonic_ns() + 5_000_000
            async with asyncio.timeout(LONG_S):
                sent.report = await loop.run(sent.started_ns)

        try:
            asyncio.run(run())
        finally:
            writer.close()
        sent.traces = read_spool(path, 0)
        return sent


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statuses and sweeps come more often, so that a test need not wait."""
    monkeypatch.setattr(generator, "_TICK_S", 0.02)
    monkeypatch.setattr(generator, "_SWEEP_S", 0.01)


# --- parts ---------------------------------------------------------------------------------------


@given(
    concurrency=st.integers(1, 40), num_parts=st.integers(1, 12), num_requests=st.integers(1, 200)
)
def test_every_request_of_a_closed_loop_belongs_to_one_part(concurrency, num_parts, num_requests):
    load = Load(concurrency=concurrency, num_requests=num_requests)
    parts = [Part(load=load, number=n, num_parts=num_parts) for n in range(num_parts)]
    shares = [list(part.indices()) for part in parts]
    assert sorted(chain(*shares)) == list(range(num_requests))
    assert sum(part.num_clients for part in parts) == concurrency
    assert max(p.num_clients for p in parts) - min(p.num_clients for p in parts) <= 1
    rounds = num_requests // concurrency
    for part, share in zip(parts, shares, strict=True):
        # In proportion to its clients, but for the last, unfinished round.
        assert rounds * part.num_clients <= len(share) <= (rounds + 1) * part.num_clients
        assert share == sorted(share)


@given(
    rate=st.floats(1, 1000),
    num_parts=st.integers(1, 8),
    num_requests=st.integers(1, 100),
    arrival=st.sampled_from(Arrival),
)
def test_every_request_of_an_open_loop_belongs_to_one_part(rate, num_parts, num_requests, arrival):
    load = Load(rate_per_s=rate, num_requests=num_requests, arrival=arrival, burst_size=3)
    parts = [Part(load=load, number=n, num_parts=num_parts) for n in range(num_parts)]
    schedules = [list(part.schedule(7)) for part in parts]
    assert sorted(chain(*schedules)) == list(enumerate(send_times(load, 7)))
    for part, schedule in zip(parts, schedules, strict=True):
        assert [index for index, _ in schedule] == list(part.indices())


def test_parts_by_hand():
    load = Load(concurrency=3, num_requests=8)
    parts = [Part(load=load, number=number, num_parts=2) for number in range(2)]
    # Clients 0 and 2, and client 1; request i is of client i % 3.
    assert [part.num_clients for part in parts] == [2, 1]
    assert list(parts[0].indices()) == [0, 2, 3, 5, 6]
    assert list(parts[1].indices()) == [1, 4, 7]


def test_a_part_without_clients_has_nothing_to_send():
    part = Part(load=Load(concurrency=2, duration_s=1.0), number=2, num_parts=3)
    assert part.num_clients == 0
    assert list(part.indices()) == []


def test_only_time_ends_the_numbers_of_a_load_without_one():
    part = Part(load=Load(concurrency=2, duration_s=1.0), number=1, num_parts=2)
    assert list(islice(part.indices(), 4)) == [1, 3, 5, 7]


# --- a closed loop -------------------------------------------------------------------------------


def test_clients_send_one_request_after_the_other(ground):
    client = FakeClient(answer_after(0.002))
    sent = ground.send(client, Load(concurrency=3, num_requests=20))
    assert sorted(client.numbers("send")) == list(range(20))
    assert client.most_in_flight == 3
    assert client.opened == [3]
    assert len(sent.traces) == 20
    for trace in sent.traces:
        assert trace.is_ok
        assert trace.output_tokens == 2
        assert not trace.is_counted_by_server
        assert sent.started_ns <= trace.scheduled_ns <= trace.sent_ns < trace.ended_ns
        assert len(trace.content_ns) == 1


def test_the_next_request_is_sent_before_an_answer_is_taken_apart(ground):
    client = FakeClient(answer_after())
    ground.send(client, Load(concurrency=1, num_requests=4))
    order = [call for call in client.calls if call[0] != "prepare"]
    assert order == [
        ("send", 0), ("send", 1), ("process", 0), ("send", 2), ("process", 1), ("send", 3),
        ("process", 2), ("process", 3),
    ]  # fmt: skip


def test_requests_are_written_before_they_are_needed(ground):
    client = FakeClient(answer_after())
    sent = ground.send(client, Load(concurrency=2, num_requests=300))
    assert sent.report.num_prepared_late == 0
    first = client.calls.index(("send", 0))
    # For two requests of each client, and 64 more.
    assert len([call for call in client.calls[:first] if call[0] == "prepare"]) == 68


def test_requests_that_are_written_late_are_counted(ground):
    async def at_once(request: GenerationRequest, exchange: Exchange) -> None:
        give(exchange, "once")

    # A client that never waits: nobody has time to write more than the first 66.
    sent = ground.send(FakeClient(at_once), Load(concurrency=1, num_requests=100))
    assert sent.report.num_prepared_late == 34
    assert len(sent.traces) == 100


@pytest.mark.timing
def test_after_its_duration_nothing_is_sent_and_what_is_in_flight_ends(ground):
    client = FakeClient(answer_after(0.2))
    sent = ground.send(client, Load(concurrency=2, duration_s=0.1))
    assert sorted(client.numbers("send")) == [0, 1]
    assert all(trace.is_ok for trace in sent.traces)
    assert all(trace.ended_ns - sent.started_ns >= 200_000_000 for trace in sent.traces)
    assert 0.09 <= sent.report.wall_s < 0.19  # the duration, not the drain


def test_requests_end_a_load_before_its_duration(ground):
    began = time.monotonic()
    sent = ground.send(
        FakeClient(answer_after()), Load(concurrency=2, num_requests=5, duration_s=LONG_S)
    )
    assert len(sent.traces) == 5
    assert time.monotonic() - began < LONG_S


def test_a_loop_without_clients_ends_at_once(ground):
    client = FakeClient(answer_after())
    sent = ground.send(client, Load(concurrency=1, duration_s=LONG_S), part=1, num_parts=2)
    assert (sent.traces, client.opened) == ([], [0])
    assert sent.warmup == Warmup(num_requests=0, failures=[])


# --- an open loop --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrival", "moments_ms"),
    [
        (Arrival.CONSTANT, [0, 10, 20, 30, 40, 50]),
        (Arrival.BURST, [0, 0, 0, 30, 30, 30]),
    ],
)
@pytest.mark.timing
def test_requests_are_sent_when_they_are_due(ground, arrival, moments_ms):
    load = Load(rate_per_s=100, num_requests=6, arrival=arrival, burst_size=3)
    sent = ground.send(FakeClient(answer_after(0.001)), load)
    traces = sent.by_index()
    due = [traces[index].scheduled_ns - sent.started_ns for index in range(6)]
    assert due == [moment * 1_000_000 for moment in moments_ms]
    late_ms = sorted((trace.sent_ns - trace.scheduled_ns) / 1e6 for trace in sent.traces)
    # All may be late on a busy machine; none is early.
    assert 0 <= late_ms[0] < 10


def test_an_open_loop_does_not_wait_for_answers(ground):
    # Ten requests within 0.1 s, each of which takes 0.3 s.
    client = FakeClient(answer_after(0.3))
    sent = ground.send(client, Load(rate_per_s=100, num_requests=10))
    assert client.most_in_flight == 10
    assert all(trace.is_ok for trace in sent.traces)


def test_two_loops_share_an_open_load(ground):
    load = Load(rate_per_s=200, num_requests=7)
    clients = [FakeClient(answer_after()) for _ in range(2)]
    for number, client in enumerate(clients):
        ground.send(client, load, part=number, num_parts=2)
    assert [client.numbers("send") for client in clients] == [[0, 2, 4, 6], [1, 3, 5]]


def test_a_loop_that_comes_too_late_sends_all_that_is_due(ground):
    async def hold_up(request: GenerationRequest, exchange: Exchange) -> None:
        if request.index == 0:
            time.sleep(0.1)  # the whole event loop stands still
        give(exchange, "once")

    sent = ground.send(FakeClient(hold_up), Load(rate_per_s=100, num_requests=10))
    traces = [sent.by_index()[index] for index in range(10)]
    # Request 1 was due after 10 ms, and could be sent after 100.
    assert (traces[1].sent_ns - traces[1].scheduled_ns) / 1e6 >= 85
    assert all(one.scheduled_ns < other.scheduled_ns for one, other in pairwise(traces))


def test_what_is_due_before_the_end_is_sent_after_it(ground):
    async def hold_up(request: GenerationRequest, exchange: Exchange) -> None:
        if request.index == 5:
            time.sleep(0.2)  # the whole event loop stands still
        give(exchange, "once")

    # Without them, nobody would see that the load was not what was asked for.
    sent = ground.send(FakeClient(hold_up), Load(rate_per_s=100, duration_s=0.1))
    traces = sent.by_index()
    assert sorted(traces) == list(range(10))
    assert all(trace.is_ok for trace in sent.traces)
    assert (traces[9].sent_ns - traces[9].scheduled_ns) / 1e6 >= 150


@pytest.mark.timing
def test_waiting_for_requests_to_be_due_takes_little_time(ground):
    # To wait actively for the last two milliseconds would take all of it.
    sent = ground.send(FakeClient(answer_after()), Load(rate_per_s=400, duration_s=0.5))
    assert len(sent.traces) == 200
    assert sent.report.cpu_s < 0.5 * sent.report.wall_s


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_request_without_an_end_has_failed(ground, quick):
    async def answer(request: GenerationRequest, exchange: Exchange) -> None:
        if request.index == 1:
            give(exchange, "never", is_end=False)
            await asyncio.sleep(LONG_S)
        await asyncio.sleep(0)
        give(exchange, "once")

    client = FakeClient(answer)
    sent = ground.send(client, Load(concurrency=2, num_requests=6), request_timeout_s=0.1)
    assert sent.failures() == {"timeout": 1}
    slow = sent.by_index()[1]
    assert slow.failure_message == "no end within 0.1 s"
    assert not slow.is_unfinished
    assert len(slow.content_ns) == 1
    assert 0.1 <= (slow.ended_ns - slow.sent_ns) / 1e9 < LONG_S / 2
    assert client.cut == [1]
    # Never again, and the others were sent all the same.
    assert sorted(client.numbers("send")) == list(range(6))
    assert (sent.statuses[-1].completed, sent.statuses[-1].failed) == (5, 1)


def test_a_client_goes_on_after_a_request_that_was_cut_off(ground, quick):
    async def answer(request: GenerationRequest, exchange: Exchange) -> None:
        await asyncio.sleep(LONG_S if request.index < 2 else 0)
        give(exchange, "once")

    client = FakeClient(answer)
    sent = ground.send(client, Load(concurrency=1, num_requests=4), request_timeout_s=0.05)
    assert client.numbers("send") == [0, 1, 2, 3]
    assert [sent.by_index()[index].is_ok for index in range(4)] == [False, False, True, True]


def test_what_a_stop_cuts_off_is_unfinished(ground, quick):
    async def answer(request: GenerationRequest, exchange: Exchange) -> None:
        if request.index >= 2:
            give(exchange, "begun", is_end=False)
            await asyncio.sleep(LONG_S)
        await asyncio.sleep(0)
        give(exchange, "once")

    client = FakeClient(answer)
    sent = ground.send(
        client,
        Load(concurrency=2, duration_s=LONG_S),
        is_stopped=lambda: client.in_flight == 2 and len(client.numbers("send")) == 4,
    )
    assert sorted(client.cut) == [2, 3]
    traces = sent.by_index()
    assert [traces[index].is_unfinished for index in range(4)] == [False, False, True, True]
    assert sent.failures() == {}
    # What had come by then is kept.
    assert [len(traces[index].content_ns) for index in range(4)] == [1, 1, 1, 1]
    last = sent.statuses[-1]
    assert (last.sent, last.completed, last.failed, last.in_flight) == (4, 2, 0, 0)


@pytest.mark.parametrize("load", [Load(concurrency=2, num_requests=8), Load(rate_per_s=500, num_requests=8)])  # fmt: skip
def test_what_a_client_raises_is_a_failure_of_that_request(ground, load):
    async def answer(request: GenerationRequest, exchange: Exchange) -> None:
        await asyncio.sleep(0)
        if request.index == 3:
            raise ValueError("no such thing")
        give(exchange, "once")

    client = FakeClient(answer)
    sent = ground.send(client, load)
    assert sent.failures() == {"client_error": 1}
    assert sent.by_index()[3].failure_message == "ValueError: no such thing"
    assert sorted(client.numbers("send")) == list(range(8))
    assert sent.statuses[-1].last_failure == "client_error: ValueError: no such thing"


def test_an_answer_that_cannot_be_read_is_a_failure_of_that_request(ground):
    client = FakeClient(answer_after())
    client.answers[2] = Response(
        failure=Failure(FailureKind.SERVER_REPORTED, "the engine died"), output_tokens=1
    )
    process = client.process_response

    def read(exchange: Exchange) -> Response:
        if exchange.status == 1:
            raise KeyError("choices")
        return process(exchange)

    client.process_response = read
    sent = ground.send(client, Load(concurrency=1, num_requests=4))
    assert sent.failures() == {"client_error": 1, "server_error": 1}
    assert sent.by_index()[1].failure_message == "KeyError: 'choices'"
    assert sent.by_index()[2].failure_message == "the engine died"


def test_requests_that_fail_at_once_do_not_keep_a_loop_from_its_end(ground, quick):
    async def fail(request: GenerationRequest, exchange: Exchange) -> None:
        exchange.failure = Failure(FailureKind.REFUSED, "nobody listens")

    # Without a turn for others, its duration would never come to an end.
    sent = ground.send(FakeClient(fail), Load(concurrency=2, duration_s=0.1))
    assert set(sent.failures()) == {"refused"}
    assert sent.statuses[-1].failed == sum(sent.failures().values())
    assert sent.report.wall_s < LONG_S / 2


@pytest.mark.parametrize("load", [Load(concurrency=2, duration_s=LONG_S), Load(rate_per_s=50, duration_s=LONG_S)])  # fmt: skip
@pytest.mark.parametrize("fails_in", ["add", "write"])
def test_a_full_disk_ends_the_loop_at_once(ground, quick, load, fails_in):
    def fail(*row: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = SimpleNamespace(
        add=lambda row: None, take=lambda: b"rows", write=lambda rows: None, flush=lambda: None
    )
    setattr(spool, fails_in, fail)
    client = FakeClient(answer_after(0.001))
    began = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        ground.send(client, load, spool=spool)
    assert time.monotonic() - began < LONG_S / 2
    assert client.in_flight == 0


# --- what is told --------------------------------------------------------------------------------


def test_a_status_has_the_counts_since_the_release(ground, quick):
    async def answer(request: GenerationRequest, exchange: Exchange) -> None:
        await asyncio.sleep(0.005)
        if request.index % 4 == 0:
            exchange.failure = Failure(FailureKind.RATE_LIMITED, "HTTP 429")
        give(exchange, "once upon")

    sent = ground.send(FakeClient(answer), Load(concurrency=2, num_requests=40), part=0)
    last = sent.statuses[-1]
    assert (last.part, last.sent, last.completed, last.failed) == (0, 40, 30, 10)
    assert last.output_tokens == 60
    assert last.last_failure == "rate_limited: HTTP 429"
    # Each TTFT is told once.
    told = [ttft for status in sent.statuses for ttft in status.recent_ttft_s]
    assert len(told) == 30
    assert min(told) >= 0.005
    assert all(one.sent <= other.sent for one, other in pairwise(sent.statuses))


def test_what_the_server_counts_goes_before_the_tokenizer(ground):
    client = FakeClient(answer_after())
    client.answers[0] = Response(
        content_times=[1],
        texts=["once upon"],
        output_tokens=7,
        prompt_tokens=11,
        finish_reason="stop",
    )
    sent = ground.send(client, Load(concurrency=1, num_requests=2))
    first, second = (sent.by_index()[index] for index in range(2))
    assert (first.output_tokens, first.is_counted_by_server) == (7, True)
    assert (first.server_prompt_tokens, first.finish_reason) == (11, "stop")
    assert (second.output_tokens, second.is_counted_by_server) == (2, False)
    assert (second.server_prompt_tokens, second.finish_reason) == (None, None)
    assert (first.prompt_tokens, first.max_new_tokens, first.worker) == (1, 2, 0)


def test_how_late_the_loop_is_is_measured(ground):
    async def hold_up(request: GenerationRequest, exchange: Exchange) -> None:
        await asyncio.sleep(0.03)
        if request.index == 1:
            time.sleep(0.15)  # the whole event loop stands still
        give(exchange, "once")

    sent = ground.send(FakeClient(hold_up), Load(concurrency=1, num_requests=4))
    # The timer was due at most 20 ms before the end of the standstill.
    assert max(sent.report.lags_s) >= 0.12
    assert 0 < sent.report.cpu_s <= sent.report.wall_s
    assert sent.report.part == 0


# --- warm-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "num_requests"), [(0, 2 * 3), (1, 1 * 3)])
def test_every_client_warms_up_with_prompts_of_its_own(ground, number, num_requests):
    client = FakeClient(answer_after())
    load = Load(concurrency=3, num_requests=6)
    sent = ground.send(client, load, part=number, num_parts=2, warmup_requests=3)
    warmups = client.numbers("send")[:num_requests]
    assert sent.warmup == Warmup(num_requests=num_requests, failures=[])
    assert len(set(warmups)) == num_requests
    assert all(index < 0 for index in warmups)
    # The other loop has other numbers.
    assert all((-1 - index) % 2 == number for index in warmups)
    assert all(index >= 0 for index in client.numbers("send")[num_requests:])
    assert [trace for trace in sent.traces if trace.index < 0] == []


def test_an_open_loop_warms_up_one_connection(ground):
    client = FakeClient(answer_after())
    sent = ground.send(client, Load(rate_per_s=100, num_requests=2), warmup_requests=2)
    assert sent.warmup.num_requests == 2
    assert client.opened == [1]


def test_failures_of_the_warm_up_are_told_and_not_measured(ground):
    async def answer(request: GenerationRequest, exchange: Exchange) -> None:
        if request.index == -1:
            await asyncio.sleep(LONG_S)
        if request.index == -2:
            exchange.failure = Failure(FailureKind.HTTP_SERVER_ERROR, "HTTP 500")
        await asyncio.sleep(0)
        give(exchange, "once")

    client = FakeClient(answer)
    sent = ground.send(
        client, Load(concurrency=4, num_requests=4), warmup_requests=1, request_timeout_s=0.1
    )
    assert sent.warmup.num_requests == 4
    assert Counter(failure.kind for failure in sent.warmup.failures) == {
        FailureKind.TIMEOUT: 1,
        FailureKind.HTTP_SERVER_ERROR: 1,
    }
    assert client.cut == [-1]
    assert [trace.is_ok for trace in sent.traces] == [True] * 4
