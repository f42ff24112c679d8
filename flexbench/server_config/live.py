"""An estimate made real: a look at the swarm, the final configuration, and the server itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from flexbench.core.errors import FlexbenchError
from flexbench.core.progress import Progress
from flexbench.core.results import utc_now
from flexbench.petals_runtime.server_process import ServerFacts
from flexbench.server_config.addresses import (
    hold_ports,
    listening_addresses,
    resolve_entrance,
)
from flexbench.server_config.caveats import warnings_for
from flexbench.server_config.comparison import (
    compare,
    comparison_section,
    server_record,
    server_section,
    to_comparison_record,
)
from flexbench.server_config.config import Machine, ServerConfig
from flexbench.server_config.estimate import Estimate, estimate
from flexbench.server_config.formats import Answer, to_record
from flexbench.server_config.launch import check_launch, launch
from flexbench.server_config.run_server import SwarmEntrance, run_server_command
from flexbench.server_config.sections import Section
from flexbench.server_config.swarm_check import check_swarm
from flexbench.server_config.swarm_sections import swarm_sections, to_swarm_record


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to show: as tables for people, and as plain data under `name`.

    `answer` is the final configuration, where that is what was found.
    """

    name: str
    sections: tuple[Section, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    answer: Answer | None = None


def run_live(
    config: ServerConfig,
    machine: Machine,
    first: Estimate,
    entrance: SwarmEntrance,
    *,
    connect_timeout_s: float,
    server_timeout_s: float,
    launches: bool,
    progress: Progress,
    log_folder: Path | None,
    show: Callable[[Finding], None],
    save: Callable[[Mapping[str, Any]], None],
) -> None:
    """Look at the swarm for the server that `first` estimates, and start it if it `launches`.

    Shows three findings as soon as they are there: 'swarm', 'configuration', and of a server that
    was started 'comparison', which is also saved as a record. Returns at once without a launch,
    else never: Interrupted is raised when the server was stopped, RunError when it failed.
    """
    entrance = resolve_entrance(entrance, listens=True)
    if launches:
        check_launch(config)
    with hold_ports(entrance):
        report = check_swarm(
            config.model,
            entrance,
            first.num_blocks,
            block_range=first.block_range,
            connect_timeout_s=connect_timeout_s,
            progress=progress,
            log_folder=log_folder,
        )
        sections = tuple(swarm_sections(report))
        with progress.pause():
            show(Finding(name="swarm", sections=sections, record=to_swarm_record(report)))
        if report.needs_relay and not config.relay:
            config, first = _over_relay(config, machine, first)
        answer = Answer(
            estimate=first,
            warnings=(*_loopback_warnings(entrance), *warnings_for(config, machine, first)),
            command=run_server_command(config, first, entrance),
        )
        with progress.pause():
            show(Finding(name="configuration", record=to_record(answer), answer=answer))
        if launches:
            launch(
                config,
                first,
                entrance,
                server_timeout_s=server_timeout_s,
                progress=progress,
                log_folder=log_folder,
                on_ready=partial(_compare, answer, entrance, utc_now(), progress, show, save),
            )


def _over_relay(
    config: ServerConfig, machine: Machine, first: Estimate
) -> tuple[ServerConfig, Estimate]:
    """The same server behind a relay, which is how Petals runs one that is not reached directly."""
    config = replace(config, relay=True)
    one_machine = replace(machine, gpu_sets=(first.gpus,) if first.gpus else ())
    again = estimate(config, one_machine, compute=first.compute, network=first.network)
    return config, again[0]


def _compare(
    answer: Answer,
    entrance: SwarmEntrance,
    started_at: str,
    progress: Progress,
    show: Callable[[Finding], None],
    save: Callable[[Mapping[str, Any]], None],
    facts: ServerFacts,
) -> None:
    """Show and save what was predicted beside what the server turned out to be."""
    comparisons = compare(answer.estimate, facts)
    record = server_record(
        started_at=started_at,
        configuration={"entrance": asdict(entrance), "command": answer.command},
        predicted=to_record(answer),
        facts=facts,
        comparisons=comparisons,
    )
    try:
        save(record)
    except FlexbenchError as error:
        # No reason to end a server on which others count.
        progress.note(f"Note: {error.message}\n{error.details}")
    with progress.pause():
        show(
            Finding(
                name="comparison",
                sections=(server_section(facts), comparison_section(comparisons)),
                record={"server": asdict(facts), "comparison": to_comparison_record(comparisons)},
            )
        )


def _loopback_warnings(entrance: SwarmEntrance) -> tuple[str, ...]:
    """A server that only this machine reaches is of no use to a swarm elsewhere."""
    listens = all("/127." in address for address in listening_addresses(entrance))
    peers = entrance.initial_peers
    are_elsewhere = not entrance.new_swarm and not any("/127." in peer for peer in peers)
    if not (listens and are_elsewhere):
        return ()
    return (
        "It listens on 127.0.0.1 only, and its swarm is elsewhere: give --port, and --public-ip if "
        "this machine is behind a router.",
    )
