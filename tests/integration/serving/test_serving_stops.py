"""How a run ends that does not come to its end: in time, with what was measured, leaving nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexbench.core.errors import ConfigError, DeadlineError
from flexbench.core.progress import Silence
from flexbench.serving import generators
from flexbench.serving.bench import run_serving
from flexbench.serving.clients.dummy import DummyConfig
from flexbench.serving.config import Load, PromptConfig, ServingConfig, Sweep
from tests.integration.conftest import FLEXBENCH, Command
from tests.integration.serving.conftest import MockServer
from tests.integration.serving.points import SHORT, LeftPoint, only_point_in, points_in

LONG_S = 60
# What the issue promises; ending processes may take a second of it.
IN_TIME_S = 5

Start = Callable[..., Command]


@pytest.fixture
def start(flexbench: Callable[..., Command]) -> Start:
    """Starts `flexbench serving` against a server, and waits until requests are measured."""

    def start_it(
        server: MockServer, *options: object, num_requests: int = 60, **more: Any
    ) -> Command:
        command = flexbench("serving", "--api-url", server.url, *SHORT, "--duration", "60s", *options, **more)  # fmt: skip
        command.wait_for(
            lambda: server.truth()["num_requests"] >= num_requests, "requests at the server", LONG_S
        )
        # What was measured by now has been written; a loop writes four times a second.
        time.sleep(0.4)
        return command

    return start_it


def assert_is_kept(point: LeftPoint, server: MockServer, *, status: str, at_least: int) -> None:
    """The point has the requests that had been sent, with figures."""
    assert point.record["status"] == status
    assert len(point.traces) >= at_least
    assert point.figures["num_ok"] >= at_least - 10
    assert point.figures["requests_per_s"] > 0
    assert point.figures["num_failed"] == 0
    sent = {one["arrived_ns"] for one in server.truth()["requests"]}
    assert len(point.traces) <= len(sent)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "Stopped by Ctrl-C."),
        (signal.SIGTERM, 143, "Stopped by SIGTERM."),
        (signal.SIGHUP, 129, "Stopped by SIGHUP."),
    ],
)
def test_a_run_that_is_told_to_stop(start, mock_server, tmp_path, number, code, said):
    server = mock_server("--ttft", "10ms")
    command = start(server, "--num-clients", 2, 4)
    command.process.send_signal(number)
    assert command.finish(IN_TIME_S) == code
    assert said in command.stderr
    assert "Error" not in command.stderr
    point = only_point_in(tmp_path)
    assert str(point.path.relative_to(tmp_path)) in command.stderr
    assert_is_kept(point, server, status="interrupted", at_least=60)
    # Of the requests in flight, each is there, too: neither done nor failed.
    assert 0 <= point.figures["num_unfinished"] <= 2
    truth = server.truth()
    assert truth["num_requests"] == len(point.traces) + 2
    assert truth["outcomes"].get("in flight", 0) == 0
    command.assert_nothing_left()
    assert command.temporary_files() == []
    if number != signal.SIGINT:
        return
    # It is no point that a second start could do without.
    again = start(server, "--num-clients", 2, num_requests=truth["num_requests"] + 20)
    again.process.send_signal(number)
    assert again.finish(IN_TIME_S) == code


def test_ctrl_c_of_a_terminal_reaches_all_processes(start, mock_server, tmp_path):
    server = mock_server("--ttft", "10ms")
    command = start(server, "--num-clients", 4, "--num-workers", 2)
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.finish(IN_TIME_S) == 130
    assert_is_kept(only_point_in(tmp_path), server, status="interrupted", at_least=60)
    command.assert_nothing_left()


def test_a_second_point_that_is_stopped_leaves_the_first(flexbench, mock_server, tmp_path):
    server = mock_server("--ttft", "10ms")
    command = flexbench("serving", "--api-url", server.url, *SHORT, "--num-clients", 1, 2, "--duration", "1s")  # fmt: skip
    command.wait_for_text("2 clients ...")
    command.wait_for(lambda: server.truth()["in_flight"]["max"] == 2, "2 in flight", LONG_S)
    command.process.send_signal(signal.SIGINT)
    assert command.finish(IN_TIME_S) == 130
    statuses = [point.record["status"] for point in points_in(tmp_path)]
    assert statuses[0] == "ok"
    assert statuses[1:] in ([], ["interrupted"])


@pytest.mark.parametrize("waits_for", ["warm-up", "connection"])
def test_a_run_that_is_stopped_before_anything_is_measured(flexbench, mock_server, tmp_path, waits_for):  # fmt: skip
    server = mock_server("--fault", "slow")
    command = flexbench("serving", "--api-url", server.url, *SHORT, "--num-clients", 2)
    if waits_for == "warm-up":
        command.wait_for(lambda: server.truth()["num_requests"] == 2, "a warm-up", LONG_S)
    else:
        command.worker("load generator 0", timeout_s=LONG_S)
    command.process.send_signal(signal.SIGINT)
    assert command.finish(IN_TIME_S) == 130
    assert points_in(tmp_path) == []
    command.assert_nothing_left()


def test_a_warm_up_has_an_end(flexbench, mock_server, tmp_path):
    server = mock_server("--fault", "slow")
    command = flexbench("serving", "--api-url", server.url, *SHORT, "--num-clients", 2, "--warmup-timeout", "1s")  # fmt: skip
    assert command.finish(LONG_S) == 1
    assert "not ready within 1 s (--warmup-timeout)" in command.stderr
    assert points_in(tmp_path) == []
    command.assert_nothing_left()


# --- load generators that are lost ---------------------------------------------------------------


@pytest.mark.timing
def test_a_killed_load_generator_ends_the_run(start, mock_server, tmp_path):
    server = mock_server("--ttft", "10ms")
    command = start(server, "--num-clients", 4, "--num-workers", 2)
    killed_at = time.monotonic()
    command.worker("load generator 1").kill()
    assert command.finish(IN_TIME_S) == 1
    assert time.monotonic() - killed_at < IN_TIME_S
    assert "Error: load generator 1 was killed by SIGKILL" in command.stderr
    point = only_point_in(tmp_path)
    assert str(point.path.relative_to(tmp_path)) in command.stderr
    assert_is_kept(point, server, status="failed", at_least=60)
    # What both had measured.
    by_loop = [sum(trace.worker == loop for trace in point.traces) for loop in range(2)]
    assert min(by_loop) >= 20
    command.assert_nothing_left()


def test_a_load_generator_that_is_killed_while_it_warms_up(flexbench, mock_server, tmp_path):
    server = mock_server("--fault", "slow")
    command = flexbench("serving", "--api-url", server.url, *SHORT, "--num-clients", 2, "--num-workers", 2)  # fmt: skip
    command.wait_for(lambda: server.truth()["num_requests"] == 2, "a warm-up", LONG_S)
    command.worker("load generator 0").kill()
    assert command.finish(IN_TIME_S) == 1
    assert "load generator 0 was killed by SIGKILL" in command.stderr
    assert points_in(tmp_path) == []
    command.assert_nothing_left()


class Freezing(Silence):
    """Progress that lets a child of this process stand still as soon as a point is under way."""

    def __init__(self) -> None:
        self.frozen: psutil.Process | None = None
        # Earlier tests may have left some that are about to end, or the resource tracker.
        self._others = set(psutil.Process().children())

    @contextmanager
    def phase(self, *_: Any, **__: Any) -> Iterator[Any]:
        yield self

    def show(self, text: str, _: float) -> None:
        if self.frozen is None and "in flight" in text:
            (self.frozen,) = set(psutil.Process().children()) - self._others
            self.frozen.suspend()


@pytest.mark.timing
def test_a_frozen_load_generator_ends_the_run(tmp_path, temporary_folder, monkeypatch):
    monkeypatch.setattr(generators, "_SILENCE_S", 1.0)
    config = ServingConfig(
        api="dummy",
        client_config=DummyConfig(ttft_ms=5, itl_ms=0),
        sweeps=(
            Sweep(
                prompts=PromptConfig(model="m", tokenizer="byte", prompt_length=16),
                loads=(Load(concurrency=2, duration_s=60.0),),
            ),
        ),
        result_dir=tmp_path / "results/serving",
    )
    progress = Freezing()
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"load generator 0 has said nothing for 1 s"):
        run_serving(config, progress=progress)
    assert time.monotonic() - began < 20
    assert progress.frozen is not None
    assert not progress.frozen.is_running()
    point = only_point_in(tmp_path)
    assert point.record["status"] == "failed"
    assert point.figures["num_ok"] >= 10


def test_a_killed_command_leaves_nothing(start, mock_server):
    server = mock_server("--ttft", "10ms")
    command = start(server, "--num-clients", 4, "--num-workers", 2)
    assert len(command.workers()) == 2
    command.process.kill()
    command.process.wait(IN_TIME_S)
    command.assert_nothing_left(within_s=IN_TIME_S)


# --- disks ---------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_sent(
    flexbench, mock_server, tmp_path
):
    (tmp_path / "file").write_text("")
    server = mock_server()
    command = flexbench("serving", "--api-url", server.url, *SHORT, "--num-clients", 1, "--result-dir", "file")  # fmt: skip
    assert command.finish(LONG_S) == 2
    assert command.stderr.startswith("Error: --result-dir: ")
    truth = server.truth()
    # Not even asked for its models.
    assert (truth["num_requests"], truth["connections"]["opened"]) == (0, 1)
    command.assert_nothing_left()


def limited_to(kib: int) -> tuple[str, ...]:
    """The command, with no file larger than that: to a process, the disk is full then."""
    return ("bash", "-c", f'ulimit -f {kib}; exec "$0" "$@"', *FLEXBENCH)


def test_a_full_disk_is_told_before_anything_is_sent(flexbench, mock_server):
    server = mock_server()
    arguments = ("serving", "--api-url", server.url, *SHORT, "--num-clients", 1)
    command = flexbench(*arguments, program=limited_to(8))
    assert command.finish(LONG_S) == 2
    assert "Error: --result-dir: cannot write to results/serving" in command.stderr
    assert server.truth()["connections"]["opened"] == 1


def test_a_disk_that_becomes_full_ends_the_run(flexbench, mock_server, tmp_path):
    server = mock_server("--ttft", "1ms")
    arguments = (
        "serving",
        "--api-url",
        server.url,
        *SHORT,
        "--num-clients",
        8,
        "--duration",
        "60s",
    )
    command = flexbench(*arguments, program=limited_to(100))
    assert command.finish(LONG_S / 2) == 1
    assert "load generator 0 failed: OSError: [Errno 27] File too large" in command.stderr
    # As much as fits of what it has written by then would not fit into a point's file either.
    assert server.truth()["num_requests"] > 100
    command.assert_nothing_left()


def test_a_folder_that_is_gone_at_the_end_is_told(flexbench, mock_server, tmp_path):
    """What was measured is lost; the command says so, and how it ends says so too."""
    server = mock_server("--ttft", "10ms")
    results = tmp_path / "results"
    command = flexbench("serving", "--api-url", server.url, *SHORT, "--num-clients", 2, "--duration", "700ms", "--result-dir", results)  # fmt: skip
    command.wait_for(lambda: server.truth()["num_requests"] >= 10, "requests", LONG_S)
    remove(results)
    results.write_text("no folder")
    assert command.finish(LONG_S) == 1
    assert "the point could not be kept" in command.stderr
    assert "Traceback" not in command.stderr
    command.assert_nothing_left()


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_errors_of_the_configuration_are_raised_before_processes_start(tmp_path, monkeypatch):
    monkeypatch.setattr(generators.Generators, "start_workers", lambda *_: pytest.fail("started"))
    (tmp_path / "file").write_text("")
    loads = (Load(concurrency=1, num_requests=1),)
    config = ServingConfig(
        api="dummy",
        client_config=DummyConfig(),
        sweeps=(Sweep(prompts=PromptConfig(model="m"), loads=loads),),
        result_dir=tmp_path / "file",
    )
    with pytest.raises(ConfigError, match="--result-dir"):
        run_serving(config, progress=Silence())
