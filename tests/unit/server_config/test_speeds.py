"""What a server's speed is to a swarm and to one client, by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.server_config.speeds import (
    DEFAULT_INFERENCE_RPS,
    Network,
    client_step_s,
    server_throughput,
    sufficient_forward_rps,
)

rates = st.floats(1e-3, 1e9)
block_counts = st.integers(1, 200)


@pytest.mark.parametrize(
    ("network", "hidden_size", "rps"),
    [
        (Network(), 14336, 100e6 / 229_376),
        (Network(), 4096, 1525.87890625),
        (Network(download_bits_per_s=10e6), 1000, 625.0),
        (Network(upload_bits_per_s=10e6), 1000, 625.0),
        (Network(download_bits_per_s=1e9, upload_bits_per_s=2e9), 1000, 62_500.0),
    ],
)
def test_the_slower_direction_carries_values_of_16_bits(network, hidden_size, rps):
    assert network.rps(hidden_size) == pytest.approx(rps, rel=1e-15)


def test_bloom_over_the_network_that_petals_assumes():
    assert Network().rps(14336) == pytest.approx(435.9654, abs=1e-4)
    assert Network().source == "assumed, as Petals does"


@pytest.mark.parametrize(
    ("forward_rps", "network_rps", "num_blocks", "relay", "tokens_per_s", "limited_by"),
    [
        # (10 + 1) / 2 blocks on average
        (1100.0, 1000.0, 10, False, 200.0, "compute"),
        (1100.0, 100.0, 10, False, 100.0, "network"),
        (1100.0, 1000.0, 1, False, 1000.0, "network"),
        (1100.0, 5000.0, 1, False, 1100.0, "compute"),
        # A fifth of the network is left over a relay.
        (1100.0, 900.0, 10, True, 180.0, "network (relay)"),
        (1100.0, 1100.0, 10, True, 200.0, "compute"),
        # Equal: computing is named.
        (1100.0, 200.0, 10, False, 200.0, "compute"),
    ],
)
def test_the_narrowest_part_decides(
    forward_rps, network_rps, num_blocks, relay, tokens_per_s, limited_by
):
    throughput = server_throughput(forward_rps, network_rps, num_blocks, relay=relay)
    assert throughput.tokens_per_s == pytest.approx(tokens_per_s, rel=1e-12)
    assert throughput.limited_by == limited_by
    assert throughput.is_upper_bound is False


@pytest.mark.parametrize(
    ("relay", "tokens_per_s", "limited_by"),
    [(False, 500.0, "network"), (True, 100.0, "network (relay)")],
)
def test_without_a_measured_speed_the_network_is_the_bound(relay, tokens_per_s, limited_by):
    throughput = server_throughput(None, 500.0, 10, relay=relay)
    assert throughput.tokens_per_s == pytest.approx(tokens_per_s, rel=1e-12)
    assert throughput.limited_by == limited_by
    assert throughput.is_upper_bound is True


@pytest.mark.parametrize(
    ("network_rps", "num_blocks", "relay", "expected"),
    [(200.0, 10, False, 1100.0), (200.0, 1, False, 200.0), (1000.0, 9, True, 1000.0)],
)
def test_sufficient_speed_by_hand(network_rps, num_blocks, relay, expected):
    found = sufficient_forward_rps(network_rps, num_blocks, relay=relay)
    assert found == pytest.approx(expected, rel=1e-12)


@given(rates, block_counts, st.booleans())
def test_from_the_sufficient_speed_on_the_network_limits(network_rps, num_blocks, relay):
    enough = sufficient_forward_rps(network_rps, num_blocks, relay=relay)
    bound = server_throughput(None, network_rps, num_blocks, relay=relay)

    faster = server_throughput(enough * 1.001, network_rps, num_blocks, relay=relay)
    assert (faster.tokens_per_s, faster.limited_by) == (bound.tokens_per_s, bound.limited_by)

    slower = server_throughput(enough * 0.999, network_rps, num_blocks, relay=relay)
    assert slower.tokens_per_s == pytest.approx(bound.tokens_per_s * 0.999, rel=1e-9)
    assert slower.limited_by == "compute"


@given(rates, rates, block_counts, st.booleans())
def test_more_blocks_or_a_relay_never_give_more(forward_rps, network_rps, num_blocks, relay):
    here = server_throughput(forward_rps, network_rps, num_blocks, relay=relay).tokens_per_s
    wider = server_throughput(forward_rps, network_rps, num_blocks + 1, relay=relay).tokens_per_s
    direct = server_throughput(forward_rps, network_rps, num_blocks, relay=False).tokens_per_s
    bound = server_throughput(None, network_rps, num_blocks, relay=relay).tokens_per_s
    assert 0 < wider <= here <= min(direct, bound)


@pytest.mark.parametrize(
    ("layers", "hops", "rtt_s", "inference_rps", "seconds"),
    [
        # 70 blocks at 300/s; three times 18 ms and 10 ms there; 10 ms back
        (70, 3, 0.02, 300.0, 70 / 300 + 3 * 0.028 + 0.01),
        (70, 3, 0.02, 700.0, 0.194),
        (32, 1, 0.0, 320.0, 0.118),
        # Unknown: 150 ms one way
        (70, 3, None, 700.0, 0.1 + 3 * 0.168 + 0.15),
        # One way takes no more than 5 s, however long the round trip.
        (70, 1, 10.0, 700.0, 0.1 + 5.018 + 5.0),
        (70, 1, 12.0, 700.0, 0.1 + 5.018 + 5.0),
        (70, 2, math.inf, 700.0, 0.1 + 2 * 5.018 + 5.0),
    ],
)
def test_one_token_of_one_client(layers, hops, rtt_s, inference_rps, seconds):
    assert client_step_s(layers, hops, rtt_s, inference_rps) == pytest.approx(seconds, rel=1e-12)


def test_clients_assume_300_blocks_per_second():
    assert DEFAULT_INFERENCE_RPS == 300


@given(block_counts, st.integers(1, 200), st.none() | st.floats(0, 20), rates)
def test_every_hop_costs_the_same(layers, hops, rtt_s, inference_rps):
    one = client_step_s(layers, hops, rtt_s, inference_rps)
    two = client_step_s(layers, hops + 1, rtt_s, inference_rps)
    delay = 0.15 if rtt_s is None else min(rtt_s / 2, 5.0)
    assert two - one == pytest.approx(0.018 + delay, rel=1e-6, abs=1e-9 * one)
