"""The look at a swarm, in a process of its own: it runs Petals and hivemind.

The worker function reports a Stage before everything that may take long, and what it found out.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexbench.core.processes import WorkerChannel

if TYPE_CHECKING:
    from flexbench.petals_runtime.imports import DHT

# Peers that say nothing are not to take the time that the look itself needs.
_LONGEST_REACHABILITY_CHECK_S = 30.0


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
        # No identity of its own: a server that runs may have it, and hivemind refuses a second one.
    }
    channel.queue.put(Stage("connecting to its peers"))
    limit_s = min(_LONGEST_REACHABILITY_CHECK_S, question.connect_timeout_s / 2)
    channel.queue.put(_reachability(network, limit_s, channel.queue.put))
    channel.queue.put(Stage("connecting to its peers for a look at its DHT"))
    dht = DHT(
        client_mode=True,
        num_workers=question.num_hidden_layers,
        start=True,
        **{**network, "use_auto_relay": False},
    )
    channel.queue.put(Stage("reading who serves which blocks"))
    channel.queue.put(_look(dht, question))
    dht.shutdown()


@dataclass(frozen=True)
class _Verdict:
    is_reachable: bool | None


def _reachability(
    network: dict[str, Any], limit_s: float, tell: Callable[[Stage], None]
) -> Reachability:
    """Petals' own check, with an ear at what the peers answer; not known after `limit_s`."""
    heard: queue.SimpleQueue[Stage | bool | _Verdict | BaseException] = queue.SimpleQueue()
    threading.Thread(target=_check_reachability, args=(network, heard), daemon=True).start()
    expires_at = time.monotonic() + limit_s
    answers: list[bool] = []
    is_reachable = None
    while True:
        try:
            news = heard.get(timeout=max(0.0, expires_at - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(news, Stage):
            tell(news)
        elif isinstance(news, bool):
            answers.append(news)
        elif isinstance(news, _Verdict):
            is_reachable = news.is_reachable
            break
        else:
            raise news
    return Reachability(is_reachable=is_reachable, confirmations=sum(answers), answers=len(answers))


def _check_reachability(network: dict[str, Any], heard: queue.SimpleQueue[Any]) -> None:
    """Put the stage once there are peers to ask, every answer, and the verdict or what failed."""
    from flexbench.petals_runtime.imports import reachability

    protocol = reachability.ReachabilityProtocol
    call_check, serve = protocol.call_check, protocol.serve

    # Not a subclass: peers know the protocol by its class's name. The process is ours alone.
    async def overheard(self: Any, **question: Any) -> bool | None:
        answer: bool | None = await call_check(self, **question)
        if answer is not None:
            heard.put(answer)
        return answer

    def served(self: Any, p2p: Any) -> Any:
        heard.put(Stage("asking its peers whether they reach this server directly"))
        return serve(self, p2p)

    protocol.call_check, protocol.serve = overheard, served
    try:
        heard.put(_Verdict(reachability.check_direct_reachability(use_relay=False, **network)))
    except BaseException as error:  # noqa: BLE001 - the main thread raises it
        heard.put(error)


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
