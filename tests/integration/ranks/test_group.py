"""Groups of ranks: as threads where that suffices, as processes where one is to die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexbench.core.errors import ConfigError, DeadlineError, FlexbenchError, Interrupted, RunError
from flexbench.ranks.clocks import OWN_CLOCK
from flexbench.ranks.group import Group, open_ranks
from flexbench.ranks.launch import Launch, detect_launch
from flexbench.ranks.links import Link, LinkClosedError, _Reception, _visit
from flexbench.ranks.meeting_points import Address, listen_at

LONG_S = 60  # on a loaded machine, what takes a moment may take this long
ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).parent / "group_rank.py"
MPIRUN = Path(sys.executable).with_name("mpirun")
KILLED = "was killed, or lost its connection"
SKEW_NS = 5 * 10**9


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fbt-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def launch_of(rank: int, size: int) -> Launch:
    return Launch(
        launcher="openmpi",
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_world_size=size,
        job_key="job",
        store_address=None,
    )


def open_group(rank: int, size: int, **changed: Any) -> Any:
    options = {"purpose": "test", "head_ip": None, "port": None, "fingerprint": ""}
    return open_ranks(launch_of(rank, size), timeout_s=LONG_S, **{**options, **changed})


def run_ranks(size: int, act: Callable[[Group], Any], **changed: Any) -> list[Any]:
    """What `act` returned, or raised, on every rank: threads whose clocks are 5 s apart."""

    def run(rank: int) -> Any:
        try:
            clock = lambda: time.monotonic_ns() + SKEW_NS * rank  # noqa: E731
            with open_group(rank, size, **{"clock": clock, **changed}) as group:
                return act(group)
        except (FlexbenchError, ValueError) as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return [future.result(LONG_S) for future in [pool.submit(run, r) for r in range(size)]]


# --- clocks ------------------------------------------------------------------------------------


@pytest.mark.timing
def test_clocks_that_differ_are_told_apart(folder):
    def act(group: Group) -> Any:
        return [(c.offset_ns(0), c.readings[0].bound_ns, c.is_same) for c in group.clocks]

    found = run_ranks(3, act)
    assert found[1] == found[2] == found[0]
    assert found[0][0] == (0, 0, True)
    for rank in (1, 2):
        offset, bound, is_same = found[0][rank]
        assert not is_same  # though the host is the same
        assert 0 < bound < 10**8
        assert abs(offset - SKEW_NS * rank) <= bound
    assert list(folder.iterdir()) == []


def test_the_clock_of_the_same_host_is_known_to_be_the_same(folder):
    def act(group: Group) -> Any:
        moment = group.start_together(0.01)
        return moment, [(c.is_same, c.bound_ns(0, moment)) for c in group.clocks]

    found = run_ranks(3, act, clock=time.monotonic_ns)
    assert found[0][1] == [(True, 0)] * 3
    assert found[1] == found[2] == found[0]


def test_all_start_at_the_same_moment(folder):
    def act(group: Group) -> tuple[int, int, int]:
        asked_ns = time.monotonic_ns()
        if group.rank == 1:
            time.sleep(0.2)  # the last to be ready
        moment = group.start_together(0.1) - SKEW_NS * group.rank
        return moment, asked_ns, group.clocks[group.rank].readings[-1].bound_ns

    found = run_ranks(3, act)
    moments = [moment for moment, _, _ in found]
    for moment, _, bound in found:
        assert abs(moment - moments[0]) <= bound
    assert moments[0] - found[0][1] >= 0.3e9 - found[1][2]


def test_a_drifting_clock_is_followed(folder):
    began_ns = time.monotonic_ns()

    def act(group: Group) -> Any:
        moment = None
        if group.rank == 1:
            moment = (clock_of_1(), time.monotonic_ns())
        time.sleep(0.3)
        group.synchronize()
        own = group.gather("moment", moment)
        return own, group.clocks[1]

    def clock_of_1() -> int:
        now = time.monotonic_ns()
        return now + SKEW_NS + (now - began_ns) // 10  # a tenth too fast

    def run(rank: int) -> Any:
        clock = clock_of_1 if rank else time.monotonic_ns
        with open_group(rank, 2, clock=clock) as group:
            return act(group)

    with ThreadPoolExecutor(2) as pool:
        (gathered, clock), _ = pool.map(run, range(2))
    seen_by_1, true = gathered[1]
    assert abs(clock.to_head(seen_by_1) - true) <= clock.bound_ns(seen_by_1, seen_by_1)
    first, last = clock.readings
    # 1/11 of its own time, give or take the bounds of both readings.
    error = (first.bound_ns + last.bound_ns) / (last.at_ns - first.at_ns) * 1e6
    assert abs(clock.drift_ppm - 1e6 / 11) <= error + 1


# --- values ------------------------------------------------------------------------------------


def test_values_large_and_small(folder):
    size = 24 * 2**20

    def act(group: Group) -> Any:
        said = group.broadcast("next", {"rate": 2.5} if group.rank == 0 else None)
        gathered = group.gather_bytes("traces", bytes([65 + group.rank]) * size * group.rank)
        empty = group.gather_bytes("nothing", b"")
        return said, gathered, empty, group.gather("rank", group.rank)

    head, one, two = run_ranks(3, act)
    assert head[0] == one[0] == two[0] == {"rate": 2.5}
    assert head[1] == [b"", b"B" * size, b"C" * 2 * size]
    assert head[2:] == ([b"", b"", b""], [0, 1, 2])
    assert one[1:] == two[1:] == (None, None, None)


def test_posted_values_are_there_without_waiting(folder):
    def act(group: Group) -> Any:
        assert group.posted("count") == {}
        group.barrier("empty")
        if group.rank > 0:
            group.post("count", group.rank * 10)
            group.post("count", group.rank * 10 + 1)
        group.barrier("sent")  # over the same connections: what was sent before is there
        counts = group.posted("count")
        assert group.posted("count") == {}
        if group.rank == 0:
            group.post("stop", "too many errors")
        group.barrier("told")
        return counts, group.posted("stop")

    head, one, two = run_ranks(3, act)
    assert head == ({1: [10, 11], 2: [20, 21]}, {})
    assert one == two == ({}, {0: ["too many errors"]})


@pytest.mark.timing
def test_a_single_process_opens_nothing():
    threads = threading.active_count()
    sockets = len(psutil.Process().net_connections())
    with open_ranks(
        detect_launch({}), purpose="test", head_ip=None, port=None, timeout_s=1, fingerprint=""
    ) as group:
        before_ns = time.monotonic_ns()
        moment_ns = group.start_together(0.25)
        assert 0.25e9 <= moment_ns - before_ns < 5e9
        assert (threading.active_count(), len(psutil.Process().net_connections())) == (
            threads,
            sockets,
        )
        assert group.broadcast("a", [1]) == [1]
        assert group.gather("b", 2) == [2]
        assert group.gather_bytes("c", b"3") == [b"3"]
        group.barrier("d")
        group.synchronize()
        group.post("e", 4)
        assert group.posted("e") == {}
        group.check()
        assert (group.rank, group.size, group.clocks) == (0, 1, [OWN_CLOCK])


def test_a_single_process_is_stopped_as_well():
    def stop() -> None:
        raise Interrupted(signal.SIGTERM)

    with (
        pytest.raises(Interrupted, match="SIGTERM"),
        open_group(0, 1, raise_if_stopped=stop) as group,
    ):
        group.check()


def test_ranks_that_do_different_things_are_told(folder):
    found = run_ranks(2, lambda group: group.gather_bytes(f"of rank {group.rank}", b"x"))
    assert isinstance(found[0], RunError)
    assert found[0].message == "rank 1 sent 'data: of rank 1' where data: of rank 0 was due"
    assert found[1] is None  # what it had to send has been taken


def test_other_options_end_all(folder):
    def run(rank: int) -> str:
        with (
            pytest.raises(RunError) as raised,
            open_group(rank, 2, fingerprint=str(rank)),
        ):
            pass
        return raised.value.message

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(run, range(2))) == {
            "rank 1 was started with other options than rank 0; all ranks need the same"
        }


def test_options_that_do_not_suffice():
    with (
        pytest.raises(ConfigError, match="--port: is needed"),
        open_ranks(
            detect_launch({}, rank=0, world_size=2),
            purpose="test",
            head_ip=None,
            port=None,
            timeout_s=1,
            fingerprint="",
        ),
    ):
        pass


# --- connections for data ----------------------------------------------------------------------


def test_strangers_get_no_link(folder):
    with listen_at("127.0.0.1", 0) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1], "secret")
        hello = {"rank": 1, "token": "secret", "identity": "i"}
        wrong = [
            b"GET / HTTP/1.1\r\n\r\n",
            b"x" * 5000,
            json.dumps(hello | {"token": "secre\ud800"}).encode() + b"\n",
            json.dumps(hello | {"token": None}).encode() + b"\n",
            json.dumps(hello | {"rank": 0}).encode() + b"\n",
            json.dumps(hello | {"rank": 2}).encode() + b"\n",
            json.dumps(hello | {"rank": True}).encode() + b"\n",
            json.dumps(hello | {"identity": 3}).encode() + b"\n",
        ]
        reception = _Reception(listener, address, 2, LONG_S, lambda: None)
        with ThreadPoolExecutor(2) as pool, socket.create_connection(listener.getsockname()):
            links = pool.submit(reception.receive_all)
            for text in wrong:
                with socket.create_connection(listener.getsockname()) as stranger:
                    stranger.settimeout(LONG_S)
                    stranger.sendall(text)
                    with suppress(ConnectionResetError):  # it had not said everything
                        assert stranger.recv(1) == b""
            visitor = pool.submit(_visit, address, 1, "i", LONG_S, lambda: None)
            mine, theirs = visitor.result(LONG_S), links.result(LONG_S)[1]
    theirs.send("data", b"abc")
    assert mine.receive("data", LONG_S) == b"abc"
    assert reception.identities == {1: "i"}
    theirs.close()
    with pytest.raises(LinkClosedError):
        mine.receive("data", LONG_S)
    mine.close()


def test_who_opens_no_link_is_named():
    with listen_at("127.0.0.1", 0) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1], "secret")
        with pytest.raises(DeadlineError) as raised:
            _Reception(listener, address, 3, 0.1, lambda: None).receive_all()
    assert raised.value.message == (
        f"ranks 1 and 2 opened no connection for data to {address} within 0.1 s (--comm-timeout)"
    )
    with pytest.raises(RunError, match="rank 1 cannot reach rank 0 for data at 127") as refused:
        _visit(address, 1, "i", LONG_S, lambda: None)
    assert "Connection refused" in refused.value.message


def test_a_frame_that_stalls():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        right = socket.create_connection(listener.getsockname())
        link = Link(listener.accept()[0], peer=1, stall_s=0.1, check=lambda: None)
    with pytest.raises(DeadlineError, match=r"rank 1 has not answered for 0\.2 s"):
        link.receive("data", 0.2)
    right.sendall(b"\x00\x04\x00\x00\x00\x00\x00\x00\x00\x05dataab")
    with pytest.raises(DeadlineError, match=r"rank 1 has not answered for 0\.1 s"):
        link.receive("data", LONG_S)
    right.close()
    link.close()


# --- processes ---------------------------------------------------------------------------------


def torchrun(rank: int) -> dict[str, object]:
    variables = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    variables |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return variables | {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 3}


def slurm(rank: int) -> dict[str, object]:
    variables = {"SLURM_JOB_ID": 815, "SLURM_STEP_ID": 0, "SLURM_STEP_TASKS_PER_NODE": "3"}
    variables |= {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 3}
    return variables | {"SLURM_LOCALID": rank, "SLURM_NODEID": 0}


def start_processes(folder: Path, variables: Any, **options: Any) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(PROGRAM), json.dumps(options)],
            env={
                **os.environ,
                **{name: str(value) for name, value in variables(rank).items()},
                "TMPDIR": str(folder),
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    started: list[subprocess.Popen[str]] = []

    def start_all(variables: Any = slurm, **options: Any) -> list[subprocess.Popen[str]]:
        started.extend(start_processes(folder, variables, **{"timeout_s": LONG_S, **options}))
        return started

    yield start_all
    for process in started:
        process.kill()
        process.communicate(timeout=LONG_S)


def answers(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def assert_stepped(said: list[dict[str, Any]], size: int) -> None:
    """What `step` of the program says on all ranks together, in whatever order."""
    of = {rank: [line for line in said if line["rank"] == rank] for rank in range(size)}
    for point in ("a", "b"):
        (gathered,) = (line["gathered"] for line in of[0] if line.get("point") == point)
        assert gathered == [f"{point}{rank}" for rank in range(size)]
    moments = of[0][-1]["moments"]
    assert len(moments) == 2
    assert moments[1] - moments[0] >= 0.05e9
    for rank in range(1, size):
        last = of[rank][-1]
        assert not last["is_same"]
        assert abs(last["offset_ns"] - SKEW_NS * rank) <= last["bound_ns"] < 10**8
        # Each start is as far off as its reading's bound, of which only the last is told.
        assert all(abs(a - b) < 10**8 for a, b in zip(last["moments"], moments, strict=True))
        assert last["num_readings"] == 5  # at first, and before and after each point
        assert last["listening"] == []


@pytest.mark.parametrize("variables", [torchrun, slurm])
def test_variables_of_a_launcher(start, folder, variables):
    said = []
    for process in start(variables, skew_s=5):
        said += answers(process.communicate(timeout=LONG_S)[0])
        assert process.returncode == 0
    assert_stepped(said, 3)
    assert list(folder.iterdir()) == []


@pytest.mark.mpi
@pytest.mark.skipif(not MPIRUN.exists(), reason="there is no mpirun beside this Python")
@pytest.mark.parametrize("size", [2, 3])
def test_mpirun(folder, monkeypatch, size):
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = json.dumps({"timeout_s": LONG_S, "skew_s": 5})
    ended = subprocess.run(
        [str(MPIRUN), "--oversubscribe", "-np", str(size), sys.executable, str(PROGRAM), options],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert_stepped(answers(ended.stdout.replace("\r", "")), size)
    assert [path for path in folder.iterdir() if not path.name.startswith("ompi.")] == []


@pytest.mark.parametrize(
    ("ending", "where", "message"),
    [
        ("kill", "bytes", f"rank 2 {KILLED}"),
        ("kill", "busy", f"rank 2 {KILLED}"),
        ("raise", "start", "rank 2 failed: ValueError: no such prompt"),
        ("leave", "bytes", "rank 2 closed its connection for data"),
        ("freeze", "bytes", "rank 2 has not answered for 3 s (--comm-timeout)"),
    ],
)
@pytest.mark.timing
def test_a_lost_rank_ends_the_others_with_what_was_gathered_kept(start, ending, where, message):
    began_at = time.monotonic()
    processes = start(ending=ending, where=where, timeout_s=3 if ending == "freeze" else LONG_S)
    others = [answers(process.communicate(timeout=LONG_S)[0]) for process in processes[:2]]
    assert time.monotonic() - began_at < LONG_S / 2
    assert others[0][0] == {"rank": 0, "gathered": ["1", "1", "1"]}
    assert others[0][1] == {"rank": 0, "error": "RunError", "message": message, "code": 1}
    if ending == "leave":  # then it is rank 0 that has failed
        message = f"rank 0 failed: {message}"
    assert others[1][1:] == [{"rank": 1, "error": "RunError", "message": message, "code": 1}]


@pytest.mark.timing
def test_a_signal_stops_all_within_a_moment(start):
    processes = start(waits=True)
    for process in processes:
        assert process.stdout is not None
        assert "waits" in json.loads(process.stdout.readline())
    processes[0].send_signal(signal.SIGTERM)
    sent_at = time.monotonic()
    said = [answers(process.communicate(timeout=LONG_S)[0]) for process in processes]
    assert time.monotonic() - sent_at < 10
    assert said[0] == [
        {"rank": 0, "error": "Interrupted", "message": "Stopped by SIGTERM.", "code": 143}
    ]
    for rank in (1, 2):
        (last,) = said[rank]
        assert last["message"] == "rank 0 was stopped by SIGTERM"
        assert (last["error"], last["code"]) == ("Interrupted", 143)
