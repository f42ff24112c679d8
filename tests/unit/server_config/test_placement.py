"""Which blocks servers take, and what many of them give."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.server_config.placement import best_start, servers_for, swarm_throughput


@pytest.mark.parametrize(
    ("throughputs", "num_blocks", "start"),
    [
        # The first of equals
        ([0, 0, 0, 0], 2, 0),
        ([5], 1, 0),
        ([5, 5, 5], 3, 0),
        # Where nobody is
        ([1, 1, 0, 0], 2, 2),
        ([1, 0, 1, 1], 1, 1),
        # One block without a server counts more than any sum of the others: [0, 9], [0, 9], [9, 9]
        ([9, 0, 9, 9], 2, 0),
        # [0, 9, 9], [0, 1, 9], [0, 1, 9], [1, 9, 9]
        ([9, 9, 0, 1, 9, 9], 3, 1),
        # The least of [1, 5], [1, 5], [2, 5], [2, 3]
        ([5, 1, 5, 2, 3], 2, 0),
        # The smallest are equal: the second smallest decide. [1, 7], [1, 4], [2, 4], [2, 4]
        ([7, 1, 4, 2, 4], 2, 1),
        # Order within a window is of no account: [2, 3], [1, 3], [1, 2]
        ([2, 3, 1, 2], 2, 2),
        ([0.3, 0.1, 0.2], 1, 1),
    ],
)
def test_the_window_that_needs_a_server_most(throughputs, num_blocks, start):
    assert best_start(throughputs, num_blocks) == start


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_no_other_window_is_worse_off(throughputs, data):
    num_blocks = data.draw(st.integers(1, len(throughputs)))
    start = best_start(throughputs, num_blocks)
    windows = [
        sorted(throughputs[first : first + num_blocks])
        for first in range(len(throughputs) - num_blocks + 1)
    ]
    assert all(windows[start] < window for window in windows[:start])
    assert all(windows[start] <= window for window in windows[start:])


@pytest.mark.parametrize(
    ("layers", "num_blocks", "servers"),
    [(70, 15, 5), (70, 14, 5), (70, 70, 1), (70, 69, 2), (70, 1, 70), (1, 1, 1)],
)
def test_the_fewest_servers(layers, num_blocks, servers):
    assert servers_for(layers, num_blocks) == servers


@pytest.mark.parametrize(
    ("layers", "num_blocks", "servers", "tokens_per_s"),
    [
        (70, 15, 0, 0),
        (70, 15, 4, 0),
        (70, 15, 5, 10),
        (70, 70, 1, 10),
        (70, 70, 7, 70),
        # Blocks 0-2, 3-5, 5-7; again 0-2, then 2-4, and only the sixth brings a second server to
        # the last two.
        (8, 3, 3, 10),
        (8, 3, 5, 10),
        (8, 3, 6, 20),
        # Blocks 0-1, 1-2, 0-1: six places for three blocks, and still one server for block 2.
        (3, 2, 2, 10),
        (3, 2, 3, 10),
        (3, 2, 4, 20),
    ],
)
def test_the_block_with_the_fewest_servers_decides(layers, num_blocks, servers, tokens_per_s):
    assert swarm_throughput(layers, num_blocks, servers, 10.0) == pytest.approx(tokens_per_s)


swarms = st.integers(1, 40).flatmap(
    lambda layers: st.tuples(st.just(layers), st.integers(1, layers), st.integers(0, 30))
)


@settings(deadline=None)
@given(swarms)
def test_the_fewest_servers_hold_the_whole_model_and_fewer_do_not(swarm):
    layers, num_blocks, _ = swarm
    fewest = servers_for(layers, num_blocks)
    assert swarm_throughput(layers, num_blocks, fewest, 3.5) == 3.5
    assert swarm_throughput(layers, num_blocks, fewest - 1, 3.5) == 0


@settings(deadline=None)
@given(swarms)
def test_another_server_never_gives_less(swarm):
    layers, num_blocks, servers = swarm
    here = swarm_throughput(layers, num_blocks, servers, 3.5)
    assert here <= swarm_throughput(layers, num_blocks, servers + 1, 3.5) <= here + 3.5


@settings(deadline=None)
@given(swarms)
def test_a_swarm_gives_no_more_than_its_servers_have(swarm):
    layers, num_blocks, servers = swarm
    given_rate = swarm_throughput(layers, num_blocks, servers, 3.5)
    assert given_rate * layers <= servers * num_blocks * 3.5


@settings(deadline=None)
@given(swarms, st.floats(0.1, 1e4))
def test_the_speed_of_a_server_is_a_factor(swarm, tokens_per_s):
    # Rounding does not decide where servers go.
    layers, num_blocks, servers = swarm
    assert swarm_throughput(layers, num_blocks, servers, tokens_per_s) == pytest.approx(
        swarm_throughput(layers, num_blocks, servers, 1.0) * tokens_per_s, rel=1e-12
    )
