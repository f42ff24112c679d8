"""What a server finds in its swarm, as lines for people and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flexbench.petals_runtime.spans import format_spans
from flexbench.server_config.sections import Section
from flexbench.server_config.swarm_check import SwarmReport
from flexbench.server_config.swarm_worker import Reachability, SwarmServer

_NAME_LENGTH = 20


def swarm_sections(report: SwarmReport) -> list[Section]:
    """The place of the new server, and the servers that are there."""
    sections = [_place(report)]
    if report.servers:
        sections.append(_servers(report.servers))
    return sections


def _place(report: SwarmReport) -> Section:
    rows = [
        ("DHT prefix", report.dht_prefix),
        ("Blocks that nobody serves", format_spans(report.missing) or "none"),
    ]
    if not report.missing:
        least = min(report.throughputs)
        weakest = f"{format_spans(report.weakest)}, {_number(least)} tokens/s"
        rows.append(("Weakest blocks", weakest))
    rows.append(("Petals would choose", format_spans([report.window])))
    if report.blocks != report.window:
        rows.append(("This server takes", format_spans([report.blocks])))
    rows += [
        ("The model with this server", _outcome(report)),
        ("Reached directly", _reached(report.reachability)),
        ("Listens on", ", ".join(report.listens_on)),
        ("Announces", ", ".join(report.visible_addresses) or "the addresses it listens on"),
    ]
    title = "A new swarm" if report.is_new else "Swarm"
    return Section(title=title, headers=("Looked for", "Found"), rows=tuple(rows), is_list=True)


def _outcome(report: SwarmReport) -> str:
    if report.still_missing:
        return f"is not complete: {format_spans(report.still_missing)} are missing"
    return "becomes complete" if report.missing else "is complete, as before"


def _reached(reachability: Reachability | None) -> str:
    if reachability is None:
        return "not known: nobody is there to ask"
    if reachability.is_reachable is None:
        return "not known: no peer answered, which Petals takes for yes"
    counts = f"{reachability.confirmations} of {reachability.answers} peers confirm it"
    return f"yes, {counts}" if reachability.is_reachable else f"no, {counts}: over relays only"


def _servers(servers: Sequence[SwarmServer]) -> Section:
    return Section(
        title="Servers",
        headers=("Peer", "blocks", "state", "tokens/s", "cache tokens", "relay", "version"),
        rows=tuple(
            (
                _name(server),
                f"{server.start}:{server.end}",
                server.state,
                _number(server.throughput),
                "?" if server.cache_tokens_left is None else str(server.cache_tokens_left),
                {True: "yes", False: "no", None: "?"}[server.using_relay],
                _clean(server.version or "?"),
            )
            for server in servers
        ),
    )


def _name(server: SwarmServer) -> str:
    """As Petals abbreviates peers, with the name that the operator gave."""
    name = f"...{server.peer_id[-6:]}"
    return f"{name} {_clean(server.public_name)}" if server.public_name else name


def _clean(text: str) -> str:
    """What strangers have announced, without anything that a terminal would obey."""
    return "".join(character for character in text if character.isprintable())[:_NAME_LENGTH]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def to_swarm_record(report: SwarmReport) -> dict[str, Any]:
    """The report as plain data. Block ranges are [start, end), rates in tokens/s."""
    reachability = report.reachability
    return {
        "dht_prefix": report.dht_prefix,
        "is_new": report.is_new,
        "servers": [asdict(server) for server in report.servers],
        "throughput_by_block": list(report.throughputs),
        "missing_blocks": [_pair(blocks) for blocks in report.missing],
        "window": _pair(report.window),
        "blocks": _pair(report.blocks),
        "still_missing_blocks": [_pair(blocks) for blocks in report.still_missing],
        "reachability": None if reachability is None else asdict(reachability),
        "listens_on": list(report.listens_on),
        "visible_addresses": list(report.visible_addresses),
    }


def _pair(blocks: range) -> list[int]:
    return [blocks.start, blocks.stop]
