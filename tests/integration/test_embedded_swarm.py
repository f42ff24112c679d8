"""`flexbench petals` with its own swarm: what is measured, and what is left when it goes wrong."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.swarm

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def test_four_clients_and_two_servers_give_the_rows_expected(flexbench):
    command = flexbench(
        "petals", "--num-processes", 4, "--num-micro-batches", 2, "--batch-size", 2,
        "--sequence-length", 16, 24, "--max-tokens", 0, 3, "--seed", 7,
    )  # fmt: skip
    assert command.finish(170) == 0, command.stderr

    lines = (command.folder / "results/petals.tsv").read_text().splitlines()
    assert lines[0].split("\t") == [
        "batch_size", "num_micro_batches", "num_processes", "sequence_length", "max_tokens",
        "throughput", "mean_latency",
    ]  # fmt: skip
    rows = [line.split("\t") for line in lines[1:]]
    assert [row[:5] for row in rows] == [
        ["2", "2", "4", "16", "0"],
        ["2", "2", "4", "16", "3"],
        ["2", "2", "4", "24", "0"],
        ["2", "2", "4", "24", "3"],
    ]
    records = [
        json.loads(line)
        for line in (command.folder / "results/petals.jsonl").read_text().splitlines()
    ]
    assert len(records) == 4
    for row, record in zip(rows, records, strict=True):
        assert_figures_follow_from_the_observations(row, record)
        assert_every_request_crossed_both_servers(record)
    # A prompt run through the swarm without generating has no throughput in generated tokens.
    assert float(rows[0][5]) == 0 < float(rows[1][5])
    assert command.stderr.count("Traceback") == 0
    assert command.temporary_files() == []
    command.assert_nothing_left()


def assert_figures_follow_from_the_observations(row, record):
    latencies = [r["latency_s"] for c in record["clients"] for r in c["requests"]]
    ends = [
        r["started_after_release_s"] + r["latency_s"]
        for c in record["clients"]
        for r in c["requests"]
    ]
    tokens = sum(r["generated_tokens"] for c in record["clients"] for r in c["requests"])
    assert record["status"] == "ok"
    assert len(latencies) == 4 * 2
    assert tokens == 4 * 2 * 2 * int(row[4])
    assert float(row[6]) == pytest.approx(sum(latencies) / 8)
    assert record["figures"]["wall_clock_s"] == pytest.approx(max(ends))
    assert float(row[5]) == pytest.approx(tokens / max(ends))
    # Two rounds one after the other: the run takes at least as long as each client's rounds.
    for client in record["clients"]:
        assert sum(r["latency_s"] for r in client["requests"]) <= max(ends) + 1e-6
        assert client["warmup_s"] > 0


def assert_every_request_crossed_both_servers(record):
    servers = [(s["start"], s["end"]) for s in record["swarm"]["servers"]]
    assert servers == [(0, 6), (6, 12)]
    assert len({s["peer_id"] for s in record["swarm"]["servers"]}) == 2
    for client in record["clients"]:
        for request in client["requests"]:
            assert [(hop["start"], hop["end"]) for hop in request["route"]] == servers
            assert request["failed_attempts"] == 0


def test_the_script_for_newcomers_reports_what_it_measured_and_nothing_else(flexbench, tmp_path):
    output = tmp_path / "petals.tsv"
    output.write_text("1\t1\t4\t8\t1\t999.0\t1.0\n")  # an earlier run
    command = flexbench(
        "--output", output, "--sequence-length", 8, "--max-tokens", 1, program=(BENCH,)
    )
    assert command.finish(150) == 0, command.stderr
    row = output.read_text().splitlines()[1].split("\t")
    assert row[:5] == ["1", "1", "4", "8", "1"]
    table = [line.split() for line in command.stdout.splitlines()]
    assert ["1", "1", "4", "8", "1"] in [line[:5] for line in table]
    assert "999" not in command.stdout
    command.assert_nothing_left()


def test_the_script_for_newcomers_ends_everything_when_it_is_ended(flexbench, tmp_path):
    command = flexbench("--output", tmp_path / "petals.tsv", program=(BENCH,))
    command.wait_for_text("Starting a swarm")
    command.process.send_signal(signal.SIGTERM)
    assert command.finish(10) == 143
    assert "Stopped by SIGTERM" in command.stderr
    command.assert_nothing_left()


def test_a_killed_server_is_reported_with_its_last_log_lines(flexbench):
    command = flexbench("petals", "--sequence-length", 512, "--max-tokens", 500)
    command.wait_for_text("rounds ...")
    command.worker("server 1").kill()
    command.wait_for_text("server 1 was killed by SIGKILL", timeout_s=5)

    assert command.finish(10) == 1
    assert "rpc_inference" in command.stderr  # from the server's own log
    assert "Full log: " in command.stderr
    assert not (command.folder / "results/petals.tsv").exists()
    command.assert_nothing_left()
    assert command.temporary_files() == []


def test_a_killed_daemon_of_a_server_is_reported(flexbench):
    command = flexbench("petals", "--sequence-length", 512, "--max-tokens", 500)
    command.wait_for_text("rounds ...")
    server = command.worker("server 0")
    daemon = next(p for p in server.children(recursive=True) if p.name().startswith("p2pd"))
    daemon.kill()

    assert command.finish(20) == 1
    # The server notices it, or a client whose request it takes down; whoever is first.
    assert "Error: server 0 " in command.stderr or "Error: client 0 failed" in command.stderr
    command.assert_nothing_left()


def test_rows_of_earlier_runs_are_kept_when_a_client_is_killed(flexbench):
    command = flexbench(
        "petals", "--num-processes", 2, "--sequence-length", 16, "--max-tokens", 1, 1500
    )
    command.wait_for_text("Run 2/2: rounds ...")
    victim = command.worker("client 1")
    time.sleep(0.5)
    victim.kill()
    command.wait_for_text("client 1 was killed by SIGKILL", timeout_s=5)

    assert command.finish(10) == 1
    lines = (command.folder / "results/petals.tsv").read_text().splitlines()
    assert [line.split("\t")[:5] for line in lines[1:]] == [["1", "1", "2", "16", "1"]]
    records = (command.folder / "results/petals.jsonl").read_text().splitlines()
    assert [json.loads(record)["status"] for record in records] == ["ok", "failed"]
    assert "client 1 was killed by SIGKILL" in json.loads(records[1])["error"]
    command.assert_nothing_left()


@pytest.mark.parametrize("moment", ["Starting a swarm", "warm-up ...", "rounds ..."])
def test_ctrl_c_ends_everything_at_any_moment(flexbench, moment):
    command = flexbench("petals", "--sequence-length", 128, "--max-tokens", 1500)
    command.wait_for_text(moment)
    command.process.send_signal(signal.SIGINT)

    assert command.finish(10) == 130
    assert "Stopped by Ctrl-C" in command.stderr
    assert "Traceback" not in command.stderr
    command.assert_nothing_left(within_s=2)
    assert command.temporary_files() == []
    assert command.logs() == []


def test_sigterm_ends_everything(flexbench):
    command = flexbench("petals", "--sequence-length", 128, "--max-tokens", 1500)
    command.wait_for_text("warm-up ...")
    command.process.send_signal(signal.SIGTERM)

    assert command.finish(10) == 143
    command.assert_nothing_left(within_s=2)


def test_workers_end_with_a_command_that_is_killed(flexbench):
    command = flexbench("petals", "--sequence-length", 128, "--max-tokens", 1500)
    command.wait_for_text("rounds ...")
    command.process.kill()

    command.assert_nothing_left(within_s=10)
