"""Which blocks a server takes in a swarm, and what a swarm of equal servers gives.

Source: petals/server/block_selection.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from operator import sub


def best_start(throughputs: Sequence[float], num_blocks: int) -> int:
    """The first block of the window that needs a server most.

    `throughputs` has what the swarm offers for each block, in tokens/s. Of all windows of
    `num_blocks`, the one whose throughputs, in ascending order, come first in the dictionary.
    """
    # Sorting every window takes most of a large swarm's time. The first of them has the most blocks
    # of the least throughput, whatever its others are: only those with equally many are sorted.
    least = min(throughputs)
    before = list(accumulate((value == least for value in throughputs), initial=0))
    counts = list(map(sub, before[num_blocks:], before))
    most = max(counts)
    starts = [start for start, count in enumerate(counts) if count == most]
    return min(starts, key=lambda start: sorted(throughputs[start : start + num_blocks]))


def servers_for(num_hidden_layers: int, num_blocks: int) -> int:
    """The fewest servers of `num_blocks` blocks that hold the whole model."""
    return math.ceil(num_hidden_layers / num_blocks)


def swarm_throughput(
    num_hidden_layers: int, num_blocks: int, num_servers: int, server_tokens_per_s: float
) -> float:
    """Tokens/s through all blocks when equal servers have joined one after another.

    It is the throughput of the block that is served least; 0 while a block has no server.
    """
    least = _fewest_servers_of_a_block(num_hidden_layers, num_blocks, num_servers)
    return least * server_tokens_per_s


@functools.lru_cache(maxsize=1024)  # the sizes of a sweep often hold equally many blocks
def _fewest_servers_of_a_block(num_hidden_layers: int, num_blocks: int, num_servers: int) -> int:
    # Counted in whole servers: rounding would otherwise decide between equal windows.
    servers = [0] * num_hidden_layers
    for _ in range(num_servers):
        start = best_start(servers, num_blocks)
        for block in range(start, start + num_blocks):
            servers[block] += 1
    return min(servers)
