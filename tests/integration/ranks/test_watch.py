"""Ranks as real processes, on loopback: how they find, watch and lose each other."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from flexbench.core.errors import ConfigError, Interrupted, RunError
from flexbench.ranks.channel import Channel, close_politely
from flexbench.ranks.launch import Launch, detect_launch
from flexbench.ranks.meeting_points import (
    TOKEN_VARIABLE,
    Address,
    FilePoint,
    choose_meeting_point,
    listen_at,
)
from flexbench.ranks.watch import LostRank, PeerWatch
from flexbench.ranks.wording import exit_code_of, read_exit_code

LONG_S = 60  # on a loaded machine, what takes a moment may take this long
PROGRAM = Path(__file__).parent / "watch_rank.py"
ROOT = Path(__file__).parents[3]
KILLED = "was killed, or lost its connection"


class Process:
    """A rank's process, and what it says."""

    def __init__(self, environ: dict[str, str], options: dict[str, Any], folder: Path) -> None:
        self._log = folder / f"{uuid.uuid4().hex}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", str(PROGRAM), json.dumps(options)],
                env={**os.environ, **environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )
        self._unread = b""

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n".encode())

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        expires_at = time.monotonic() + LONG_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], 0.5)
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else None
            assert chunk != b"", f"ended without an answer: {self.stderr}"
            assert time.monotonic() < expires_at, f"no answer: {self.stderr}"
            self._unread += chunk or b""
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, order: str) -> Any:
        """The only value of the answer to an order."""
        self.tell(order)
        (value,) = self.hear().values()
        return value

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    def finish(self) -> list[str]:
        """Wait for the end; the ranks that on_lost was called with."""
        last = self.hear()
        assert self.process.wait(LONG_S) == 0, self.stderr
        assert self.stderr == ""
        assert last["threads"] == 0
        calls: list[str] = last["calls"]
        return calls

    def end(self) -> None:
        self.process.kill()
        self.process.wait(LONG_S)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def open_mpi(rank: int, world_size: int, job: str = "job") -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(world_size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(world_size),
        "PMIX_NAMESPACE": job,
    }


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fbt-") as name:
        yield Path(name)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start_one(environ: dict[str, str], **options: Any) -> Process:
        process = Process(environ, {"timeout_s": LONG_S, **options}, folder)
        started.append(process)
        return process

    try:
        yield start_one
    finally:
        for process in started:
            process.end()


@pytest.fixture
def start_job(start: Callable[..., Process]) -> Callable[..., list[Process]]:
    """Starts ranks of a job that are loaded, so that they enter together."""

    def start_all(world_size: int, *, missing: int | None = None, **options: Any) -> list[Process]:
        job = options.pop("job", "job")
        numbers = [rank for rank in range(world_size) if rank != missing]
        ranks = [start(open_mpi(rank, world_size, job), **options) for rank in numbers]
        for rank in ranks:
            assert rank.hear() == {"loaded": True}
        return ranks

    return start_all


def enter(ranks: list[Process], *, fails: bool = False) -> None:
    for rank in ranks:
        rank.tell("enter")
    for rank in ranks if not fails else []:
        assert rank.hear() == {"joined": True}


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix != ".log"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def connect_to(port: int) -> Channel:
    expires_at = time.monotonic() + LONG_S
    while True:
        try:
            return Channel(socket.create_connection(("127.0.0.1", port)))
        except ConnectionRefusedError:
            assert time.monotonic() < expires_at
            time.sleep(0.02)


def make_hello(**changes: Any) -> dict[str, Any]:
    hello = {"type": "hello", "rank": 1, "world_size": 2, "token": "", "process": "x"}
    hello |= {"fingerprint": hashlib.sha256(b"test\n").hexdigest(), "patience_s": LONG_S}
    return hello | changes


def soon() -> float:
    return time.monotonic() + LONG_S


def wait_for_address(folder: Path) -> Address:
    expires_at = time.monotonic() + LONG_S
    while not (found := list(folder.glob("*/address"))):
        assert time.monotonic() < expires_at
        time.sleep(0.02)
    return Address(**json.loads(found[0].read_text()))


def test_ranks_exchange_values_and_leave_in_any_order(start_job, folder):
    ranks = start_job(4)
    enter(ranks)
    assert files_in(folder) == []
    for rank in ranks:
        rank.tell("values")
    for rank in ranks:
        assert rank.hear() == {"shared": os.getpid()}
    for leaving in (0, 2):
        ranks[leaving].tell("leave")
        assert ranks[leaving].finish() == []
    time.sleep(0.3)
    assert [ranks[number].ask("check") for number in (1, 3)] == [None, None]
    for number in (3, 1):
        ranks[number].tell("leave")
        assert ranks[number].finish() == []


@pytest.mark.parametrize(
    ("one", "other"),
    [({"job": "a", "fingerprint": "a"}, {"job": "b"}), ({"purpose": "a"}, {"purpose": "b"})],
    ids=["jobs", "commands of a job"],
)
def test_two_side_by_side(start_job, one, other):
    jobs = [start_job(2, **one), start_job(2, **other)]
    enter([jobs[0][0], jobs[1][0], jobs[1][1], jobs[0][1]])
    for ranks in jobs:
        for rank in ranks:
            rank.tell("leave")
            assert rank.finish() == []


def test_a_rank_that_never_arrives_is_named_everywhere(start_job, folder):
    ranks = start_job(4, missing=2, timeout_s=2)
    enter(ranks, fails=True)
    for rank in ranks:
        assert rank.hear() == {
            "error": "DeadlineError",
            "message": "rank 2 did not arrive within 2 s (--comm-timeout)",
        }
        assert rank.finish() == []
    assert files_in(folder) == []


@pytest.mark.parametrize("has_port", [False, True])
def test_rank_0_that_never_arrives_is_missed_with_its_address(start_job, has_port):
    port = free_port() if has_port else None
    (rank,) = start_job(2, missing=0, timeout_s=0.5, port=port)
    enter([rank], fails=True)
    answer = rank.hear()
    assert answer["error"] == "DeadlineError"
    assert answer["message"].startswith(
        "rank 1 could not reach rank 0 within 0.5 s (--comm-timeout): "
        + (f"127.0.0.1:{port}: Connection refused" if has_port else "it has not told its address")
    )
    assert rank.finish() == []


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_told_to_all(start_job, victim):
    ranks = start_job(3)
    enter(ranks)
    for rank in ranks:
        rank.tell("await_loss")
    ranks.pop(victim).signal(signal.SIGKILL)
    for rank in ranks:
        assert rank.hear() == {"lost": f"rank {victim} {KILLED}"}
    for rank in ranks:
        rank.tell("leave")
        assert rank.finish() == [f"rank {victim} {KILLED}"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_is_lost_after_the_time_out(start_job, victim):
    ranks = start_job(3, timeout_s=2)
    enter(ranks)
    frozen = ranks.pop(victim)
    frozen.signal(signal.SIGSTOP)
    message = f"rank {victim} has not answered for 2 s (--comm-timeout)"
    for rank in ranks:
        assert rank.ask("await_loss") == message
    if victim != 0:
        frozen.signal(signal.SIGCONT)
        reason = "has not answered for 2 s (--comm-timeout)"
        assert frozen.ask("await_loss") == f"rank 0 gave up on rank 1, which {reason}"
    for rank in ranks:
        rank.tell("leave")
        assert rank.finish() == [message]
    if victim == 0:  # it goes on when nobody is there any more, and knows why
        frozen.signal(signal.SIGCONT)
        reason = f"gave up on rank 0, which {message.removeprefix('rank 0 ')}"
        assert frozen.ask("await_loss") in [f"rank {number} {reason}" for number in (1, 2)]


@pytest.mark.parametrize(
    ("kind", "error", "reason", "exit_code"),
    [
        ("raise", "ValueError", "failed: ValueError: no such block", 1),
        ("wrong_input", "ConfigError", "failed: --percent: is wrong", 2),
        ("interrupted", "Interrupted", "was stopped by SIGTERM", 143),
    ],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_tells_why(start_job, victim, kind, error, reason, exit_code):
    ranks = start_job(3)
    enter(ranks)
    failing = ranks.pop(victim)
    failing.tell(f"fail {kind}")
    assert failing.hear()["error"] == error
    assert failing.finish() == []
    for rank in ranks:
        assert rank.ask("await_loss") == f"rank {victim} {reason}"
        assert rank.ask("exit_code") == exit_code
        rank.tell("leave")
        assert rank.finish() == [f"rank {victim} {reason}"]


def test_exit_codes_of_errors_and_of_what_others_say():
    assert LostRank(1, KILLED).exit_code == 1
    assert exit_code_of(KeyboardInterrupt()) == 130
    assert exit_code_of(Interrupted(signal.SIGTERM)) == 143
    assert exit_code_of(SystemExit(7)) == 1
    assert [read_exit_code(code) for code in (2, 255)] == [2, 255]
    for wrong in (None, 0, -1, 256, 10**400, 2.0, True, "2", [2]):
        assert read_exit_code(wrong) == 1


def test_a_callback_that_raises_does_not_end_the_watching(start_job):
    ranks = start_job(3, raises_in_on_lost=True)
    enter(ranks)
    ranks.pop(1).signal(signal.SIGKILL)
    for rank in ranks:
        assert rank.ask("await_loss") == f"rank 1 {KILLED}"
    time.sleep(0.3)
    for rank in ranks:
        assert rank.ask("threads") == 1
        rank.tell("leave")
        assert rank.hear()["threads"] == 0
        assert rank.process.wait(LONG_S) == 0
        assert rank.stderr.count("OSError: nowhere to write to") == 1


def test_the_first_cause_wins(start_job):
    ranks = start_job(3)
    enter(ranks)
    assert ranks[1].ask("fail told") is True
    cause = "rank 1 failed: ValueError: two"
    assert ranks[2].ask("await_loss") == cause
    ranks[2].tell("fail raise")
    ranks[2].hear()
    assert ranks[2].finish() == [cause]
    assert ranks[0].ask("await_loss") == cause
    ranks[0].signal(signal.SIGKILL)
    assert ranks[1].ask("check") is None
    ranks[1].tell("leave")
    assert ranks[1].finish() == []


def test_collecting_names_who_is_missing_lost_or_gone(start_job):
    for end, error, message in (
        (None, "DeadlineError", "ranks 0, 1 and 2 said nothing on nothing within 0.2 s"),
        (signal.SIGKILL, "RunError", f"rank 2 {KILLED}"),
        ("leave", "RunError", "rank 2 ended without a word on nothing"),
    ):
        ranks = start_job(3, job=str(end))
        enter(ranks)
        if end == "leave":
            ranks[2].tell("leave")
        elif end is not None:
            ranks[2].signal(end)
        ranks[0].tell("collect 0.2" if end is None else f"collect {LONG_S}")
        assert ranks[0].hear() == {"error": error, "message": message}


def test_with_a_token_other_options_and_other_sizes_are_refused_everywhere(start):
    for change, number, message in (
        ({"fingerprint": "b"}, 1, "rank 1 was started with other options than rank 0"),
        ({"world_size": 4}, 2, "rank 2 was started as one of 4 ranks, rank 0 as one of 3"),
        ({"rank": 1}, 2, "two processes say that they are rank 1; is --rank given twice"),
    ):
        port = free_port()
        common = {"world_size": 3, "port": port, "fingerprint": "a"}
        options = [{**common, "rank": rank} for rank in range(3)]
        options[number].update(change)
        ranks = [start({TOKEN_VARIABLE: "secret"}, **one) for one in options]
        for rank in ranks:
            assert rank.hear() == {"loaded": True}
        ranks.append(ranks.pop(number))  # it comes last, so that all others are there
        enter(ranks[:2], fails=True)
        time.sleep(0.3)
        enter(ranks[2:], fails=True)
        answers = [rank.hear() for rank in ranks]
        assert {answer["error"] for answer in answers[::2]} == {"RunError"}
        assert all(answer["message"].startswith(message) for answer in answers[::2]), answers


@pytest.mark.parametrize(
    ("change", "told", "short"),
    [
        (
            {"fingerprint": "b"},
            "with other options than rank 0; all ranks need the same",
            "with other options",
        ),
        ({"world_size": 3}, "as one of 3 ranks, rank 0 as one of 2", "of 3 ranks"),
    ],
)
def test_without_a_token_other_options_are_turned_away_and_named(start, change, told, short):
    port = free_port()
    common = {"world_size": 2, "port": port, "timeout_s": 3}
    ranks = [start({}, **common, rank=0), start({}, **{**common, **change}, rank=1)]
    for rank in ranks:
        assert rank.hear() == {"loaded": True}
    enter(ranks, fails=True)
    assert ranks[1].hear() == {"error": "RunError", "message": f"rank 1 was started {told}"}
    assert ranks[0].hear() == {
        "error": "DeadlineError",
        "message": "rank 1 did not arrive within 3 s (--comm-timeout); "
        f"a rank 1 {short} was turned away",
    }
    assert [rank.finish() for rank in ranks] == [[], []]


def test_without_a_token_nobody_else_ends_the_job(start):
    port = free_port()
    ranks = [start({}, rank=rank, world_size=2, port=port) for rank in range(2)]
    for rank in ranks:
        assert rank.hear() == {"loaded": True}
    enter(ranks[:1], fails=True)
    for change in ({"fingerprint": "b"}, {"world_size": 3}, {"rank": 2, "world_size": 3}):
        channel = connect_to(port)
        channel.send(make_hello(**{**change, "patience_s": 0}))
        answer = channel.wait(soon())
        assert answer is not None
        assert answer["type"] == "aborted"
        channel.close()
    for change in (
        {"patience_s": 10**400},
        {"patience_s": float("nan")},
        {"patience_s": float("inf")},
        {"patience_s": -1},
        {"patience_s": True},
        {"world_size": 10**400},
        {"rank": 10**400, "world_size": 10**401},
        {"rank": True},
    ):
        channel = connect_to(port)
        channel.send(make_hello(**change))
        assert channel.wait(soon()) is None
        assert channel.is_closed, change
        channel.close()
    enter(ranks[1:], fails=True)
    for rank in ranks:
        assert rank.hear() == {"joined": True}
        rank.tell("leave")
    assert [rank.finish() for rank in ranks] == [[], []]


def stop_with(rank: Process, happening: Callable[[], Any]) -> None:
    """SIGTERM and something else, which the rank learns of at once."""
    time.sleep(0.2)  # it is to wait, and not to be about to
    rank.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, rank.process.pid, os.WSTOPPED | os.WNOWAIT)
    rank.signal(signal.SIGTERM)
    happening()
    rank.signal(signal.SIGCONT)


STOPPED = {"error": "Interrupted", "message": "Stopped by SIGTERM."}


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (None, STOPPED),
        ({}, {"error": "RunError", "message": f"rank 0 {KILLED}"}),
        (
            {"reason": f"rank 2 {KILLED}", "exit_code": 1},
            {"error": "RunError", "message": f"rank 2 {KILLED}"},
        ),
        ({"reason": "rank 0 was stopped by SIGTERM", "exit_code": 143}, STOPPED),
    ],
)
def test_a_rank_that_is_stopped_while_it_waits_names_the_cause(start, end, expected):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LONG_S)
        rank = start({}, rank=1, world_size=3, port=server.getsockname()[1])
        assert rank.hear() == {"loaded": True}
        enter([rank], fails=True)
        channel = Channel(server.accept()[0])
        assert (channel.wait(soon()) or {})["type"] == "hello"
        channel.send({"type": "welcome"})
        assert channel.wait(soon()) == {"type": "ready"}

        def happen() -> None:
            if end:
                channel.send({"type": "aborted", "is_late": False, **end})
            if end is not None:
                channel.close()

        stop_with(rank, happen)
        assert rank.hear() == expected
        if end is None:
            told = {"type": "fail", "reason": "was stopped by SIGTERM", "exit_code": 143}
            assert channel.wait(soon()) == told
            channel.close()
        assert rank.finish() == []


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (None, STOPPED),
        ({}, {"error": "RunError", "message": f"rank 1 {KILLED}"}),
        (
            {"reason": "failed: no room", "exit_code": 1},
            {"error": "RunError", "message": "rank 1 failed: no room"},
        ),
        ({"reason": "was stopped by SIGTERM", "exit_code": 143}, STOPPED),
    ],
)
def test_rank_0_that_is_stopped_while_it_waits_names_the_cause(start, end, expected):
    port = free_port()
    rank = start({}, rank=0, world_size=3, port=port)
    assert rank.hear() == {"loaded": True}
    enter([rank], fails=True)
    channel = connect_to(port)
    channel.send(make_hello(world_size=3))
    assert channel.wait(soon()) == {"type": "welcome"}
    channel.send({"type": "ready"})

    def happen() -> None:
        if end:
            channel.send({"type": "fail", **end})
        if end is not None:
            channel.close()

    stop_with(rank, happen)
    assert rank.hear() == expected
    if end is None:
        told = channel.wait(soon()) or {}
        assert (told["reason"], told["exit_code"]) == ("rank 0 was stopped by SIGTERM", 143)
        channel.close()
    assert rank.finish() == []


def test_a_port_in_use_is_an_error_of_the_option(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        rank = start({}, rank=0, world_size=2, port=taken.getsockname()[1])
        rank.hear()
        rank.tell("enter")
        answer = rank.hear()
    assert answer["error"] == "ConfigError"
    assert "--port: rank 0 cannot listen at 127.0.0.1:" in answer["message"]


def test_strangers_do_not_disturb(start_job, folder):
    ranks = start_job(2)
    enter(ranks[:1], fails=True)
    address = wait_for_address(folder)
    with socket.create_connection((address.host, address.port)) as silent:
        hello = {"type": "hello", "rank": 1, "world_size": 9, "fingerprint": "", "process": "x"}
        hello |= {"patience_s": 0, "token": "\udc80"}
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[" * 4000 + b"\n",
            b"x" * 100_000,
            b"\xff\n",
            json.dumps(hello).encode() + b"\n",
        ):
            with socket.create_connection((address.host, address.port)) as stranger:
                stranger.settimeout(LONG_S)
                stranger.sendall(garbage)
                with suppress(ConnectionResetError):  # shown out before it had said everything
                    assert stranger.recv(100) == b""
        ranks[1].tell("enter")
        for rank in ranks:
            assert rank.hear() == {"joined": True}
        assert silent.recv(100) == b""
    for rank in ranks:
        rank.tell("leave")
        assert rank.finish() == []


def test_a_stale_address_is_read_again(start_job, folder):
    job = folder / f"flexbench-{os.getuid()}-test-job"
    job.mkdir(mode=0o700)
    with socket.create_server(("127.0.0.1", 0)) as server:
        stale = Address("127.0.0.1", server.getsockname()[1], "old")
        (job / "address").write_text(json.dumps(vars(stale)))
        ranks = start_job(2)
        enter(ranks[1:], fails=True)
        # Another program answers there now; then, none does.
        server.settimeout(LONG_S)
        connected, _ = server.accept()
        with connected:
            connected.sendall(b"220 welcome\r\n")
    enter(ranks[:1], fails=True)
    for rank in ranks:
        assert rank.hear() == {"joined": True}
        rank.tell("leave")
    assert [rank.finish() for rank in ranks] == [[], []]
    assert not job.exists()


@pytest.mark.parametrize("is_port_taken", [False, True])
def test_what_a_killed_rank_0_has_left_is_removed(start_job, folder, is_port_taken):
    ranks = start_job(3, missing=2, timeout_s=1.5)
    enter(ranks[:1], fails=True)
    address = wait_for_address(folder)
    ranks[0].signal(signal.SIGKILL)
    ranks[0].process.wait(LONG_S)
    assert files_in(folder) != []
    with ExitStack() as stack:
        if is_port_taken:
            stack.enter_context(socket.create_server((address.host, address.port)))
        enter(ranks[1:], fails=True)
        answer = ranks[1].hear()
    assert answer["error"] == "DeadlineError"
    assert ranks[1].finish() == []
    assert files_in(folder) == []


def test_a_welcome_rank_removes_what_a_killed_rank_0_has_left(start_job, folder):
    ranks = start_job(3, missing=2, timeout_s=5)
    enter(ranks, fails=True)
    wait_for_address(folder)
    time.sleep(0.5)
    ranks[0].signal(signal.SIGKILL)
    # On a loaded machine it may not have been welcome yet.
    assert ranks[1].hear()["error"] in ("RunError", "DeadlineError")
    assert ranks[1].finish() == []
    assert files_in(folder) == []


def test_interrupted_while_it_waits_rank_0_leaves_nothing(start_job, folder):
    ranks = start_job(3, missing=2)
    enter(ranks, fails=True)
    wait_for_address(folder)
    time.sleep(0.3)
    ranks[0].signal(signal.SIGINT)
    assert ranks[0].hear()["error"] == "KeyboardInterrupt"
    assert ranks[0].finish() == []
    assert files_in(folder) == []
    ranks[1].signal(signal.SIGINT)  # it may have been too late to hear of rank 0
    assert ranks[1].hear()["error"] in ("RunError", "KeyboardInterrupt")


def test_a_rank_lost_while_others_are_missing_ends_the_waiting(start_job, folder):
    ranks = start_job(3, missing=2)
    enter(ranks[:1], fails=True)
    address = wait_for_address(folder)
    hello = {"type": "hello", "rank": 1, "world_size": 3, "token": address.token}
    hello |= {"fingerprint": hashlib.sha256(b"test\n").hexdigest(), "patience_s": LONG_S}
    for number, is_ready in enumerate((False, False, True)):
        channel = Channel(socket.create_connection((address.host, address.port)))
        channel.send({**hello, "process": str(number)})
        assert channel.wait(time.monotonic() + LONG_S) == {"type": "welcome"}
        if is_ready:  # without that, it has not arrived, and is free to come again
            channel.send({"type": "ready"})
        channel.close()
    assert ranks[0].hear() == {"error": "RunError", "message": f"rank 1 {KILLED}"}
    assert ranks[0].finish() == []


@pytest.mark.timing
def test_leaving_does_not_wait_for_a_callback_that_blocks(start_job):
    ranks = start_job(2, blocks_in_on_lost=True)
    enter(ranks)
    ranks[1].signal(signal.SIGKILL)
    assert ranks[0].ask("await_loss") == f"rank 1 {KILLED}"
    ranks[0].tell("leave")
    last = ranks[0].hear()
    assert last["calls"] == [f"rank 1 {KILLED}"]
    assert last["threads"] == 1
    assert last["leaving_s"] < 10
    assert ranks[0].process.wait(LONG_S) == 0


def test_a_single_rank_opens_nothing():
    threads = threading.active_count()
    watch = PeerWatch(
        detect_launch({}),
        purpose="test",
        head_ip=None,
        port=None,
        timeout_s=1,
        fingerprint="",
        on_lost=print,
    )
    with watch:
        assert threading.active_count() == threads
        watch.publish("a", 1)
        assert watch.collect("a", 0) == {0: 1}
        assert watch.share("b", [2], 0) == [2]
        assert watch.wait_for_loss(60) is None
        watch.report(ValueError("nobody hears"))
    assert watch.lost is None
    assert watch.head_host is None


def make_launch(**changes: Any) -> Launch:
    values = {"launcher": "openmpi", "rank": 0, "world_size": 2, "local_rank": 0}
    values |= {"local_world_size": 2, "job_key": "job", "store_address": None}
    return Launch(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "head_ip", "port", "option"),
    [
        ({"launcher": "options", "job_key": None}, None, None, "--port"),
        ({"launcher": "options", "job_key": None}, "127.0.0.1", None, "--port"),
        ({"local_world_size": 1}, None, None, "--head-ip"),
        ({"local_world_size": 1}, None, 1234, "--head-ip"),
        ({"local_world_size": 1}, "127.0.0.1", None, "--head-ip"),
        *(
            ({}, host, 1234, "--head-ip")
            for host in (
                "0.0.0.0",
                "0",
                "0.0",
                "0x0",
                "::",
                "::0",
                "::ffff:0.0.0.0",
                "*",
                "",
                "a..b",
            )
        ),
        ({}, None, 0, "--port"),
        ({}, None, 65536, "--port"),
    ],
)
def test_options_that_do_not_tell_where_to_meet(changes, head_ip, port, option):
    with pytest.raises(ConfigError) as raised:
        choose_meeting_point(
            make_launch(**changes), purpose="test", head_ip=head_ip, port=port, timeout_s=1
        )
    assert raised.value.option == option


def test_a_single_rank_has_its_options_checked_too():
    with pytest.raises(ConfigError, match="--port: must be a whole number of at most 65535"):
        PeerWatch(
            detect_launch({}),
            purpose="test",
            head_ip=None,
            port=70000,
            timeout_s=1,
            fingerprint="",
            on_lost=print,
        )


@pytest.mark.parametrize("resolved", [("0.0.0.0", 7), ("::", 7, 0, 0)])
def test_a_name_of_all_interfaces_is_refused(resolved, monkeypatch):
    family = socket.AF_INET if len(resolved) == 2 else socket.AF_INET6
    found = [(family, socket.SOCK_STREAM, 6, "", resolved)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found)
    with pytest.raises(ConfigError, match="--head-ip: must be the address of one interface"):
        listen_at("everywhere.example", 7)


@pytest.mark.parametrize("host", ["0", "", "::"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_plain_process_group_is_refused_on_all_interfaces(host, rank):
    pytest.importorskip("torch", reason="the process group is torch's")
    from flexbench.dist.process_group import initialize_distributed

    with pytest.raises(ConfigError, match="--head-ip: must be the address of one interface"):
        initialize_distributed(host, 1234, 2, rank, 0, "cpu")


def test_a_group_that_the_program_has_opened_must_be_the_same(monkeypatch):
    pytest.importorskip("torch", reason="the process group is torch's")
    from flexbench.dist import process_group

    opened = types.SimpleNamespace(
        is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2
    )
    monkeypatch.setattr(process_group, "distributed", opened)
    with process_group.open_process_group(None, make_launch(rank=1), backend="gloo"):
        pass
    for other in (make_launch(rank=0), make_launch(rank=1, world_size=3), detect_launch({})):
        with (
            pytest.raises(ConfigError, match=r"--world-size: .* but rank 1 of 2 in the"),
            process_group.open_process_group(None, other, backend="gloo"),
        ):
            pass


def test_an_address_that_is_not_ours_is_an_error_of_the_option():
    point = choose_meeting_point(
        make_launch(), purpose="test", head_ip="192.0.2.77", port=1234, timeout_s=1
    )
    with pytest.raises(ConfigError, match=r"--head-ip: rank 0 cannot listen at 192\.0\.2\.77"):
        point.listen()


def test_the_folder_of_the_address_is_ours_alone(folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = folder / f"flexbench-{os.getuid()}-job"
    point = FilePoint("job", host="127.0.0.1")
    assert point.look_up() is None
    listener, token = point.listen()
    with listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE((path / "address").stat().st_mode) == 0o600
        assert listener.getsockname()[0] == "127.0.0.1"
        found = FilePoint("job", host="127.0.0.1").look_up()
        assert found == Address("127.0.0.1", listener.getsockname()[1], token)
    point.close()
    assert not path.exists()

    path.mkdir(mode=0o755)
    with pytest.raises(RunError, match="only you can use"):
        point.listen()
    path.rmdir()
    (folder / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(RunError, match="only you can use"):
        point.listen()
    assert list((folder / "elsewhere").iterdir()) == []


def test_without_a_temporary_folder_people_are_told_what_to_do(monkeypatch):
    def fail() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with pytest.raises(RunError) as raised:
        FilePoint("job", host="127.0.0.1")
    assert raised.value.message == (
        "no folder for temporary files can be written; set TMPDIR, or name a --port"
    )


def test_only_old_dead_folders_of_ours_are_removed(folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    prefix = f"flexbench-{os.getuid()}-"
    dead = json.dumps(vars(Address("127.0.0.1", free_port(), "")))

    def leave(name: str, text: str | None = dead, *, mode: int = 0o700, days: float = 2) -> Path:
        path = folder / name
        path.mkdir(mode=mode)
        if text is not None:
            (path / "address").write_text(text)
        then = time.time() - days * 86400
        os.utime(path, (then, then))
        return path

    with socket.create_server(("127.0.0.1", 0)) as server:
        alive = json.dumps(vars(Address("127.0.0.1", server.getsockname()[1], "")))
        old = leave(f"{prefix}old")
        (old / "new-abc").touch()
        os.utime(old, (0, 0))
        kept = [
            leave(f"{prefix}young", days=0.5),
            leave(f"{prefix}alive", alive),
            leave(f"{prefix}open", mode=0o755),
            leave(f"{prefix}none", "[]"),
            leave(f"{prefix}port", json.dumps({"host": "127.0.0.1", "port": 10**9, "token": ""})),
            leave(f"flexbench-{os.getuid() + 1}-other"),
            leave("elsewhere"),
        ]
        (folder / f"{prefix}link").symlink_to(folder / "elsewhere")
        foreign = leave(f"{prefix}foreign")
        (foreign / "thesis").touch()
        os.utime(foreign, (0, 0))
        (folder / f"{prefix}file").touch()
        os.utime(folder / f"{prefix}file", (0, 0))
        point = FilePoint("job", host="127.0.0.1")
        point.listen()[0].close()
        point.close()
    assert not old.exists()
    assert all((path / "address").exists() for path in kept)
    assert (folder / f"{prefix}link").is_symlink()
    assert (foreign / "thesis").exists()
    assert (folder / f"{prefix}file").exists()


def test_a_goodbye_arrives_before_the_connection_closes():
    left, right = socket.socketpair()
    near, far = Channel(left), Channel(right)
    far.trust()
    far.send({"type": "unread"})
    near.send({"type": "value", "value": "x" * 3_000_000})
    near.send({"type": "bye"})
    thread = threading.Thread(target=close_politely, args=([near],))
    thread.start()
    expires_at = time.monotonic() + LONG_S
    received = [far.wait(expires_at), far.wait(expires_at), far.wait(expires_at)]
    far.close()
    thread.join()
    assert [message and message["type"] for message in received] == ["value", "bye", None]


def test_a_process_group_on_loopback_and_its_end_by_a_killed_rank(start_job):
    pytest.importorskip("torch", reason="the process group is torch's")
    ranks = start_job(4, torch=True)
    enter(ranks)
    for rank in ranks:
        rank.tell("group ring")
    for number, rank in enumerate(ranks):
        assert rank.hear() == {"interface": "lo"}
        assert rank.hear() == {"received": (number - 1) % 4, "listening": ["127.0.0.1"]}
        assert rank.hear() == {"interface": None}
    port = free_port()
    for rank in ranks:
        rank.tell(f"plain_group {port}")
    for number, rank in enumerate(ranks):
        assert rank.hear() == {"received": (number - 1) % 4, "listening": ["127.0.0.1"]}
    for rank in ranks:
        rank.tell("group 1")  # all others wait for a tensor of rank 1, and get an error of gloo
    for rank in ranks:
        assert rank.hear()["interface"] == "lo"
    ranks.pop(1).signal(signal.SIGKILL)
    for rank in ranks:
        assert rank.hear() == {"error": "RunError", "message": f"rank 1 {KILLED}"}
        assert rank.finish() == [f"rank 1 {KILLED}"]


def test_a_failure_in_a_process_group_is_told_before_its_connections_close(start_job):
    pytest.importorskip("torch", reason="the process group is torch's")
    ranks = start_job(2, torch=True)
    enter(ranks)
    for rank in ranks:
        rank.tell("group 0")
    for rank in ranks:
        assert rank.hear() == {"interface": "lo"}
    ranks[0].tell("fail raise")
    message = "rank 0 failed: ValueError: no such block"
    assert ranks[1].hear() == {"error": "RunError", "message": message}
    assert ranks[1].finish() == [message]
    assert ranks[0].hear()["error"] == "ValueError"
    assert ranks[0].finish() == []


def test_several_hosts_meet_in_the_store_of_torchrun(start):
    distributed = pytest.importorskip("torch.distributed", reason="the store is torch's")
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ranks = [start({**environ, "RANK": str(rank)}, head_ip="127.0.0.1") for rank in range(2)]
    without = start({**environ, "RANK": "0", "TORCHELASTIC_RESTART_COUNT": "1"})
    for rank in (*ranks, without):
        assert rank.hear() == {"loaded": True}
    enter(ranks)
    for rank in ranks:
        rank.tell("leave")
        assert rank.finish() == []
    without.tell("enter")
    assert "--head-ip: is needed: MASTER_ADDR" in without.hear()["message"]
