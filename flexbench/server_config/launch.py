"""A Petals server that runs as long as the command does."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flexbench.core.errors import Interrupted, RunError
from flexbench.core.processes import Crew, Deadline, Finished, Item, Ready, Worker
from flexbench.core.progress import Phase, Progress
from flexbench.petals_runtime.crew import open_crew
from flexbench.petals_runtime.server_process import ServerFacts, ServerStage, run_petals_server
from flexbench.server_config.config import ServerConfig
from flexbench.server_config.estimate import Estimate
from flexbench.server_config.run_server import SwarmEntrance, run_server_arguments

_NUM_STAGES = 4
_LOG_INTERVAL_S = 0.2
# To tell the swarm that the server goes, and to end its handlers; then everything is killed.
_FAREWELL_S = 8.0


def launch(
    config: ServerConfig,
    estimate: Estimate,
    entrance: SwarmEntrance,
    *,
    server_timeout_s: float,
    progress: Progress,
    log_folder: Path | None,
    on_ready: Callable[[ServerFacts], None],
) -> None:
    """Run the server until somebody stops it; its log goes to `progress` line by line.

    `on_ready` is called as soon as the swarm sees it online. Raises Interrupted when it was
    stopped, WorkerError or RunError when it ended by itself, DeadlineError when it did not start.
    `entrance` is in run_server's own terms, see `addresses.for_run_server`.
    """
    arguments = run_server_arguments(config, estimate, entrance)
    with open_crew(log_folder) as crew:
        server = crew.start("server", run_petals_server, arguments)
        with _followed(server, progress.note):
            with progress.phase("Starting the server", total=_NUM_STAGES) as phase:
                facts = _await_ready(crew, server_timeout_s, phase)
            try:
                on_ready(facts)
                _await_end(crew)
            except Interrupted:
                _say_farewell(crew, server)
                raise


def _await_ready(crew: Crew, timeout_s: float, phase: Phase) -> ServerFacts:
    stage = "starting"
    deadline = Deadline(
        timeout_s,
        lambda: (
            f"the server did not start within {timeout_s:g} s (--server-timeout); the last it "
            f"did was {stage}"
        ),
    )
    facts: ServerFacts | None = None
    while True:
        _, message = crew.next_message(deadline)
        if isinstance(message, Item) and isinstance(message.payload, ServerFacts):
            facts = message.payload
        elif isinstance(message, Item) and isinstance(message.payload, ServerStage):
            stage = message.payload.text
            phase.advance()
        elif isinstance(message, Ready) and facts is not None:
            phase.advance()
            return facts
        elif isinstance(message, Finished):
            raise RunError(f"the server ended by itself, after {stage}")


def _await_end(crew: Crew) -> None:
    """Stay while the server serves. Always raises: that it ends is an error, or was asked for."""
    forever = Deadline(math.inf, lambda: "")
    while True:
        _, message = crew.next_message(forever)
        if isinstance(message, Finished):
            raise RunError("the server ended by itself")


def _say_farewell(crew: Crew, server: Worker) -> None:
    """Let the server tell the swarm that it goes. What is left afterwards ends with the crew."""
    crew.release([server])
    server.process.join(_FAREWELL_S)


@contextmanager
def _followed(server: Worker, tell: Callable[[str], None]) -> Iterator[None]:
    """Pass on every line that the server adds to its log, until the block is left."""
    is_over = threading.Event()
    thread = threading.Thread(target=_follow, args=(server, tell, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _follow(server: Worker, tell: Callable[[str], None], is_over: threading.Event) -> None:
    while not server.log_path.exists():
        if is_over.wait(_LOG_INTERVAL_S):
            return
    with server.log_path.open(encoding="utf-8", errors="replace") as log:
        log.seek(server.log_start)
        begun = ""
        while True:
            was_over = is_over.is_set()  # first: what is written until then is still to be told
            begun = _tell_lines(log, begun, tell)
            if was_over:
                break
            is_over.wait(_LOG_INTERVAL_S)
        if begun:
            tell(begun)


def _tell_lines(log: IO[str], begun: str, tell: Callable[[str], None]) -> str:
    """Pass on the complete lines of what is new; returns the begin of one that is not complete."""
    lines: Sequence[str] = (begun + log.read()).split("\n")
    for line in lines[:-1]:
        if line.strip():
            tell(line)
    return lines[-1]
