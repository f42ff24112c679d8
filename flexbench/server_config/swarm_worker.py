"""The look at a swarm, in a process of its own: it runs Petals and hivemind.

The worker function reports a Stage before everything that may take long, and what it found out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexbench.core.processes import WorkerChannel

if TYPE_CHECKING:
    from flexbench.petals_runtime.imports import DHT


@dataclass(frozen=True, kw_only=True)
class SwarmQuestion:
    """What to find out, for a server of `num_blocks` blocks with these addresses. Time in s.

    Without `initial_peers`, the swarm is Petals' public one.
    """

    initial_peers: tuple[str, ...]
    dht_prefix: str
    num_hidden_layers: int
    num_blocks: int
    host_maddrs: tuple[str, ...]
    announce_maddrs: tuple[str, ...]
    identity_path: str | None
    connect_timeout_s: float


@dataclass(frozen=True)
class Stage:
    """What the worker begins now, for messages: 'no answer while <text>'."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Reachability:
    """Whether other peers reach this server directly, by Petals' rule.

    `answers` is how many peers said yes or no, and `confirmations` how many yes; at least half have
    to. `is_reachable` is None where nobody answered: Petals then takes it for reachable.
    """

    is_reachable: bool | None
    confirmations: int
    answers: int


@dataclass(frozen=True, kw_only=True)
class SwarmServer:
    """A server as the DHT describes it. Rates in tokens/s; None: it does not say."""

    peer_id: str
    start: int
    end: int
    state: str
    throughput: float
    inference_rps: float | None
    cache_tokens_left: int | None
    using_relay: bool | None
    version: str | None
    public_name: str | None


@dataclass(frozen=True, kw_only=True)
class SwarmLook:
    """The servers of the swarm, and the first of the blocks that Petals would choose."""

    visible_addresses: tuple[str, ...]
    servers: tuple[SwarmServer, ...]
    window_start: int


def look_at_swarm(channel: WorkerChannel, question: SwarmQuestion) -> None:
    """Report Stages, the Reachability and the SwarmLook."""
    channel.queue.put(Stage("loading Petals"))
    from flexbench.petals_runtime.imports import DHT, PUBLIC_INITIAL_PEERS

    # As run_server does it: peers, and addresses of the server itself.
    network = {
        "initial_peers": list(question.initial_peers or PUBLIC_INITIAL_PEERS),
        "host_maddrs": list(question.host_maddrs),
        "announce_maddrs": list(question.announce_maddrs) or None,
        "startup_timeout": question.connect_timeout_s,
        # A look should leave no key file behind: without one, any identity does.
        "identity_path": _existing(question.identity_path),
    }
    channel.queue.put(Stage("asking its peers whether they reach this server directly"))
    channel.queue.put(_reachability(network))
    channel.queue.put(Stage("joining its DHT"))
    dht = DHT(
        client_mode=True,
        num_workers=question.num_hidden_layers,
        start=True,
        **{**network, "use_auto_relay": False},
    )
    channel.queue.put(Stage("reading who serves which blocks"))
    channel.queue.put(_look(dht, question))
    dht.shutdown()


def _existing(path: str | None) -> str | None:
    return path if path is not None and os.path.isfile(path) else None


def _reachability(network: dict[str, Any]) -> Reachability:
    """Petals' own check, with an ear at what the peers answer."""
    from flexbench.petals_runtime.imports import reachability

    answers: list[bool] = []
    protocol = reachability.ReachabilityProtocol
    original = protocol.call_check

    # Not a subclass: peers know the protocol by its class's name.
    async def overheard(self: Any, **question: Any) -> bool | None:
        answer: bool | None = await original(self, **question)
        if answer is not None:
            answers.append(answer)
        return answer

    protocol.call_check = overheard
    try:
        is_reachable = reachability.check_direct_reachability(use_relay=False, **network)
    finally:
        protocol.call_check = original
    return Reachability(is_reachable=is_reachable, confirmations=sum(answers), answers=len(answers))


def _look(dht: DHT, question: SwarmQuestion) -> SwarmLook:
    from flexbench.petals_runtime.imports import (
        ServerState,
        choose_best_blocks,
        compute_spans,
        get_remote_module_infos,
    )

    blocks = range(question.num_hidden_layers)
    uids = [f"{question.dht_prefix}.{block}" for block in blocks]
    infos = get_remote_module_infos(dht, uids, latest=True)
    spans = compute_spans(infos, min_state=ServerState.JOINING)
    servers = [_server(peer_id, span) for peer_id, span in spans.items()]
    return SwarmLook(
        visible_addresses=tuple(map(_without_peer_id, map(str, dht.get_visible_maddrs()))),
        servers=tuple(sorted(servers, key=lambda s: (s.start, s.end, s.peer_id))),
        window_start=choose_best_blocks(question.num_blocks, infos)[0],
    )


def _server(peer_id: Any, span: Any) -> SwarmServer:
    info = span.server_info
    return SwarmServer(
        peer_id=str(peer_id),
        start=span.start,
        end=span.end,
        state=info.state.name.lower(),
        throughput=info.throughput,
        inference_rps=info.inference_rps,
        cache_tokens_left=info.cache_tokens_left,
        using_relay=info.using_relay,
        version=info.version,
        public_name=info.public_name,
    )


def _without_peer_id(address: str) -> str:
    """The server gets an identity of its own: that of the look means nothing."""
    return address.rpartition("/p2p/")[0] or address
