"""What is said of a server that does not come up; the real ones are in tests/integration."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexbench.core.errors import ConfigError, DeadlineError, RunError
from flexbench.core.processes import Deadline, Finished, Item
from flexbench.core.progress import Silence
from flexbench.models.config_file import find_model
from flexbench.models.families import decoder_spec
from flexbench.petals_runtime.server_process import ServerStage
from flexbench.server_config.config import ServerConfig
from flexbench.server_config.launch import (
    _await_end,
    _await_ready,
    _follow,
    _say_farewell,
    _while_it_can,
    check_launch,
)


class StandIn:
    """A crew whose only worker reports these messages, and then nothing more."""

    def __init__(self, *messages: Any) -> None:
        self._messages: Iterator[Any] = iter(messages)

    def next_message(self, deadline: Deadline) -> tuple[None, Any]:
        for message in self._messages:
            return None, message
        raise deadline.error()


def test_a_server_that_is_not_up_in_time_is_told_with_what_it_did_last():
    crew = StandIn(Item(ServerStage("loading Petals")), Item(ServerStage("loading its blocks")))
    with pytest.raises(DeadlineError) as caught:
        _await_ready(crew, 90, Silence(), [])
    assert caught.value.message == (
        "the server did not start within 90 s (--server-timeout); the last it did was loading its "
        "blocks"
    )


def test_a_server_that_ends_by_itself_is_an_error():
    with pytest.raises(RunError, match="ended by itself, after loading Petals"):
        _await_ready(StandIn(Item(ServerStage("loading Petals")), Finished()), 90, Silence(), [])
    with pytest.raises(RunError, match="ended by itself"):
        _await_end(StandIn(Finished()))


def test_the_log_is_passed_on_line_by_line_from_the_server_s_start(tmp_path: Path):
    log = tmp_path / "server.log"
    log.write_text("of an earlier one: é\n")
    server = SimpleNamespace(log_path=log, log_start=log.stat().st_size)
    lines: list[str] = []
    heard = threading.Event()

    def hear(line: str) -> None:
        lines.append(line)
        heard.set()

    is_over = threading.Event()
    thread = threading.Thread(target=_follow, args=(server, hear, is_over))
    thread.start()
    with log.open("a") as file:
        file.write("first\n\nsec")
        file.flush()
        assert heard.wait(10)
        file.write("ond\nthe end")
    is_over.set()
    thread.join(10)
    assert lines == ["first", "second", "the end"]


@pytest.mark.timing
def test_a_log_that_never_comes_is_not_waited_for(tmp_path: Path):
    is_over = threading.Event()
    is_over.set()
    told: list[str] = []
    started_at = time.monotonic()
    _follow(SimpleNamespace(log_path=tmp_path / "x", log_start=0), told.append, is_over)
    assert time.monotonic() - started_at < 5
    assert told == []


def test_telling_ends_with_its_first_failure_and_nothing_else_does(monkeypatch, tmp_path: Path):
    """rich, for one, gives standard output away and exits when standard error is closed."""
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise SystemExit(1)

    with (tmp_path / "out").open("w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with _while_it_can(tell) as tell_on:
            tell_on("first")
            tell_on("second")
        print("the answer", flush=True)
    assert told == ["first"]
    assert (tmp_path / "out").read_text() == "the answer\n"


def test_telling_needs_no_standard_output(monkeypatch):
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        raise BrokenPipeError

    for output in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", output)
        with _while_it_can(tell) as tell_on:
            tell_on("first")
            tell_on("second")
    assert told == ["first", "first"]


class Notes(Silence):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def process() -> Iterator[Any]:
    """One that takes its time to end."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    yield process
    process.kill()
    process.join(10)


@pytest.mark.timing
def test_a_second_signal_cuts_the_farewell_short(process):
    released: list[Any] = []
    crew = SimpleNamespace(release=released.append)
    server = SimpleNamespace(finished=False, process=process)
    notes = Notes()
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started_at = time.monotonic()
    _say_farewell(crew, server, notes)
    assert 0.2 < time.monotonic() - started_at < 5
    assert released == [[server]]
    assert notes.texts == [
        "Telling the swarm that the server goes (up to 8 s; Ctrl-C again ends it at once)"
    ]
    assert signal.getsignal(signal.SIGINT) is before

    process.kill()
    process.join(10)
    _say_farewell(crew, server, notes)  # there is nobody to say it
    assert len(released) == len(notes.texts) == 1


@pytest.mark.timing
def test_a_farewell_ends_with_the_server(process):
    def release(_servers: Any) -> None:
        process.kill()

    started_at = time.monotonic()
    server = SimpleNamespace(finished=False, process=process)
    _say_farewell(SimpleNamespace(release=release), server, Silence())
    assert time.monotonic() - started_at < 5


def test_what_petals_could_not_start_is_refused_before_anything_starts(tmp_path: Path):
    facts = {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 6}

    def check(name: str, *adapters: str) -> None:
        config = ServerConfig(
            model=decoder_spec(name, facts), adapters=adapters, adapter_memory_bytes=1
        )
        check_launch(config)

    check("nobody/has-this-model", "nobody/has-this-adapter")  # a model hub may
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        with pytest.raises(ConfigError, match="has no weights, so no server") as caught:
            check(name)
        assert caught.value.option == "MODEL"
    (tmp_path / "pytorch_model.bin").touch()
    check(str(tmp_path))
    with pytest.raises(ConfigError, match="from a model hub only; give its name there"):
        check(str(tmp_path), "nobody/has-this-adapter", str(tmp_path))
    with pytest.raises(ConfigError, match="--launch: Petals has no OPT blocks"):
        check_launch(ServerConfig(model=find_model("facebook/opt-125m")))
