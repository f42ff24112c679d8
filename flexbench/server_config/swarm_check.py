"""What a server finds in the swarm that it is going to join."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexbench.core.errors import RunError, WorkerError
from flexbench.core.processes import Crew, Deadline, Finished, Item
from flexbench.core.progress import Phase, Progress
from flexbench.models.families import DecoderSpec
from flexbench.petals_runtime.crew import open_crew
from flexbench.petals_runtime.spans import missing_blocks, ranges_of
from flexbench.server_config.addresses import (
    announced,
    listening_addresses,
)
from flexbench.server_config.run_server import SwarmEntrance, default_dht_prefix
from flexbench.server_config.swarm_worker import (
    Reachability,
    Stage,
    SwarmLook,
    SwarmQuestion,
    SwarmServer,
    look_at_swarm,
)

_ONLINE = "online"
_NUM_STAGES = 5
# What p2pd and hivemind say, in their words, and what it means.
_KNOWN_PROBLEMS = (
    (
        "peer id mismatch",
        "who answers there has another peer id; give the one that the server prints",
    ),
    (
        "failed to connect to bootstrap peers",
        "none of its peers answers: they are down, not reachable from here, or have another peer "
        "id",
    ),
)


@dataclass(frozen=True, kw_only=True)
class SwarmReport:
    """A swarm as one model's servers make it up, and the place of one more. Rates in tokens/s."""

    dht_prefix: str
    is_new: bool
    num_hidden_layers: int
    servers: tuple[SwarmServer, ...]
    window: range
    """The blocks that Petals would choose."""
    blocks: range
    """The blocks that the server takes: the window, unless its operator names others."""
    reachability: Reachability | None
    """None: nobody was asked, because there is nobody yet."""
    listens_on: tuple[str, ...]
    visible_addresses: tuple[str, ...]
    """What other peers are told; empty for a swarm that does not exist yet."""

    @property
    def throughputs(self) -> tuple[float, ...]:
        """What the servers that are online offer for each block, together."""
        return tuple(
            sum(server.throughput for server in self._online() if server.start <= b < server.end)
            for b in range(self.num_hidden_layers)
        )

    @property
    def missing(self) -> tuple[range, ...]:
        """The blocks that no server holds online."""
        spans = (range(server.start, server.end) for server in self._online())
        return missing_blocks(spans, self.num_hidden_layers)

    @property
    def still_missing(self) -> tuple[range, ...]:
        """The blocks that nobody holds even with the new server."""
        lacking = (block for gap in self.missing for block in gap)
        return ranges_of(block for block in lacking if block not in self.blocks)

    @property
    def weakest(self) -> tuple[range, ...]:
        """The blocks with the least throughput; all requests have to get through them."""
        throughputs = self.throughputs
        least = min(throughputs)
        return ranges_of(block for block, value in enumerate(throughputs) if value == least)

    @property
    def needs_relay(self) -> bool:
        """Whether Petals will run the server behind a relay."""
        return self.reachability is not None and self.reachability.is_reachable is False

    def _online(self) -> list[SwarmServer]:
        return [server for server in self.servers if server.state == _ONLINE]


def check_swarm(
    spec: DecoderSpec,
    entrance: SwarmEntrance,
    num_blocks: int,
    *,
    block_range: range | None = None,
    connect_timeout_s: float,
    progress: Progress,
    log_folder: Path | None = None,
) -> SwarmReport:
    """Ask the swarm of `entrance` about a server of `num_blocks` blocks of `spec`.

    `block_range` are the blocks its operator insists on. For a new swarm nothing is started. Raises
    RunError when the swarm cannot be reached, DeadlineError when it takes too long to answer.
    """
    dht_prefix = entrance.dht_prefix or default_dht_prefix(spec)
    question = SwarmQuestion(
        initial_peers=entrance.named_peers,
        dht_prefix=dht_prefix,
        num_hidden_layers=spec.num_hidden_layers,
        num_blocks=num_blocks,
        host_maddrs=listening_addresses(entrance),
        announce_maddrs=announced(entrance),
        connect_timeout_s=connect_timeout_s,
    )
    found: _Found | None = None
    if not entrance.new_swarm:
        peers = ", ".join(entrance.initial_peers)
        with (
            open_crew(log_folder) as crew,
            progress.phase("Looking at the swarm", total=_NUM_STAGES) as phase,
        ):
            found = _ask(crew, question, peers, phase)
    start = found.look.window_start if found else 0
    window = range(start, start + num_blocks)
    return SwarmReport(
        dht_prefix=dht_prefix,
        is_new=entrance.new_swarm,
        num_hidden_layers=spec.num_hidden_layers,
        servers=found.look.servers if found else (),
        window=window,
        blocks=block_range or window,
        reachability=found.reachability if found else None,
        listens_on=question.host_maddrs,
        visible_addresses=found.look.visible_addresses if found else question.announce_maddrs,
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    reachability: Reachability
    look: SwarmLook


def _ask(crew: Crew, question: SwarmQuestion, peers: str, phase: Phase) -> _Found:
    stage = "starting"
    timeout_s = question.connect_timeout_s
    deadline = Deadline(
        timeout_s,
        lambda: (
            f"no answer from the swarm of {peers} within {timeout_s:g} s (--connect-timeout), "
            f"while {stage}"
        ),
    )
    crew.start("swarm check", look_at_swarm, question)
    reachability: Reachability | None = None
    look: SwarmLook | None = None
    try:
        while reachability is None or look is None:
            _, message = crew.next_message(deadline)
            if isinstance(message, Finished):
                raise RunError("the look at the swarm ended without an answer")
            payload = message.payload if isinstance(message, Item) else None
            if isinstance(payload, Stage):
                stage = payload.text
                phase.advance()
            elif isinstance(payload, Reachability):
                reachability = payload
            elif isinstance(payload, SwarmLook):
                look = payload
    except WorkerError as error:
        raise _unreachable(peers, error, stage) from error
    return _Found(reachability=reachability, look=look)


def _unreachable(peers: str, error: WorkerError, stage: str) -> RunError:
    """The error for people: without a traceback where its cause is known."""
    for words, meaning in _KNOWN_PROBLEMS:
        if words in error.problem.lower():
            log = (error.details or "").rpartition("\n")[2]
            return RunError(f"the swarm cannot be reached through {peers}: {meaning}", details=log)
    return RunError(
        f"the swarm cannot be reached through {peers}: {error.problem}, while {stage}",
        details=error.details,
    )
