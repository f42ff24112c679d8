"""What a look at a swarm means, and what a launched server's figures say of the estimate."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from flexbench.core.errors import WorkerError
from flexbench.core.progress import Silence
from flexbench.models.families import DecoderSpec, decoder_spec
from flexbench.petals_runtime.server_process import ServerFacts
from flexbench.petals_runtime.spans import ranges_of
from flexbench.server_config.addresses import resolve_entrance
from flexbench.server_config.comparison import (
    compare,
    comparison_section,
    server_record,
    server_section,
)
from flexbench.server_config.config import ServerConfig, resolve_machine
from flexbench.server_config.estimate import Estimate, estimate
from flexbench.server_config.run_server import SwarmEntrance
from flexbench.server_config.speeds import ComputeSpeed, Network
from flexbench.server_config.swarm_check import SwarmReport, _unreachable, check_swarm
from flexbench.server_config.swarm_sections import swarm_sections, to_swarm_record
from flexbench.server_config.swarm_worker import Reachability, SwarmServer
from flexbench.server_config.tables import print_sections


def server(start: int, end: int, throughput: float, state: str = "online") -> SwarmServer:
    return SwarmServer(
        peer_id="12D3KooWKMPJ2wZhc7VM7hfSDJmEwAExV3bgf2hYShyANcfvJxUA",
        start=start,
        end=end,
        state=state,
        throughput=throughput,
        inference_rps=None,
        cache_tokens_left=4096,
        using_relay=False,
        version="2.2.0.post1",
        public_name=None,
    )


REPORT = SwarmReport(
    dht_prefix="bloom",
    is_new=False,
    num_hidden_layers=10,
    servers=(server(0, 4, 100.5), server(2, 6, 20), server(6, 8, 7, state="joining")),
    window=range(7, 10),
    blocks=range(7, 10),
    reachability=Reachability(is_reachable=True, confirmations=2, answers=3),
    listens_on=("/ip4/127.0.0.1/tcp/0",),
    visible_addresses=("/ip4/127.0.0.1/tcp/31337",),
)


def test_only_servers_that_are_online_count():
    assert REPORT.throughputs == (100.5, 100.5, 120.5, 120.5, 20, 20, 0, 0, 0, 0)
    assert REPORT.missing == (range(6, 10),)
    assert REPORT.weakest == (range(6, 10),)
    assert REPORT.still_missing == (range(6, 7),)
    whole = replace(REPORT, servers=(*REPORT.servers, server(6, 10, 30)))
    assert whole.missing == whole.still_missing == ()
    assert whole.weakest == (range(4, 6),)
    assert replace(REPORT, blocks=range(5, 10)).still_missing == ()


def test_ranges_of_numbers():
    assert ranges_of([]) == ()
    assert ranges_of([0, 1, 2, 5, 7, 8]) == (range(3), range(5, 6), range(7, 9))


def shown(sections) -> str:
    text = io.StringIO()
    print_sections(Console(file=text, width=80), sections)
    lines = text.getvalue().splitlines()
    # What is there to be copied stays in one piece.
    assert all(cell_len(line) <= 80 for line in lines if not line.startswith("--initial-peers"))
    return " ".join(text.getvalue().split())


def test_a_report_for_people():
    text = shown(swarm_sections(REPORT))
    assert "Blocks that nobody serves 6:10" in text
    assert "Petals would choose 7:10" in text
    assert "is not complete: 6:7 are missing" in text
    assert "yes, 2 of 3 peers confirm it" in text
    assert "This server takes" not in text
    assert "...fvJxUA 0:4 online 100 4096 no 2.2.0.post1" in text


@pytest.mark.parametrize(
    ("reachability", "words"),
    [
        (None, "nobody is there to ask"),
        (Reachability(is_reachable=None, confirmations=0, answers=0), "Petals takes for yes"),
        (Reachability(is_reachable=False, confirmations=0, answers=2), "over relays only"),
    ],
)
def test_reachability_in_words(reachability, words):
    assert words in shown(swarm_sections(replace(REPORT, reachability=reachability)))
    needs_relay = reachability is not None and reachability.is_reachable is False
    assert replace(REPORT, reachability=reachability).needs_relay is needs_relay


def test_a_stranger_s_name_cannot_control_the_terminal():
    stranger = replace(server(0, 10, 5), public_name="\x1b[2J\x07evil\n" + "x" * 100)
    text = shown(swarm_sections(replace(REPORT, servers=(stranger,))))
    assert "\x1b" not in text
    assert "[2Jevil" in text
    assert "x" * 21 not in text


def test_a_report_as_plain_data():
    record = json.loads(json.dumps(to_swarm_record(REPORT), allow_nan=False))
    assert record["missing_blocks"] == [[6, 10]]
    assert record["still_missing_blocks"] == [[6, 7]]
    assert record["window"] == [7, 10]
    assert record["servers"][0]["throughput"] == 100.5
    assert record["reachability"] == {"is_reachable": True, "confirmations": 2, "answers": 3}


@pytest.fixture
def spec() -> DecoderSpec:
    return decoder_spec(
        "bloom-tiny",
        {
            "model_type": "bloom",
            "hidden_size": 64,
            "n_head": 4,
            "n_layer": 6,
            "torch_dtype": "float32",
        },
    )


def test_a_new_swarm_starts_nothing_and_begins_with_the_first_block(spec):
    report = check_swarm(
        spec,
        resolve_entrance(SwarmEntrance(new_swarm=True), listens=True),
        4,
        connect_timeout_s=1,
        progress=Silence(),
    )
    assert report.window == report.blocks == range(4)
    assert report.missing == (range(6),)
    assert report.still_missing == (range(4, 6),)
    assert report.reachability is None
    assert "A new swarm" in shown(swarm_sections(report))


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("failed to connect to bootstrap peers", "none of its peers answers: they are down, not"),
        ("dial: Peer ID mismatch: expected 1, but", "who answers there has another peer id"),
    ],
)
def test_known_reasons_are_told_in_words(said, meaning):
    details = "Traceback (most recent call last):\n  ...\nFull log: /tmp/swarm-check.log"
    error = WorkerError("swarm check", f"failed: P2PDaemonError: {said}", details=details)
    known = _unreachable("PEER", error, "connecting to its peers")
    assert known.message.startswith(f"the swarm cannot be reached through PEER: {meaning}")
    assert "P2PDaemonError" not in known.message
    assert known.details == "Full log: /tmp/swarm-check.log"


def test_other_reasons_are_told_as_they_are():
    error = WorkerError("swarm check", "was killed by SIGKILL", details="last lines")
    unknown = _unreachable("PEER", error, "loading Petals")
    assert unknown.message == (
        "the swarm cannot be reached through PEER: was killed by SIGKILL, while loading Petals"
    )
    assert unknown.details == "last lines"


def estimate_of(spec: DecoderSpec, forward_rps: float | None) -> Estimate:
    config = ServerConfig(model=spec, device="cpu", torch_dtype="float32", num_blocks=3)
    machine = resolve_machine(config, is_this_machine=True)
    compute = ComputeSpeed(forward_rps=forward_rps)
    return estimate(config, machine, compute=compute, network=Network())[0]


FACTS = ServerFacts(
    peer_id="12D3KooWKMPJ2wZhc7VM7hfSDJmEwAExV3bgf2hYShyANcfvJxUA",
    visible_addresses=("/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWKMPJ2wZhc7VM7hfSDJmEwAExV3bgf2hYShy",),
    start=0,
    end=3,
    torch_dtype="float32",
    quant_type="none",
    weights_bytes=3 * 4 * (12 * 64**2 + 13 * 64),
    cache_bytes=3 * 2 * 64 * 4096 * 4,
    cache_tokens_left=3 * 2 * 4096,
    throughput=40.0,
    forward_rps=80.0,
    inference_rps=9.0,
    network_rps=50_000.0,
    using_relay=False,
    memory_before_bytes=1000,
    memory_after_bytes=1000,
)


def test_predictions_beside_measurements(spec):
    by_name = {one.name: one for one in compare(estimate_of(spec, 100.0), FACTS)}
    assert by_name["Weights"].error == pytest.approx(0.01, abs=1e-4)
    assert by_name["Attention cache"].error == 0
    assert by_name["Cache tokens announced"].error == 0
    assert by_name["Throughput announced"].predicted == 50
    assert by_name["Throughput announced"].error == pytest.approx(0.25)
    assert by_name["Inference, one block"].error is None
    assert by_name["Memory taken by loading"].error is None  # nothing was measured


def test_an_upper_bound_is_no_prediction(spec):
    comparisons = compare(estimate_of(spec, None), FACTS)
    by_name = {one.name: one for one in comparisons}
    assert by_name["Throughput announced"].predicted is None
    text = shown([server_section(FACTS), comparison_section(comparisons)])
    assert "Throughput announced not known 40 tokens/s" in text
    assert "Weights 592 KiB 586 KiB +1.0%" in text


def test_the_record_of_a_server_is_plain_data(spec):
    record = server_record(
        started_at="2026-01-01T00:00:00.000+00:00",
        configuration={"command": "python"},
        predicted={"num_blocks": 3},
        facts=FACTS,
        comparisons=compare(estimate_of(spec, None), FACTS),
    )
    again = json.loads(json.dumps(record, allow_nan=False))
    assert (again["schema_version"], again["system"], again["status"]) == (1, "server-config", "ok")
    assert again["measured"]["num_blocks"] == 3
    assert {"name", "unit", "predicted", "measured", "error"} == set(again["comparison"][0])
    assert again["versions"]["flexbench"]
