"""Clients against a swarm that somebody else runs, and the functions behind the command."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from flexbench.core.errors import ConfigError, RunError, WorkerError
from flexbench.core.processes import Deadline, Item
from flexbench.models.shapes import opt_shape
from flexbench.petals import run_bench
from flexbench.petals.model import SwarmModel
from flexbench.petals_runtime.crew import open_crew
from tests.integration import workers

pytestmark = pytest.mark.swarm

PEER_ID = "12D3KooWKMPJ2wZhc7VM7hfSDJmEwAExV3bgf2hYShyANcfvJxUA"


@pytest.fixture(scope="module")
def swarm():
    """What serve_swarm prints of its swarm."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.serve_swarm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as server:
        line = server.stdout.readline()
        assert line, "the swarm did not start"
        yield json.loads(line)
        server.stdin.close()
        assert server.wait(20) == 0


@pytest.fixture
def model(swarm) -> SwarmModel:
    return SwarmModel(
        shape=opt_shape("opt-125m"),
        dht_prefix="facebook/opt-125m",
        initial_peers=tuple(swarm["initial_peers"]),
        weights_folder=swarm["weights_folder"],
        seed=11,
    )


def arguments(swarm, *more: object) -> list[object]:
    return ["petals", "--prefix", "opt-125m", "--initial_peers", *swarm["initial_peers"], *more]


def test_greedy_output_over_the_swarm_equals_the_local_model(model, tmp_path, temporary_folder):
    with open_crew() as crew:
        crew.start("client", workers.generate_with_the_swarm_and_alone, model, 20, 12)
        _, message = crew.next_message(Deadline(120, lambda: "no tokens"))
    assert isinstance(message, Item)
    swarm_tokens, local_tokens = message.payload
    assert len(swarm_tokens) == 2
    assert all(len(row) == 20 + 12 for batch in swarm_tokens for row in batch)
    assert swarm_tokens == local_tokens
    # Prompts of one client differ from each other.
    prompts = [tuple(row[:20]) for batch in swarm_tokens for row in batch]
    assert len(set(prompts)) == 4


def test_run_bench_appends_a_row_and_returns_it(model, tmp_path, temporary_folder):
    args = SimpleNamespace(
        batch_size=2, num_micro_batches=2, num_processes=2, output=str(tmp_path / "rows.tsv")
    )
    row = run_bench(args, 12, 3, model)
    assert (row.batch_size, row.num_micro_batches, row.num_processes) == (2, 2, 2)
    assert (row.sequence_length, row.max_tokens) == (12, 3)
    assert row.throughput > 0
    lines = (tmp_path / "rows.tsv").read_text().splitlines()
    assert lines[1].split("\t")[5:] == [repr(row.throughput), repr(row.mean_latency)]
    record = json.loads((tmp_path / "rows.jsonl").read_text())
    assert record["figures"]["total_tokens"] == 2 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("changes", "lengths", "option"),
    [
        ({"num_processes": 0}, (8, 1), "--num-processes"),
        ({"num_micro_batches": 0}, (8, 1), "--num-micro-batches"),
        ({"batch_size": -1}, (8, 1), "--batch-size"),
        ({}, (0, 1), "--sequence-length"),
        ({}, (8, -1), "--max-tokens"),
    ],
)
def test_run_bench_refuses_counts_that_make_no_run(model, tmp_path, changes, lengths, option):
    args = {"batch_size": 1, "num_micro_batches": 1, "num_processes": 1, **changes}
    with pytest.raises(ConfigError, match=option):
        run_bench(SimpleNamespace(**args, output=tmp_path / "rows.tsv"), *lengths, model)
    assert list(tmp_path.iterdir()) == []


def test_run_bench_names_a_prefix_that_nobody_serves(model, tmp_path, temporary_folder):
    args = SimpleNamespace(
        batch_size=1, num_micro_batches=1, num_processes=1, output=tmp_path / "rows.tsv"
    )
    with pytest.raises(RunError, match="nobody serves blocks 0:12 of 12 under the DHT prefix 'x'"):
        run_bench(args, 8, 1, replace(model, dht_prefix="x"))


def test_run_bench_reports_a_failed_client_and_writes_no_row(model, tmp_path, temporary_folder):
    args = SimpleNamespace(
        batch_size=1, num_micro_batches=1, num_processes=1, output=tmp_path / "rows.tsv"
    )
    # Longer than a server's inference_max_length of 2048.
    with pytest.raises(WorkerError, match="client 0 failed"):
        run_bench(args, 3000, 1, model)
    assert not (tmp_path / "rows.tsv").exists()
    assert json.loads((tmp_path / "rows.jsonl").read_text())["status"] == "failed"


def test_the_functions_keep_the_contract_of_the_original(swarm, tmp_path, temporary_folder):
    """With multiprocessing's own events and queue, and Petals' own configuration."""
    script = tmp_path / "original.py"
    script.write_text(
        "import argparse, json, multiprocessing, sys\n"
        "from flexbench.petals import client_process, run_bench\n"
        "if __name__ == '__main__':\n"
        "    from flexbench.petals_runtime.imports import DistributedBloomConfig\n"
        "    from flexbench.petals.model import _patch_bloom_config\n"
        "    from flexbench.models.shapes import opt_shape\n"
        "    config = DistributedBloomConfig(\n"
        "        initial_peers=json.loads(sys.argv[1]), dht_prefix='facebook/opt-125m')\n"
        "    _patch_bloom_config(config, opt_shape('opt-125m'))\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    warm, start, queue = context.Event(), context.Event(), context.Queue()\n"
        "    process = context.Process(\n"
        "        target=client_process, args=(warm, start, config, 2, 1, 8, 4, 0, queue))\n"
        "    process.start()\n"
        "    assert warm.wait(60), 'no warm-up'\n"
        "    assert queue.empty(), 'measured before the release'\n"
        "    start.set()\n"
        "    latencies = [queue.get(timeout=60) for _ in range(2)]\n"
        "    process.join(30)\n"
        "    args = argparse.Namespace(\n"
        "        batch_size=1, num_micro_batches=1, num_processes=2, output=sys.argv[2])\n"
        "    row = run_bench(args, 8, 2, config)\n"
        "    print(json.dumps([process.exitcode, row.num_processes, *latencies]))\n"
    )
    done = subprocess.run(
        [sys.executable, script, json.dumps(swarm["initial_peers"]), tmp_path / "rows.tsv"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    exit_code, num_processes, *latencies = json.loads(done.stdout)
    assert (exit_code, num_processes) == (0, 2)
    assert len((tmp_path / "rows.tsv").read_text().splitlines()) == 2
    assert len(latencies) == 2
    assert all(0 < latency < 60 for latency in latencies)


def test_a_running_swarm_is_measured_with_its_route_on_record(flexbench, swarm):
    command = flexbench(
        *arguments(swarm, "--sequence-length", 16, "--max-tokens", 2, "--num-processes", 2, "-q")
    )
    assert command.finish(90) == 0, command.stderr
    assert command.stdout == command.stderr == ""
    record = json.loads((command.folder / "results/petals.jsonl").read_text())
    assert record["swarm"]["servers"] == swarm["servers"]
    assert record["swarm"]["embedded"] is False
    assert [c["requests"][0]["route"] for c in record["clients"]] == [swarm["servers"]] * 2
    command.assert_nothing_left()
    assert command.temporary_files() == []


def test_blocks_that_nobody_serves_are_named(flexbench, swarm):
    command = flexbench(
        "petals", "--prefix", "facebook/opt-1.3b", "--dht-prefix", "facebook/opt-125m",
        "--initial-peers", *swarm["initial_peers"],
    )  # fmt: skip
    assert command.finish(60) == 1
    assert "nobody serves blocks 12:24 of 24 under the DHT prefix 'facebook/opt-125m'" in (
        command.stderr
    )
    command.assert_nothing_left()


def test_peers_that_cannot_be_reached_are_named(flexbench):
    peer = f"/ip4/127.0.0.1/tcp/9/p2p/{PEER_ID}"
    command = flexbench("petals", "--initial-peers", peer, "--connect-timeout", 40)
    assert command.finish(60) == 1
    assert f"the swarm cannot be reached through {peer}" in command.stderr
    assert not (command.folder / "results/petals.tsv").exists()
    command.assert_nothing_left()


@pytest.mark.timing
def test_the_deadline_for_connecting_holds(flexbench):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        port = silent.getsockname()[1]
        peer = f"/ip4/127.0.0.1/tcp/{port}/p2p/{PEER_ID}"
        started_at = time.monotonic()
        command = flexbench("petals", "--initial-peers", peer, "--connect-timeout", 8)
        assert command.finish(60) == 1
        # 8 s, and what it takes to end the processes on a slow machine; p2pd itself gives up later.
        assert time.monotonic() - started_at < 14
    assert f"no answer from {peer} within 8 s (--connect-timeout)" in command.stderr
    command.assert_nothing_left()


def test_a_client_that_is_killed_before_its_warm_up(flexbench, swarm):
    command = flexbench(*arguments(swarm, "--num-processes", 2))
    victim = command.worker("client 0")
    victim.send_signal(signal.SIGKILL)
    command.wait_for_text("client 0 was killed by SIGKILL", timeout_s=5)
    assert command.finish(10) == 1
    assert "Full log: " in command.stderr
    assert not (command.folder / "results/petals.tsv").exists()
    command.assert_nothing_left()


def test_a_warm_up_that_takes_too_long(flexbench, swarm):
    command = flexbench(*arguments(swarm, "--num-processes", 2, "--warmup-timeout", 0.5))
    assert command.finish(60) == 1
    assert "client 0, client 1 did not finish the warm-up within 0.5 s" in command.stderr
    command.assert_nothing_left()


def test_a_run_that_takes_too_long_keeps_what_was_measured_in_its_record(flexbench, swarm):
    command = flexbench(
        *arguments(
            swarm, "--num-micro-batches", 5000, "--sequence-length", 8, "--max-tokens", 1,
            "--run-timeout", 3,
        )
    )  # fmt: skip
    assert command.finish(60) == 1
    assert "of 5000 requests were finished within 3 s (--run-timeout)" in command.stderr
    record = json.loads((command.folder / "results/petals.jsonl").read_text())
    assert record["status"] == "failed"
    assert len(record["clients"][0]["requests"]) > 1
    assert not (command.folder / "results/petals.tsv").exists()
    command.assert_nothing_left()
