"""`flexbench dist` as several processes: that it works, and how it ends when one of them does not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="flexbench dist needs torch")

from tests.integration.conftest import FLEXBENCH
from tests.integration.dist.conftest import (
    LONG_S,
    MPIRUN,
    Hand,
    Job,
    Rank,
    free_port,
    mpirun,
    records_in,
    set_variables,
    tokens_in,
    write_config,
    write_model,
)

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not MPIRUN.exists(), reason="there is no mpirun beside this Python"),
]

SHORT = ("--prompt-len", 16, "--gen-len", 8)
# The number of prompts is that of the blocks under way, which by default is that of ranks.
COMPARABLE = (*SHORT, "--num-inner-iterations", 2, "--verbose", 2)
SAMPLED = ("--do-sample", "--temperature", 1.5, "--seed", 5)
# Everywhere, so that all that may be left behind would be.
MIXED = ("--percent", 40, 30, 40, 30, 40, 30)
KILLED = "was killed, or lost its connection"
TIMEOUT_S = 3
# After the time-out, a rank that cannot end by itself gets three seconds; and machines are slow.
IN_TIME_S = TIMEOUT_S + 3 + 12
AT_ONCE = 5


def assert_is_shown_once(output: str, num_stages: int) -> None:
    """The tables of rank 0, and nothing of any other rank."""
    lines = output.replace("\r", "").splitlines()
    for heading in ("Placement of tiny", "Seconds of each stage", "Peak memory", "Added to"):
        assert sum(heading in line for line in lines) == 1, output
    assert sum(line.split()[1:2] == ["weights"] for line in lines) == num_stages
    start = next(index for index, line in enumerate(lines) if "Seconds of each stage" in line)
    rows = [line.split()[0] for line in lines[start:] if re.match(r" +\d+ +\d+-\d+ ", line)]
    assert rows == [str(stage) for stage in range(num_stages)]
    assert max(map(len, lines)) <= 80


def assert_is_kept(record: dict[str, Any], num_stages: int, launcher: str) -> None:
    assert (record["status"], record["launcher"]) == ("ok", launcher)
    assert record["run"]["num_pipeline_stages"] == num_stages
    assert [stage["rank"] for stage in record["stages"]] == list(range(num_stages))
    ranges = [stage["layers"] for stage in record["stages"]]
    assert ranges == [stage["layers"] for stage in record["placement"]]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 4
    assert all(one[1] == other[0] for one, other in pairwise(ranges))
    figures = record["figures"]
    assert figures["total_latency"] == pytest.approx(
        figures["prefill_latency"] + figures["decode_latency"]
    )
    assert figures["total_tokens"] == record["run"]["num_prompts"] * record["run"]["gen_len"]
    assert 0 <= figures["bubble_fraction"] < 1


@pytest.fixture(scope="module")
def expected(_loaded: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokens of a single process: without options, and sampled."""
    found = {}
    for sampled in ((), SAMPLED):
        folder = tmp_path_factory.mktemp("alone")
        with Hand(folder, folder) as hand:
            (rank,) = hand.start_all(1, "--model", tiny, *COMPARABLE, *sampled)
            assert rank.finish() == 0, rank.stderr
            found[sampled] = tokens_in(rank.stdout)
    for tokens in found.values():
        assert len({token for prompt in tokens.values() for token in prompt}) > 3
        assert len(set(map(tuple, tokens.values()))) == 2
    assert found[()] != found[SAMPLED]
    return found


# --- it works ----------------------------------------------------------------------------------


def test_mpirun_shows_and_keeps_everything_once(launch, tiny, tmp_path, expected):
    job = launch(*mpirun(2, "--model", tiny, *COMPARABLE, *MIXED, "--use-mpi"))
    assert job.finish(LONG_S) == 0, job.stderr
    assert_is_shown_once(job.stdout, 2)
    assert tokens_in(job.stdout.replace("\r", "")) == expected[()]
    for phase in ("Waiting for 2 ranks", "Loading weights", "Warm-up", "Run"):
        assert job.stderr.count(f"{phase}: done in") == 1
    (record,) = records_in(tmp_path)
    assert_is_kept(record, 2, "openmpi")
    rows = (tmp_path / "results" / "dist.tsv").read_text().splitlines()
    assert [row.split("\t")[2] for row in rows] == ["num_processes", "2"]
    assert len(list((tmp_path / "results").glob("*.log"))) == 1
    job.assert_nothing_left()
    assert job.temporary_files() == []


@pytest.mark.parametrize("sampled", [(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("how", [(), ("--async-comm",)], ids=["sync", "async"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_tokens_do_not_depend_on_the_ranks(hand, world_size, how, sampled, tiny, expected):
    ranks = hand.start_all(world_size, "--model", tiny, *COMPARABLE, *MIXED, *how, *sampled)
    assert [rank.finish() for rank in ranks] == [0] * world_size, ranks[0].stderr
    assert tokens_in(ranks[0].stdout) == expected[sampled]
    assert [rank.stdout + rank.stderr for rank in ranks[1:]] == [""] * (world_size - 1)
    (record,) = records_in(hand.folder)
    assert_is_kept(record, world_size, "options")
    assert hand.temporary_files() == []


def test_two_jobs_side_by_side_with_more_ranks_than_cores(launch, tiny, tmp_path, expected):
    """They have the folder for temporary files in common."""
    options = {2: (), 3: (*SAMPLED, "--async-comm")}
    jobs = {
        num_ranks: launch(
            *mpirun(num_ranks, "--model", tiny, *COMPARABLE, *different), folder=str(num_ranks)
        )
        for num_ranks, different in options.items()
    }
    for num_ranks, job in jobs.items():
        assert job.finish(LONG_S) == 0, job.stderr
        assert_is_shown_once(job.stdout, num_ranks)
        sampled = SAMPLED if num_ranks == 3 else ()
        assert tokens_in(job.stdout.replace("\r", "")) == expected[sampled]
        (record,) = records_in(tmp_path / str(num_ranks))
        assert_is_kept(record, num_ranks, "openmpi")
        job.assert_nothing_left()
    # Of either one: while the other runs, its address is there.
    assert all(job.temporary_files() == [] for job in jobs.values())


def test_torchrun(launch, tiny, tmp_path, expected):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    job = launch(
        *torchrun, "--nproc-per-node", 2, "-m", "flexbench", "dist", "--model", tiny, *COMPARABLE
    )
    assert job.finish(LONG_S) == 0, job.stderr
    assert_is_shown_once(job.stdout, 2)
    assert tokens_in(job.stdout) == expected[()]
    (record,) = records_in(tmp_path)
    assert_is_kept(record, 2, "torchrun")
    job.assert_nothing_left()


def test_real_processes_by_hand(launch, tiny, tmp_path, expected):
    """As a person does it, in two terminals."""
    place = (*FLEXBENCH, "dist", "--world-size", 2, "--port", free_port())
    # Each in a folder of its own, as on hosts without a common disk.
    jobs = [
        launch(*place, "--rank", rank, "--model", tiny, *COMPARABLE, folder=f"rank-{rank}")
        for rank in (1, 0)
    ]
    assert [job.finish(LONG_S) for job in jobs] == [0, 0], [job.stderr for job in jobs]
    assert_is_shown_once(jobs[1].stdout, 2)
    assert tokens_in(jobs[1].stdout) == expected[()]
    assert (jobs[0].stdout, jobs[0].stderr) == ("", "")
    assert records_in(tmp_path / "rank-1") == []
    assert_is_kept(records_in(tmp_path / "rank-0")[0], 2, "options")
    assert not (tmp_path / "rank-1" / "results").exists()


def hydra(rank: int) -> dict[str, object]:
    """What MPICH's and Intel's mpirun set, whose package cannot be beside Open MPI's."""
    return {"PMI_RANK": rank, "PMI_SIZE": 2, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 2}


def slurm(rank: int, *, tasks_per_node: str = "2", node: int = 0, step: int = 0) -> dict[str, Any]:
    """What srun sets."""
    return {
        "SLURM_JOB_ID": 815,
        "SLURM_STEP_ID": step,
        "SLURM_PROCID": rank,
        "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_LOCALID": rank if tasks_per_node == "2" else 0,
        "SLURM_NODEID": node,
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
    }


@pytest.mark.parametrize(("variables", "launcher"), [(hydra, "mpich"), (slurm, "slurm")])
def test_other_launchers_variables(variables, launcher, hand, tiny, expected):
    command = ("--model", tiny, *COMPARABLE, "--use-mpi")
    ranks = [hand.start(*command, environ=variables(rank)) for rank in range(2)]
    assert [rank.finish() for rank in ranks] == [0, 0], ranks[0].stderr
    assert_is_shown_once(ranks[0].stdout, 2)
    assert tokens_in(ranks[0].stdout) == expected[()]
    assert ranks[1].stdout == ""
    (record,) = records_in(hand.folder)
    assert_is_kept(record, 2, launcher)
    assert hand.temporary_files() == []


def test_two_steps_of_slurm_side_by_side(hand, tiny):
    """Both in one job of Slurm's, on one host."""
    ranks = [
        hand.start(
            *("--model", tiny, *SHORT, "--seed", step, "--output", f"step-{step}.tsv"),
            environ=slurm(rank, step=step),
        )
        for step, rank in product((1, 2), (0, 1))
    ]
    assert [rank.finish() for rank in ranks] == [0] * 4, [rank.stderr for rank in ranks]
    assert hand.temporary_files() == []


def test_rank_0_listens_where_it_is_told_to(hand, tmp_path):
    ranks = hand.start_all(2, *long_moment("run", tmp_path), "--head-ip", "127.0.0.2")
    ranks[0].wait_for_text("Run ...")
    # torch's store; and gloo, which takes the interface's first address.
    assert ranks[0].listening_addresses() == {"127.0.0.1", "127.0.0.2"}
    assert ranks[1].listening_addresses() == {"127.0.0.1"}


# --- several hosts -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """Two network namespaces, joined by a cable, and the addresses at its ends."""

    names: tuple[str, str]
    cables: tuple[str, str]
    addresses: tuple[str, str]


@pytest.fixture
def networks() -> Iterator[Networks]:
    """Two hosts, as far as the network goes."""
    mark = uuid.uuid4().hex[:6]
    names = (f"fbt-{mark}-0", f"fbt-{mark}-1")
    cables = (f"fbt{mark}a", f"fbt{mark}b")
    addresses = ("192.0.2.1", "192.0.2.2")
    commands = [f"ip netns add {name}" for name in names]
    commands.append(
        f"ip -n {names[0]} link add {cables[0]} type veth peer name {cables[1]} netns {names[1]}"
    )
    for name, cable, address in zip(names, cables, addresses, strict=True):
        commands.append(f"ip -n {name} address add {address}/24 dev {cable}")
        commands += [f"ip -n {name} link set {link} up" for link in (cable, "lo")]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", None) or error
                pytest.skip(f"no network namespaces here: {command}: {reason}")
        yield Networks(names, cables, addresses)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_hosts_by_hand(networks, hand, tiny, expected):
    place = ("--world-size", 2, "--head-ip", networks.addresses[0], "--port", 29500)
    ranks = [
        hand.start(*place, "--rank", rank, "--model", tiny, *COMPARABLE, namespace=name)
        for rank, name in enumerate(networks.names)
    ]
    assert [rank.finish() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    assert tokens_in(ranks[0].stdout) == expected[()]


def test_two_hosts_under_slurm_listen_on_their_own_network_alone(networks, hand, tmp_path):
    place = ("--head-ip", networks.addresses[0], "--port", 29500, *long_moment("run", tmp_path))
    ranks = [
        hand.start(*place, environ=slurm(rank, tasks_per_node="1(x2)", node=rank), namespace=name)
        for rank, name in enumerate(networks.names)
    ]
    ranks[0].wait_for_text("Run ...")
    for rank, address in zip(ranks, networks.addresses, strict=True):
        assert rank.listening_addresses() == {address}
    ranks[0].send_signal(signal.SIGKILL)
    assert ranks[1].finish() == 1
    # torch may have complained about addresses without names before.
    assert ranks[1].stderr.endswith(f"Error: rank 0 {KILLED}\n")


def test_a_cable_that_is_pulled(networks, hand, tmp_path):
    """No connection is closed then; both ends find out by the other's silence."""
    options = (*long_moment("run", tmp_path), "--comm-timeout", 2)
    place = ("--world-size", 2, "--head-ip", networks.addresses[0], "--port", 29500)
    ranks = [
        hand.start(*place, "--rank", rank, *options, namespace=name)
        for rank, name in enumerate(networks.names)
    ]
    ranks[0].wait_for_text("Run ...")
    pull = ("ip", "-n", networks.names[1], "link", "set", networks.cables[1], "down")
    subprocess.run(pull, check=True)
    for number, rank in enumerate(ranks):
        assert rank.finish() == 1
        reason = "has not answered for 2 s (--comm-timeout)"
        assert f"Error: rank {1 - number} {reason}" in rank.stderr
    assert records_in(hand.folder)[0]["status"] == "failed"


def test_several_hosts_need_an_address(hand, tiny):
    variables = slurm(0, tasks_per_node="1(x2)")
    rank = hand.start("--model", tiny, *SHORT, environ=variables)
    assert rank.finish() == 2
    assert "Error: --head-ip: is needed together with --port" in rank.stderr


# --- a rank is lost, or stopped ----------------------------------------------------------------

FIRST_LINES = {
    "waiting": "Waiting for 3 ranks ...\n",
    "loading": "Loading weights ...\n",
    "warm-up": "Warm-up ...\n",
    "run": "Run ...\n",
}
ENDINGS = {signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 143)}


def long_moment(moment: str, folder: Path) -> tuple[object, ...]:
    """Options with which that moment takes seconds or more, and files are on disk."""
    model = folder / "model"
    (folder / "offload").mkdir()
    common = (*MIXED, "--offload-dir", folder / "offload", "--path", "_DUMMY_", "--model", model)
    if moment == "loading":
        write_config(model, num_hidden_layers=120, hidden_size=256, ffn_dim=1024)
        return (*common, *SHORT, "--compress-weight")
    if moment == "warm-up":
        write_config(model, max_position_embeddings=1024)
        return (*common, "--num-gpu-batches", 64, "--prompt-len", 512, "--gen-len", 8)
    write_config(model, max_position_embeddings=2**16)
    return (*common, "--gpu-batch-size", 1, "--prompt-len", 16, "--gen-len", 30000)


def assert_nothing_is_left(started: Hand | Job, folder: Path) -> None:
    """No row, no file on disk, no temporary file."""
    assert not (folder / "results" / "dist.tsv").exists()
    assert list((folder / "offload").iterdir()) == []
    assert started.temporary_files() == []


def files_in_use(rank: Rank, folder: Path) -> list[str]:
    """The files without names that a rank has in a folder."""
    links = (os.readlink(file) for file in Path(f"/proc/{rank.process.pid}/fd").iterdir())
    return [link for link in links if link.startswith(str(folder))]


Scenario = Iterator[None]
"""A generator that yields while it waits, so that others may go on."""


def until(
    probe: Callable[[], Any], rank: Rank | Job, what: str, within_s: float = LONG_S
) -> Scenario:
    """Wait for something that concerns `rank`."""
    expires_at = time.monotonic() + within_s
    while not probe():
        assert time.monotonic() < expires_at, f"not {what} within {within_s} s: {rank.stderr}"
        yield


def until_text(text: str, rank: Rank | Job) -> Scenario:
    """Wait until a rank, which must not end, has said something."""
    yield from until(lambda: text in rank.stderr or rank.has_ended, rank, repr(text))
    assert not rank.has_ended, f"ended before {text!r}: {rank.stderr}"


def until_end(rank: Rank | Job, begun_at: float) -> Scenario:
    """Wait until a rank has ended, as long after `begun_at` as it may take."""
    remaining = begun_at + IN_TIME_S - time.monotonic()
    yield from until(lambda: rank.has_ended, rank, "ended", remaining)


def pause(seconds: float) -> Scenario:
    expires_at = time.monotonic() + seconds
    while time.monotonic() < expires_at:
        yield


@dataclass(frozen=True)
class Lost:
    """A rank is killed or frozen. Nobody ends the others: they have to do it themselves."""

    moment: str
    victim: int
    number: signal.Signals

    def __str__(self) -> str:
        return f"{type(self).__name__}-{self.moment}-{self.number.name}-{self.victim}"

    @property
    def message(self) -> str:
        """What all others have to say."""
        frozen = f"has not answered for {TIMEOUT_S} s (--comm-timeout)"
        return f"rank {self.victim} {KILLED if self.number == signal.SIGKILL else frozen}"

    @property
    def records(self) -> list[tuple[str, str]]:
        """What rank 0 keeps, if it is not the victim."""
        return [] if self.victim == 0 else [("failed", self.message)]

    def scenario(self, folder: Path, temporary: Path) -> Scenario:
        is_waiting = self.moment == "waiting"
        num_ranks = 3 if self.moment in ("waiting", "run") else 2
        options = (*long_moment(self.moment, folder), "--comm-timeout", TIMEOUT_S)
        place = ("--world-size", num_ranks, "--port", free_port(), *options)
        with Hand(folder, temporary) as hand:
            ranks = [
                hand.start(*place, "--rank", rank) for rank in range(num_ranks - int(is_waiting))
            ]
            victim = ranks[self.victim]
            yield from until_text(FIRST_LINES[self.moment], ranks[0])
            if is_waiting:
                connections = ranks[1].process.net_connections
                yield from until(lambda: connections("tcp"), ranks[1], "connected")
            yield from pause(0.3)
            if self.moment == "run":
                assert [] not in [files_in_use(rank, folder / "offload") for rank in ranks]

            victim.send_signal(self.number)
            begun_at = time.monotonic()
            if is_waiting and self.number == signal.SIGSTOP and self.victim == 1:
                ranks.append(hand.start(*place, "--rank", 2))
            others = [rank for rank in ranks if rank is not victim]
            for rank in others:
                yield from until_end(rank, begun_at)
            if is_waiting and self.number == signal.SIGKILL:
                assert time.monotonic() - begun_at < TIMEOUT_S  # nothing to wait for
            for rank in others:
                assert rank.finish() == 1
                assert rank.stderr.count("Error: ") == 1, rank.stderr
                assert rank.stderr.count(f"Error: {self.message}\n") == 1, rank.stderr
                assert "Traceback" not in rank.stderr
            assert hand.endings() == self.records

            if self.number == signal.SIGSTOP:
                victim.send_signal(signal.SIGCONT)
                yield from until_end(victim, time.monotonic())
                assert victim.finish() == 1
                assert re.search("Error: ranks? [012]", victim.stderr)
            assert {status for status, _ in hand.endings()} <= {"failed"}
            assert_nothing_is_left(hand, folder)


@dataclass(frozen=True)
class LostUnderMpirun(Lost):
    """mpirun ends the others, half a second after the first one has ended."""

    def scenario(self, folder: Path, temporary: Path) -> Scenario:
        options = (*long_moment(self.moment, folder), "--comm-timeout", TIMEOUT_S)
        with Job(mpirun(2, *options), folder, temporary) as job:
            yield from until_text(FIRST_LINES[self.moment], job)
            yield from pause(0.3)
            job.rank(self.victim).send_signal(self.number)
            yield from until_end(job, time.monotonic())
            assert job.finish(1) == (137 if self.number == signal.SIGKILL else 1)
            assert job.stderr.count(f"Error: {self.message}\n") == 1, job.stderr
            assert "Traceback" not in job.stderr
            yield from until(lambda: not job.family(), job, "without processes", 5)
            if self.victim == 0 and self.number == signal.SIGSTOP:
                # Before mpirun ends what is left, it sends SIGCONT: there may be last words.
                assert len(job.endings()) <= 1
                assert {status for status, _ in job.endings()} <= {"failed", "interrupted"}
            else:
                assert job.endings() == self.records
            assert_nothing_is_left(job, folder)


@dataclass(frozen=True)
class StoppedInReceive:
    """A rank that waits for another one is within torch, where no handler of a signal gets in."""

    rank: int
    number: signal.Signals

    def __str__(self) -> str:
        return f"{type(self).__name__}-{self.number.name}-{self.rank}"

    def scenario(self, folder: Path, temporary: Path) -> Scenario:
        name, code = ENDINGS[self.number]
        with Hand(folder, temporary) as hand:
            ranks = hand.start_all(2, *long_moment("run", folder))
            stopped, frozen = ranks[self.rank], ranks[1 - self.rank]
            yield from until_text(FIRST_LINES["run"], ranks[0])
            frozen.send_signal(signal.SIGSTOP)
            yield from pause(0.5)
            stopped.send_signal(self.number)
            yield from until_end(stopped, time.monotonic())
            assert stopped.finish() == code
            assert stopped.stderr.count(f"Stopped by {name}.\n") == 1
            assert "Traceback" not in stopped.stderr
            frozen.send_signal(signal.SIGCONT)
            yield from until_end(frozen, time.monotonic())
            assert frozen.finish() == code
            assert f"Error: rank {self.rank} was stopped by {name}\n" in frozen.stderr
            reason = f"rank 1 was stopped by {name}" if self.rank else f"Stopped by {name}."
            assert hand.endings() == [("interrupted", reason)]
            assert_nothing_is_left(hand, folder)


@dataclass(frozen=True)
class StoppedMpirun:
    """mpirun is told to stop."""

    number: signal.Signals

    def __str__(self) -> str:
        return f"{type(self).__name__}-{self.number.name}"

    def scenario(self, folder: Path, temporary: Path) -> Scenario:
        with Job(mpirun(2, *long_moment("run", folder)), folder, temporary) as job:
            yield from until_text(FIRST_LINES["run"], job)
            yield from pause(0.3)
            job.process.send_signal(self.number)
            yield from until_end(job, time.monotonic())
            assert job.finish(1) != 0
            yield from until(lambda: not job.family(), job, "without processes", 5)
            assert "Traceback" not in job.stderr
            assert {status for status, _ in job.endings()} <= {"failed", "interrupted"}
            assert_nothing_is_left(job, folder)


Case = Lost | LostUnderMpirun | StoppedInReceive | StoppedMpirun
KILL_OR_STOP = (signal.SIGKILL, signal.SIGSTOP)
# Those that take longest come first.
CASES: list[Case] = [
    *(LostUnderMpirun("run", *rest) for rest in product((0, 1), KILL_OR_STOP)),
    *(LostUnderMpirun("loading", victim, signal.SIGKILL) for victim in (0, 1)),
    *(StoppedMpirun(number) for number in ENDINGS),
    *(Lost("run", *rest) for rest in product((0, 1, 2), KILL_OR_STOP)),
    *(Lost("warm-up", *rest) for rest in product((0, 1), KILL_OR_STOP)),
    *(Lost("loading", *rest) for rest in product((0, 1), KILL_OR_STOP)),
    *(Lost("waiting", *rest) for rest in product((0, 1), KILL_OR_STOP)),
    *(StoppedInReceive(*rest) for rest in product((0, 1), ENDINGS)),
]


@pytest.fixture(scope="module")
def outcomes(
    _loaded: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Exception | None]]:
    """What came out of the cases that are to be tested. They mostly wait, and do it together."""
    name = test_every_rank_says_why_it_ends.__name__
    items = [i for i in request.session.items if getattr(i, "originalname", None) == name]
    selected = {item.callspec.params["case"] for item in items}
    waiting = [case for case in CASES if case in selected]
    active: dict[Case, Scenario] = {}
    found: dict[Case, Exception | None] = {}
    with ExitStack() as stack:
        set_variables(stack.enter_context(pytest.MonkeyPatch.context()))
        while waiting or active:
            while waiting and len(active) < AT_ONCE:
                case = waiting.pop(0)
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="fbt-"))
                folder = tmp_path_factory.mktemp(str(case))
                active[case] = case.scenario(folder, Path(temporary))
            for case, scenario in list(active.items()):
                try:
                    next(scenario)
                    continue
                except StopIteration:
                    found[case] = None
                except Exception as error:  # noqa: BLE001 - its test raises it again
                    found[case] = error
                del active[case]
            time.sleep(0.02)
        yield found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_says_why_it_ends(case, outcomes):
    if (error := outcomes[case]) is not None:
        raise error


def test_an_error_of_the_transport_is_told_by_its_cause():
    """A closed connection may be noticed before the loss of its rank is told."""
    from flexbench.core.errors import RunError
    from flexbench.dist.process_group import _raise_cause
    from flexbench.dist.transport import PeerError
    from flexbench.ranks.watch import LostRank

    class Watch:
        def wait_for_loss(self, timeout_s: float) -> LostRank:
            assert timeout_s > 0
            return LostRank(2, KILLED)

    for error in (RuntimeError("Connection reset by peer"), PeerError(1, "reset by peer")):
        with pytest.raises(RunError) as raised:
            _raise_cause(Watch(), error)
        assert raised.value.message == f"rank 2 {KILLED}"


# --- a rank fails, is another one, or never comes ----------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A model that only the last rank finds to be damaged."""
    folder = write_model(tmp_path / "damaged")
    (folder / "model-00003.safetensors").write_bytes(b"\xff" * 100)
    return folder


def test_a_rank_that_fails_tells_why(hand, damaged):
    ranks = hand.start_all(3, "--model", damaged, *SHORT)
    # All end as the one does: a damaged file is no run that failed.
    assert [rank.finish() for rank in ranks] == [2, 2, 2]
    reason = f"{damaged}/model-00003.safetensors: cannot be read"
    for rank in ranks[:2]:
        assert rank.stderr.count("Error: ") == 1
        assert f"Error: rank 2 failed: {reason}" in rank.stderr
    assert ranks[2].stderr.startswith(f"Error: {reason}")
    assert records_in(hand.folder) == []


def test_a_rank_that_fails_under_mpirun(launch, damaged, tmp_path):
    job = launch(*mpirun(2, "--model", damaged, *SHORT))
    assert job.finish(LONG_S) == 2
    reason = f"{damaged}/model-00003.safetensors: cannot be read"
    assert job.stderr.count(f"Error: rank 1 failed: {reason}") == 1
    assert job.stderr.count(f"Error: {reason}") == 1
    assert "Traceback" not in job.stderr
    job.assert_nothing_left()
    assert job.temporary_files() == []


def test_a_mistake_in_the_options_is_told_once(launch, tiny, tmp_path):
    job = launch(*mpirun(2, "--model", tiny, *SHORT, "--gpu-batch-size", 0))
    assert job.finish(LONG_S) == 2
    assert job.stderr.count("Error: --gpu-batch-size: must be") == 1
    assert not (tmp_path / "results").exists()
    job.assert_nothing_left()


DIFFERENT = [
    ["--seed", 1],
    ["--percent", 100, 0, 100, 0, 0, 100],
    ["--gen-len", 9],
    ["--async-comm"],
    ["--no-overlap"],
]


@pytest.mark.parametrize("different", DIFFERENT)
def test_ranks_with_other_options_are_refused(different, hand, tiny, monkeypatch):
    # Or rank 0 would take the other for a stranger, and wait for the right one.
    monkeypatch.setenv("FLEXBENCH_JOB_TOKEN", "ours")
    """At once: they have the same secret, so they are of one job."""
    place = ("--world-size", 2, "--port", free_port(), "--model", tiny, *SHORT)
    secret = {"FLEXBENCH_JOB_TOKEN": "secret"}
    ranks = [
        hand.start(*place, "--rank", 0, environ=secret),
        hand.start(*place, "--rank", 1, *different, environ=secret),
    ]
    assert [rank.finish(IN_TIME_S) for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "Error: rank 1 was started with other options than rank 0" in rank.stderr


def test_without_a_secret_it_may_be_another_job_s(hand, tiny):
    """It is turned away, and the right one may still come."""
    place = ("--world-size", 2, "--port", free_port(), "--model", tiny, *SHORT)
    first = hand.start(*place, "--rank", 0, "--comm-timeout", 10)
    stranger = hand.start(*place, "--rank", 1, "--comm-timeout", 10, "--seed", 1)
    assert stranger.finish(IN_TIME_S) == 1
    assert "Error: rank 1 was started with other options than rank 0" in stranger.stderr
    second = hand.start(*place, "--rank", 1, "--comm-timeout", 10)
    assert [first.finish(), second.finish()] == [0, 0], first.stderr


def test_who_was_turned_away_is_named_when_nobody_else_comes(hand, tiny):
    place = ("--world-size", 2, "--port", free_port(), "--model", tiny, *SHORT)
    ranks = [
        hand.start(*place, "--rank", 0, "--comm-timeout", 2),
        hand.start(*place, "--rank", 1, "--comm-timeout", 2, "--seed", 1),
    ]
    assert [rank.finish(IN_TIME_S) for rank in ranks] == [1, 1]
    assert "rank 1 did not arrive within 2 s (--comm-timeout)" in ranks[0].stderr
    assert "a rank 1 with other options was turned away" in ranks[0].stderr


def test_what_may_differ_from_host_to_host(hand, tiny, tmp_path):
    """Folders and output; and the same model may lie elsewhere."""
    (tmp_path / "elsewhere").symlink_to(tiny)
    place = ("--world-size", 2, "--port", free_port(), *SHORT)
    ranks = [
        hand.start(*place, "--rank", 0, "--model", tiny),
        hand.start(
            *(*place, "--rank", 1, "--model", tmp_path / "elsewhere", "--output", "b.tsv"),
            *("--offload-dir", tmp_path, "--verbose", 0, "--no-log"),
        ),
    ]
    assert [rank.finish() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_rank_that_never_comes_is_named(missing, hand, tiny):
    place = ("--world-size", 3, "--port", free_port(), "--model", tiny, *SHORT)
    numbers = [number for number in range(3) if number != missing]
    ranks = [hand.start(*place, "--rank", number, "--comm-timeout", 1) for number in numbers]
    assert [rank.finish(IN_TIME_S) for rank in ranks] == [1, 1]
    for number, rank in zip(numbers, ranks, strict=True):
        if missing == 0:
            message = f"rank {number} could not reach rank 0 within 1 s (--comm-timeout)"
        else:
            message = f"rank {missing} did not arrive within 1 s (--comm-timeout)"
        assert f"Error: {message}" in rank.stderr
    assert len(records_in(hand.folder)) == (0 if missing == 0 else 1)


def test_a_port_that_is_taken_is_an_error_of_the_option(hand, tiny):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        place = ("--world-size", 2, "--port", port, "--model", tiny, *SHORT)
        rank = hand.start(*place, "--rank", 0)
        assert rank.finish() == 2
    assert f"Error: --port: rank 0 cannot listen at 127.0.0.1:{port}" in rank.stderr


# --- being stopped -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", ENDINGS)
@pytest.mark.parametrize("moment", ["loading", "warm-up", "run"])
def test_a_single_process_is_stopped(moment, number, hand, tmp_path):
    name, code = ENDINGS[number]
    (rank,) = hand.start_all(1, *long_moment(moment, tmp_path))
    rank.wait_for_text(FIRST_LINES[moment])
    time.sleep(0.2)
    rank.send_signal(number)
    assert rank.finish(IN_TIME_S) == code
    assert rank.stderr.splitlines()[-1] == f"Stopped by {name}."
    assert "Traceback" not in rank.stderr
    assert hand.endings() == [("interrupted", f"Stopped by {name}.")]
    assert_nothing_is_left(hand, tmp_path)


@pytest.mark.parametrize("number", ENDINGS)
def test_a_rank_that_is_stopped_tells_the_others(number, hand, tmp_path):
    name, code = ENDINGS[number]
    ranks = hand.start_all(3, *long_moment("run", tmp_path))
    ranks[0].wait_for_text(FIRST_LINES["run"])
    ranks[1].send_signal(number)
    assert [rank.finish(IN_TIME_S) for rank in ranks] == [code] * 3
    for rank in (ranks[0], ranks[2]):
        assert f"Error: rank 1 was stopped by {name}\n" in rank.stderr
    assert f"Stopped by {name}." in ranks[1].stderr
    assert hand.endings() == [("interrupted", f"rank 1 was stopped by {name}")]


@pytest.mark.parametrize("number", ENDINGS)
def test_a_rank_that_waits_for_the_others_at_the_start_is_stopped(number, hand, tiny):
    name, code = ENDINGS[number]
    ranks = hand.start_all(3, "--model", tiny, *SHORT, missing=1)
    ranks[0].wait_for_text(FIRST_LINES["waiting"])
    ranks[1].wait_for(lambda: ranks[1].process.net_connections("tcp"), "connection")
    time.sleep(0.3)
    ranks[1].send_signal(number)
    assert [rank.finish(IN_TIME_S) for rank in ranks] == [1, code]
    assert f"Error: rank 1 was stopped by {name}\n" in ranks[0].stderr
    assert f"Stopped by {name}." in ranks[1].stderr


# --- a full disk -------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "flexbench-test", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {getattr(error, 'stderr', None) or error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


ON_DISK = ("--percent", 0, 0, 0, 0, 0, 0)


def test_a_full_disk_is_found_before_it_is_full(small_disk, hand, tiny):
    (rank,) = hand.start_all(1, "--model", tiny, *SHORT, *ON_DISK, "--offload-dir", small_disk)
    assert rank.finish() == 2
    assert f"Error: --percent: the disk of {small_disk} has 256 KiB free" in rank.stderr
    assert records_in(hand.folder) == []


# With one thing on disk after the other: what is loaded, and what is allocated for the warm-up.
@pytest.mark.parametrize("percent", [(0, 0, 0, 0, 0, 0), (100, 0, 0, 0, 100, 0)])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_disk_is_an_error_that_leaves_nothing(num_ranks, percent, small_disk, hand, tiny):
    ranks = hand.start_all(
        *(num_ranks, "--model", tiny, "--prompt-len", 64, "--gen-len", 32, "--gpu-batch-size", 8),
        *("--percent", *percent, "--offload-dir", small_disk, "--allow-overcommit"),
    )
    assert [rank.finish(IN_TIME_S) for rank in ranks] == [1] * num_ranks
    for rank in ranks:
        assert f"--offload-dir: {small_disk} has no room for" in rank.stderr
        assert "No space left on device" in rank.stderr
        assert rank.stderr.count("Error: ") == 1
        assert "Traceback" not in rank.stderr
    assert list(small_disk.iterdir()) == []
    disk = os.statvfs(small_disk)
    assert disk.f_bfree == disk.f_blocks
    (record,) = records_in(hand.folder)
    assert record["status"] == "failed"
    assert "has no room for" in record["error"]


# --- for programs that were written for the original -------------------------------------------

PROGRAM = """
import argparse, json, sys
from flexbench.dist import add_distributed_parser_arguments, run_flexllmgen_dist

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--path", default="_DUMMY_")
parser.add_argument("--prompt-len", type=int)
parser.add_argument("--gen-len", type=int)
parser.add_argument("--percent", nargs="+", type=int)
parser.add_argument("--cut-gen-len", type=int)
parser.add_argument("--debug-mode")
parser.add_argument("--log-file", default="auto")
parser.add_argument("--no-log", action="store_true")
add_distributed_parser_arguments(parser)
args = parser.parse_args()
row = run_flexllmgen_dist(args)
print("row", args.model, None if row is None else [row.num_processes, row.max_tokens], flush=True)
"""


def test_a_program_that_was_written_for_the_original(launch, tiny, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    percent = ("--percent", 20, 80, 0, 100, 0, 100)
    options = ("--model", tiny, *SHORT, *percent, "--async-comm", "--num-inner-iterations", 3)
    job = launch(
        *(MPIRUN, "--oversubscribe", "-np", 2, sys.executable, tmp_path / "program.py", *options)
    )
    assert job.finish(LONG_S) == 0, job.stderr
    lines = sorted(job.stdout.replace("\r", "").splitlines())
    assert lines == [f"row {tiny} None", f"row {tiny} [2, 8]"]
    (record,) = records_in(tmp_path)
    assert_is_kept(record, 2, "openmpi")
    assert record["configuration"]["percent"] == [20, 80, 0, 100, 0, 100]
    assert record["configuration"]["async_comm"] is True
    assert record["run"]["num_inner_iterations"] == 3
    assert record["model"]["weights"] == "dummy"
    assert len(list((tmp_path / "results").glob("*.log"))) == 1
    assert job.temporary_files() == []
