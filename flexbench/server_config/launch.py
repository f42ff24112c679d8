"""A Petals server that runs as long as the command does."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from typing import IO

from flexbench.core.errors import ConfigError, Interrupted, RunError
from flexbench.core.folders import local_path
from flexbench.core.processes import Crew, Deadline, Finished, Item, Ready, Worker
from flexbench.core.progress import Phase, Progress
from flexbench.core.signals import SignalWatch
from flexbench.petals_runtime.crew import open_crew
from flexbench.petals_runtime.server_process import ServerFacts, ServerStage, run_petals_server
from flexbench.server_config.config import ServerConfig
from flexbench.server_config.estimate import Estimate
from flexbench.server_config.run_server import SwarmEntrance, run_server_arguments

_NUM_STAGES = 4
_LOG_INTERVAL_S = 0.2
# To tell the swarm that the server goes, and to end its handlers; then everything is killed.
_FAREWELL_S = 8.0
# Source: petals/server/from_pretrained.py.
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def check_launch(config: ServerConfig) -> None:
    """Raise ConfigError for a server that Petals could not start with these files.

    Where it listens is checked by `addresses`.
    """
    if config.model.family == "opt":
        raise ConfigError("--launch", "Petals has no OPT blocks, so no server can be started")
    path = local_path(config.model.name)
    if path is not None and not any((path / name).is_file() for name in _WEIGHTS):
        raise ConfigError(
            "MODEL",
            f"{config.model.name} has no weights, so no server can be started; Petals loads one "
            f"of {', '.join(_WEIGHTS)} from a folder",
        )
    for adapter in config.adapters:
        if local_path(adapter) is not None:
            raise ConfigError(
                "--adapters",
                f"{adapter!r} is a local folder, and Petals loads adapters from a model hub only; "
                "give its name there and its size with --adapter-memory",
            )


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
    """
    arguments = run_server_arguments(config, estimate, entrance)
    with open_crew(log_folder) as crew:
        server = crew.start("server", run_petals_server, arguments)
        stages = [ServerStage("starting")]
        with _followed(server, progress.note):
            try:
                with progress.phase("Starting the server", total=_NUM_STAGES) as phase:
                    facts = _await_ready(crew, server_timeout_s, phase, stages)
                on_ready(facts)
                _await_end(crew)
            except BaseException:
                # Whatever it is that ends us, clients are not to wait for a server that is gone.
                if stages[-1].is_announced:
                    _say_farewell(crew, server, progress)
                raise


def _await_ready(
    crew: Crew, timeout_s: float, phase: Phase, stages: list[ServerStage]
) -> ServerFacts:
    """Wait until the server serves; what it begins meanwhile is appended to `stages`."""
    deadline = Deadline(
        timeout_s,
        lambda: (
            f"the server did not start within {timeout_s:g} s (--server-timeout); the last it "
            f"did was {stages[-1].text}"
        ),
    )
    facts: ServerFacts | None = None
    while True:
        _, message = crew.next_message(deadline)
        if isinstance(message, Item) and isinstance(message.payload, ServerFacts):
            facts = message.payload
        elif isinstance(message, Item) and isinstance(message.payload, ServerStage):
            stages.append(message.payload)
            phase.advance()
        elif isinstance(message, Ready) and facts is not None:
            phase.advance()
            return facts
        elif isinstance(message, Finished):
            raise RunError(f"the server ended by itself, after {stages[-1].text}")


def _await_end(crew: Crew) -> None:
    """Stay while the server serves. Always raises: that it ends is an error, or was asked for."""
    forever = Deadline(math.inf, lambda: "")
    while True:
        _, message = crew.next_message(forever)
        if isinstance(message, Finished):
            raise RunError("the server ended by itself")


def _say_farewell(crew: Crew, server: Worker, progress: Progress) -> None:
    """Let the server, if it still runs, tell the swarm that it goes; another signal cuts it short.

    What is left afterwards ends with the crew. Raises nothing: the reason to end is told already.
    """
    if server.finished or not server.process.is_alive():
        return
    crew.release([server])
    # The crew's own watch has noticed one signal, and notices no other.
    with suppress(Interrupted), SignalWatch() as again:
        with suppress(Exception, SystemExit):  # standard error may be why we end
            progress.note(
                "Telling the swarm that the server goes "
                f"(up to {_FAREWELL_S:g} s; Ctrl-C again ends it at once)"
            )
        connection.wait([server.process.sentinel, again.wakeup], _FAREWELL_S)


@contextmanager
def _followed(server: Worker, tell: Callable[[str], None]) -> Iterator[None]:
    """Pass on every line that the server adds to its log, until the block is left."""
    is_over = threading.Event()
    with _while_it_can(tell) as tell_on:
        thread = threading.Thread(target=_follow, args=(server, tell_on, is_over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


@contextmanager
def _while_it_can(tell: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """`tell`, until it fails once: a log that nobody reads any more is no reason to end.

    Where standard error is closed, rich exits, and takes standard output away before.
    """
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # it is no file, or closed
        number = None
    kept = None if number is None else os.dup(number)
    has_failed = False

    def tell_or_not(line: str) -> None:
        nonlocal has_failed
        if has_failed:
            return
        try:
            tell(line)
        except (Exception, SystemExit):  # noqa: BLE001 - whatever it is, the server goes on
            has_failed = True
            if number is not None and kept is not None:
                os.dup2(kept, number)

    try:
        yield tell_or_not
    finally:
        if kept is not None:
            os.close(kept)


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
