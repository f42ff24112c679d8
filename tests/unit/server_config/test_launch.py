"""What is said of a server that does not come up; the real ones are in tests/integration."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexbench.core.errors import DeadlineError, RunError
from flexbench.core.processes import Deadline, Finished, Item
from flexbench.core.progress import Silence
from flexbench.petals_runtime.server_process import ServerStage
from flexbench.server_config.launch import _await_end, _await_ready, _follow


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
        _await_ready(crew, 90, Silence())
    assert caught.value.message == (
        "the server did not start within 90 s (--server-timeout); the last it did was loading its "
        "blocks"
    )


def test_a_server_that_ends_by_itself_is_an_error():
    with pytest.raises(RunError, match="ended by itself, after loading Petals"):
        _await_ready(StandIn(Item(ServerStage("loading Petals")), Finished()), 90, Silence())
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


def test_a_log_that_never_comes_is_not_waited_for(tmp_path: Path):
    is_over = threading.Event()
    is_over.set()
    _follow(SimpleNamespace(log_path=tmp_path / "x", log_start=0), print, is_over)
