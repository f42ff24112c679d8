"""What a server's speed means to the swarm and to one client.

A request is the hidden state of one token, as in Petals: all rates are tokens/s. Sources:
petals/server/throughput.py (get_server_throughput, measure_network_rps) and
petals/client/routing/sequence_manager.py (_build_inference_graph).
"""

from __future__ import annotations

from dataclasses import dataclass

BITS_PER_VALUE = 16
DEFAULT_BITS_PER_S = 100e6
RELAY_PENALTY = 0.2
# The client's assumptions about a chain of servers.
HOP_OVERHEAD_S = 0.018
UNKNOWN_DELAY_S = 0.15
MAX_DELAY_S = 5.0
DEFAULT_INFERENCE_RPS = 300.0


@dataclass(frozen=True, kw_only=True)
class Network:
    """Bandwidth of a server, in bit/s, and where the numbers come from."""

    download_bits_per_s: float = DEFAULT_BITS_PER_S
    upload_bits_per_s: float = DEFAULT_BITS_PER_S
    source: str = "assumed, as Petals does"

    def rps(self, hidden_size: int) -> float:
        """Hidden states of `hidden_size` values that get through in a second."""
        slower = min(self.download_bits_per_s, self.upload_bits_per_s)
        return slower / (hidden_size * BITS_PER_VALUE)


@dataclass(frozen=True, kw_only=True)
class ComputeSpeed:
    """Tokens/s through one block, None where unknown, and where the numbers come from.

    `forward_rps` is for batches of 1024 tokens, `inference_rps` for one token at a time.
    """

    forward_rps: float | None = None
    inference_rps: float | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What a server announces, in tokens/s, and which part of it is the narrowest."""

    tokens_per_s: float
    limited_by: str
    is_upper_bound: bool
    """Whether the speed of computing is unknown, and may be the lower one."""


def server_throughput(
    forward_rps: float | None, network_rps: float, num_blocks: int, *, relay: bool
) -> Throughput:
    """The smaller of computing and network.

    A request enters at any block of the server, so it runs through (num_blocks + 1) / 2 of them on
    average.
    """
    network = network_rps * (RELAY_PENALTY if relay else 1)
    network_name = "network (relay)" if relay else "network"
    if forward_rps is None:
        return Throughput(tokens_per_s=network, limited_by=network_name, is_upper_bound=True)
    compute = forward_rps / ((num_blocks + 1) / 2)
    return Throughput(
        tokens_per_s=min(compute, network),
        limited_by="compute" if compute <= network else network_name,
        is_upper_bound=False,
    )


def sufficient_forward_rps(network_rps: float, num_blocks: int, *, relay: bool) -> float:
    """From which forward_rps on the network is what limits a server."""
    return network_rps * (RELAY_PENALTY if relay else 1) * (num_blocks + 1) / 2


def client_step_s(
    num_hidden_layers: int, hops: int, rtt_s: float | None, inference_rps: float
) -> float:
    """Seconds for one token of one client through `hops` servers, as Petals' clients estimate it.

    Each server on the way costs the way there and an overhead, the last one the way back, too, and
    every block 1 / inference_rps. `rtt_s` is a round trip between any two of them; None: unknown.
    """
    delay = UNKNOWN_DELAY_S if rtt_s is None else min(rtt_s / 2, MAX_DELAY_S)
    return num_hidden_layers / inference_rps + hops * (HOP_OVERHEAD_S + delay) + delay
