"""Opening a swarm: a private one on loopback, or the look at one that already runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flexbench.core.errors import RunError, WorkerError
from flexbench.core.processes import Crew, Deadline, Item, Ready, Worker
from flexbench.core.progress import Phase, Progress
from flexbench.petals.model import SwarmModel
from flexbench.petals.peers import (
    Hop,
    ServerSpec,
    SwarmEntry,
    SwarmView,
    inspect_swarm,
    run_bootstrap_peer,
    run_server,
)
from flexbench.petals.plan import Plan
from flexbench.petals_runtime.crew import open_crew
from flexbench.petals_runtime.spans import format_spans, missing_blocks


@dataclass(frozen=True, kw_only=True)
class OpenSwarm:
    """A swarm that is ready for clients, the crew to run them in, and how long it took."""

    crew: Crew
    model: SwarmModel
    view: SwarmView
    startup_s: float


@contextmanager
def open_swarm(
    plan: Plan, *, log_folder: Path | None = None, progress: Progress
) -> Iterator[OpenSwarm]:
    """The swarm of the plan, in a crew of its own, which ends with the block.

    Raises RunError, or Interrupted, when that does not come to an end.
    """
    with open_crew(log_folder) as crew:
        yield start_swarm(crew, plan, progress=progress)


def start_swarm(crew: Crew, plan: Plan, *, progress: Progress) -> OpenSwarm:
    """The swarm of the plan: a private one is started in `crew`, a running one is looked at.

    Raises as `open_swarm` does.
    """
    config = plan.config
    started_at = time.monotonic()
    model = SwarmModel(
        shape=config.shape,
        dht_prefix=config.effective_dht_prefix,
        initial_peers=config.initial_peers,
        device=config.device,
        dtype=config.dtype,
        seed=config.seed,
        connect_timeout_s=config.connect_timeout_s,
        max_retries=config.max_retries,
    )
    if config.is_embedded:
        title = f"Starting a swarm of {len(plan.servers)} servers"
        with progress.phase(title, total=len(plan.servers) + 1) as phase:
            model, view = _start_embedded_swarm(
                crew, model, plan.servers, timeout_s=config.server_timeout_s, phase=phase
            )
    else:
        with progress.phase("Looking at the swarm", total=1):
            view = look_at_swarm(crew, model, timeout_s=config.connect_timeout_s)
    return OpenSwarm(crew=crew, model=model, view=view, startup_s=time.monotonic() - started_at)


def _start_embedded_swarm(
    crew: Crew,
    model: SwarmModel,
    specs: Sequence[ServerSpec],
    *,
    timeout_s: float,
    phase: Phase,
) -> tuple[SwarmModel, SwarmView]:
    """Start a bootstrap peer and a server for each spec; returns when all blocks are served.

    Returns the model with its weights and the addresses to join. `phase` advances with every
    worker that is ready. Raises WorkerError or DeadlineError.
    """
    folder = crew.scratch_folder / "weights"
    folder.mkdir()
    model = replace(model, weights_folder=str(folder))
    bootstrap = crew.start("bootstrap peer", run_bootstrap_peer, model)
    servers = [
        crew.start(f"server {index}", run_server, model, index, spec)
        for index, spec in enumerate(specs)
    ]
    starting: set[Worker] = {bootstrap, *servers}
    deadline = Deadline(
        timeout_s,
        lambda: (
            f"{', '.join(sorted(worker.name for worker in starting))} did not start within "
            f"{timeout_s:.0f} s (--server-timeout)"
        ),
    )
    hops: list[Hop] = []
    while starting:
        worker, message = crew.next_message(deadline)
        if isinstance(message, Item) and worker is bootstrap:
            entry: SwarmEntry = message.payload
            model = replace(model, initial_peers=entry.addresses)
            crew.release(servers, entry.addresses)
        elif isinstance(message, Item):
            hops.append(message.payload)
        elif isinstance(message, Ready):
            starting.discard(worker)
            phase.advance()
    hops.sort(key=lambda hop: hop.start)
    return model, SwarmView(servers=tuple(hops), device=entry.device, dtype=entry.dtype)


def look_at_swarm(crew: Crew, model: SwarmModel, *, timeout_s: float) -> SwarmView:
    """What a client sees of the swarm behind `model.initial_peers`.

    Raises RunError that names the peers when they cannot be reached, or the blocks nobody serves.
    """
    peers = ", ".join(model.initial_peers)
    deadline = Deadline(
        timeout_s,
        lambda: f"no answer from {peers} within {timeout_s:.0f} s (--connect-timeout)",
    )
    probe = crew.start("swarm check", inspect_swarm, model)
    try:
        while True:
            worker, message = crew.next_message(deadline)
            if worker is probe and isinstance(message, Item):
                view: SwarmView = message.payload
                break
    except WorkerError as error:
        raise RunError(
            f"the swarm cannot be reached through {peers}: {error.problem}", details=error.details
        ) from error
    crew.end([probe])
    spans = (range(hop.start, hop.end) for hop in view.servers)
    missing = missing_blocks(spans, model.shape.num_hidden_layers)
    if missing:
        raise RunError(
            f"nobody serves blocks {format_spans(missing)} of {model.shape.num_hidden_layers} "
            f"under the DHT prefix {model.dht_prefix!r} in the swarm of {peers}"
        )
    return view
