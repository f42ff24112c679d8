"""What `flexbench serving` reports, against a scripted server that knows what it did.

Medians are compared, for they bear a machine that stands still for a moment. A wrong definition is
off by more than the bounds: by a TTFT, a token's time, or a chunk.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import pytest

from flexbench.serving.arrivals import send_times
from flexbench.serving.config import Arrival, Load
from tests.integration.conftest import Command
from tests.integration.serving.conftest import MockServer
from tests.integration.serving.points import (
    MS,
    SHORT,
    LeftPoint,
    Pair,
    median_ms,
    only_point_in,
    pair,
    points_in,
)

pytestmark = pytest.mark.timing

LONG_S = 60
BOUND_MS = 5.0
TTFT_MS, ITL_MS, TOKENS = 30.0, 4.0, 8

Run = Callable[..., Command]


@pytest.fixture
def run(flexbench: Callable[..., Command]) -> Run:
    """Runs `flexbench serving` against a server, to its end."""

    def run_it(server: MockServer, *options: object, code: int = 0) -> Command:
        command = flexbench("serving", "--api-url", server.url, *options)
        assert command.finish(LONG_S) == code, command.stderr + command.stdout
        return command

    return run_it


def times(server: Callable[..., MockServer], *options: object) -> MockServer:
    return server("--ttft", f"{TTFT_MS}ms", "--itl", f"{ITL_MS}ms", *options)


def seen_at_once(pairs: list[Pair]) -> None:
    """Both sides saw the same, nothing before its cause, and half of it within the bound."""
    for one in pairs:
        assert one.sent <= one.arrived
        assert len(one.content) == len(one.written)
        assert all(theirs <= ours for ours, theirs in zip(one.content, one.written, strict=True))
    assert median_ms(one.arrived - one.sent for one in pairs) < BOUND_MS
    assert median_ms(one.content[0] - one.written[0] for one in pairs) < BOUND_MS
    assert median_ms(one.content[-1] - one.written[-1] for one in pairs) < BOUND_MS


def mean_gap_ms(pairs: list[Pair]) -> float:
    """From one chunk that the server wrote to the next of its answer."""
    return mean(later - one for whole in pairs for one, later in pairwise(whole.written)) / MS


def throughput(point: LeftPoint, truth: dict[str, Any]) -> float:
    """Answers per second that the server wrote to their end in the point's window."""
    window_ns = round(point.figures["window_s"] * 1e9)
    ended = [
        one
        for one in truth["requests"]
        if one["arrived_ns"] >= point.released_ns
        and one["outcome"] == "complete"
        and one["ended_ns"] <= point.released_ns + window_ns
    ]
    return len(ended) / point.figures["window_s"]


# --- latencies -----------------------------------------------------------------------------------


def test_every_figure_of_a_stream_is_what_the_server_did(run, mock_server, tmp_path):
    server = times(mock_server, "--capacity", 4)
    run(server, *SHORT, "--num-clients", 4, "--duration", "1s")
    point, truth = only_point_in(tmp_path), server.truth()
    pairs, figures = pair(point, truth), point.figures
    # 4 places, 58 ms each.
    assert 30 < len(pairs) <= 73
    seen_at_once(pairs)
    true_ttft = median_ms(one.written[0] - one.arrived for one in pairs)
    true_tpot = median_ms((one.written[-1] - one.written[0]) / (TOKENS - 1) for one in pairs)
    assert true_ttft >= TTFT_MS
    assert figures["ttft"]["p50"] * 1e3 == pytest.approx(true_ttft, abs=BOUND_MS)
    assert figures["tpot"]["p50"] * 1e3 == pytest.approx(true_tpot, abs=BOUND_MS / (TOKENS - 1))
    # The mean of all gaps has no place for unsteadiness: each is late, the next early.
    assert figures["itl"]["mean"] * 1e3 == pytest.approx(mean_gap_ms(pairs), abs=1.0)
    assert figures["e2e"]["p50"] * 1e3 == pytest.approx(
        true_ttft + true_tpot * (TOKENS - 1), abs=BOUND_MS
    )
    assert figures["itl"]["count"] == (TOKENS - 1) * len(pairs)
    assert figures["requests_per_s"] == pytest.approx(throughput(point, truth), rel=0.05)
    assert figures["steady_in_flight"] == pytest.approx(4, rel=0.05)
    assert figures["max_in_flight"] == 4
    assert {one.trace.output_tokens for one in pairs} == {TOKENS}
    assert figures["share_counted_by_server"] == 1
    assert figures["num_failed"] == figures["num_unfinished"] == 0
    assert figures["num_new_connections"] == 0
    # One warm-up of each client, and one connection, besides the question for the model.
    assert truth["num_requests"] == len(pairs) + 4
    assert truth["connections"]["opened"] <= 4 + 2


def test_the_first_requests_of_all_clients_are_sent_together(run, mock_server, tmp_path):
    server = times(mock_server)
    run(server, *SHORT, "--num-clients", 8, "--num-workers", 2, "--num-requests-per-client", 1, "--min-requests", 0)  # fmt: skip
    point = only_point_in(tmp_path)
    first = sorted(trace.sent_ns for trace in point.traces)
    assert len(first) == 8
    assert {trace.worker for trace in point.traces} == {0, 1}
    # From a moment that was agreed upon; on a busy machine somebody may come late.
    assert first[0] >= 0
    assert first[4] < 20 * MS
    seen_at_once(pair(point, server.truth()))


@pytest.mark.parametrize(
    ("endpoint", "streaming"), [("completions", True), ("chat", True), ("chat", False)]
)
def test_without_usage_the_tokenizer_counts(run, mock_server, tmp_path, endpoint, streaming):
    server = times(mock_server, "--no-usage")
    kind = "--streaming" if streaming else "--no-streaming"
    run(server, *SHORT, "--endpoint", endpoint, kind, "--num-clients", 4, "--min-requests", 16,
        "--num-requests-per-client", 4)  # fmt: skip
    point, truth = only_point_in(tmp_path), server.truth()
    pairs, figures = pair(point, truth), point.figures
    assert len(pairs) == 16
    seen_at_once(pairs)
    # A token of the server is an 'x', and one of the byte tokenizer.
    assert {one.trace.output_tokens for one in pairs} == {TOKENS}
    assert figures["share_counted_by_server"] == 0
    assert {one.served["streaming"] for one in pairs} == {streaming}
    assert figures["output_tokens"] == 16 * TOKENS
    whole_ms = TTFT_MS + (TOKENS - 1) * ITL_MS
    true_e2e = median_ms(one.written[-1] - one.arrived for one in pairs)
    assert true_e2e >= whole_ms
    assert figures["e2e"]["p50"] * 1e3 == pytest.approx(true_e2e, abs=BOUND_MS)
    if streaming:
        # A chat's first event has no content, and comes at once.
        assert figures["ttft"]["min"] * 1e3 >= TTFT_MS
        assert figures["tokens_per_chunk"] == 1
    else:
        assert figures["ttft"] is figures["itl"] is figures["tpot"] is None
        assert all(len(one.content) == 1 for one in pairs)


def test_several_tokens_in_a_chunk_are_all_counted(run, mock_server, tmp_path):
    server = times(mock_server, "--tokens-per-chunk", 3)
    command = run(server, *SHORT, "--num-clients", 2, "--min-requests", 12, "--num-requests-per-client", 6)  # fmt: skip
    point, truth = only_point_in(tmp_path), server.truth()
    pairs, figures = pair(point, truth), point.figures
    seen_at_once(pairs)
    # 8 tokens come as 3, 3 and 2, at 0, 3 and 6 times 4 ms after the first.
    assert {len(one.content) for one in pairs} == {3}
    assert {one.trace.output_tokens for one in pairs} == {TOKENS}
    assert figures["tokens_per_chunk"] == pytest.approx(TOKENS / 3)
    assert mean_gap_ms(pairs) >= 3 * ITL_MS
    assert figures["itl"]["mean"] * 1e3 == pytest.approx(mean_gap_ms(pairs), abs=1.0)
    assert figures["tpot"]["p50"] * 1e3 == pytest.approx(6 * ITL_MS / 7, abs=1)
    assert "ITL is between chunks" in command.stdout


def test_a_server_that_is_not_trusted_by_the_system(run, mock_server, tmp_path, certificate):
    server = times(mock_server, "--certificate", certificate[0], "--key", certificate[1])
    options = (*SHORT, "--num-clients", 2, "--min-requests", 8, "--num-requests-per-client", 4)
    refused = run(server, *options, code=1)
    assert "certificate" in refused.stderr
    assert points_in(tmp_path) == []
    run(server, *options, "--ca-file", certificate[0])
    point = only_point_in(tmp_path)
    seen_at_once(pair(point, server.stop()))


# --- open loops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arrival", Arrival)
def test_the_requests_of_an_open_loop_come_when_they_are_due(run, mock_server, tmp_path, arrival):
    server = mock_server("--ttft", "20ms")
    size = 10 if arrival is Arrival.BURST else 1
    options = ("--rate", 100, "--arrival", arrival, "--burst-size", size, "--duration", "500ms")
    run(server, *SHORT, *options)
    point, truth = only_point_in(tmp_path), server.truth()
    traces = sorted(point.traces, key=lambda trace: trace.index)
    due = [trace.scheduled_ns for trace in traces]
    if arrival is Arrival.POISSON:
        # 50 are expected, with a standard deviation of 7; gaps spread as far as their mean.
        gaps = [later - earlier for earlier, later in pairwise(due)]
        assert 15 < len(due) < 85
        assert due == sorted(due)
        assert 0.5 < stdev(gaps) / mean(gaps) < 1.6
    else:
        load = Load(rate_per_s=100, arrival=arrival, burst_size=size, duration_s=0.5)
        assert due == [round(moment * 1e9) for moment in send_times(load, 0)]
        assert len(due) == 50
    # As the server saw it: all of them, none early, and half of them on time.
    arrived = sorted(one.arrived - point.released_ns for one in pair(point, truth))
    late = [one - other for one, other in zip(arrived, due, strict=True)]
    assert min(late) >= 0
    assert median_ms(late) < BOUND_MS
    assert median_ms(trace.sent_ns - trace.scheduled_ns for trace in traces) < BOUND_MS


def freeze(pid: int, begin_s: float, length_s: float) -> None:
    """Let a process stand still for a while, `begin_s` after the first request was measured."""
    time.sleep(begin_s)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(length_s)
    os.kill(pid, signal.SIGCONT)


def wait_for_load(command: Command, server: MockServer, num_requests: int) -> None:
    command.wait_for(
        lambda: server.truth()["num_requests"] >= num_requests, "requests at the server", LONG_S
    )


def test_a_server_that_stalls_is_seen_by_all_that_were_due(run, flexbench, mock_server, tmp_path):
    """In a closed loop the stall is one slow request: the others have not been sent."""
    server = mock_server("--ttft", "10ms")
    found = {}
    for name, options in (("open", ("--rate", 50)), ("closed", ("--num-clients", 1))):
        server.reset()
        command = flexbench("serving", "--api-url", server.url, *SHORT, *options, "--duration", "1500ms", "--result-dir", name)  # fmt: skip
        wait_for_load(command, server, 5)
        freeze(server.process.pid, 0.1, 0.7)
        assert command.finish(LONG_S) == 0, command.stderr
        found[name] = points_in(tmp_path, name)[0].figures
    # 35 of 75 were due in the stall, and waited for 0.35 s on average.
    assert found["open"]["e2e_scheduled"]["p90"] > 0.3
    assert found["open"]["e2e"]["p90"] > 0.3
    assert found["open"]["num_ok"] == 75
    assert found["closed"]["e2e_scheduled"]["max"] > 0.5
    assert found["closed"]["e2e_scheduled"]["p90"] < 0.3


def test_a_generator_that_stalls_does_not_hide_it(flexbench, mock_server, tmp_path):
    """What could not be sent in time is slow as counted from when it was due, and is told."""
    server = mock_server("--ttft", "10ms")
    command = flexbench("serving", "--api-url", server.url, *SHORT, "--rate", 50, "--duration", "1500ms")  # fmt: skip
    wait_for_load(command, server, 5)
    freeze(command.worker("load generator 0").pid, 0.1, 0.7)
    assert command.finish(LONG_S) == 0, command.stderr
    point = only_point_in(tmp_path)
    figures = point.figures
    assert figures["e2e_scheduled"]["p90"] > 0.3
    assert figures["e2e"]["p90"] < 0.3
    assert figures["send_lateness"]["max"] > 0.5
    assert figures["num_requests"] == 75
    assert point.record["audit"]["is_client_limited"]
    assert "Client-limited at 50 requests/s" in command.stdout
    assert "after their time or later" in " ".join(command.stdout.split())


# --- saturation ----------------------------------------------------------------------------------


def test_the_saturation_of_a_server_with_four_places_is_found(run, mock_server, tmp_path):
    server = mock_server("--ttft", "20ms", "--itl", "2ms", "--capacity", 4)
    began = time.monotonic()
    command = run(server, *SHORT, "--saturation", "--duration", "500ms")
    assert time.monotonic() - began < 30
    said = " ".join(command.stdout.split())
    assert "It saturates at 4 clients" in said
    found = re.search(r"Highest throughput: ([\d.]+) requests/s", said)
    assert found is not None
    # 4 places, each for 34 ms; what the server itself did is a little less.
    saturated = [point for point in points_in(tmp_path) if point.record["configuration"]["load"]["concurrency"] >= 4]  # fmt: skip
    true = max(point.figures["steady_requests_per_s"] for point in saturated)
    assert float(found[1]) == pytest.approx(true, rel=0.05)
    assert true <= 4 / 0.034 * 1.05


def test_the_most_clients_that_meet_a_condition_are_found(run, mock_server):
    # With n clients in line for 2 places of 40 ms each, the first token comes after n * 20 ms.
    server = mock_server("--ttft", "40ms", "--capacity", 2, "--tokens", 1)
    command = run(server, *SHORT, "--saturation", "--duration", "400ms", "--slo", "ttft:p50<110ms")
    said = " ".join(command.stdout.split())
    assert re.search(r"5 clients", said), said
    assert "Not met at 6 clients" in said


def test_a_condition_gives_goodput(run, mock_server, tmp_path):
    server = mock_server("--ttft", "40ms", "--capacity", 2, "--tokens", 1)
    command = run(server, *SHORT, "--num-clients", 1, 8, "--duration", "400ms", "--slo", "ttft:p50<100ms")  # fmt: skip
    light, heavy = points_in(tmp_path)
    assert light.record["violations"] == []
    assert light.figures["goodput"] >= 0.8 * light.figures["requests_per_s"]
    # Of 8 clients, with two places of 40 ms, only the first four requests are answered in 100 ms.
    assert heavy.figures["goodput"] <= 4 / 0.4
    assert heavy.figures["requests_per_s"] > 2 * heavy.figures["goodput"]
    assert "Not met at 8 clients: ttft p50" in " ".join(command.stdout.split())


# --- a second start ------------------------------------------------------------------------------


# With a name, the server need not be asked for its model.
QUICK = (*SHORT, "--model", "m", "--min-requests", 6, "--num-requests-per-client", 2)


def test_a_second_start_sends_nothing(run, mock_server, tmp_path):
    server = mock_server()
    first = run(server, *QUICK, "--num-clients", 1, 3)
    kept = {point.path: point.path.read_bytes() for point in points_in(tmp_path)}
    rows = (tmp_path / "results/serving/serving.tsv").read_text()
    assert len(rows.splitlines()) == 1 + 2
    server.reset()
    second = run(server, *QUICK, "--num-clients", 1, 3)
    truth = server.truth()
    # No connection but the one of this question.
    assert (truth["num_requests"], truth["connections"]["opened"]) == (0, 1)
    assert {point.path: point.path.read_bytes() for point in points_in(tmp_path)} == kept
    assert (tmp_path / "results/serving/serving.tsv").read_text() == rows
    assert "2 of 2 points had been measured before" in second.stdout
    assert table_of(first.stdout) == table_of(second.stdout)

    # Another seed and another spread are other points; one of the four is there already.
    (tmp_path / "more.yaml").write_text(
        "prompt_generator_seed: [0, 1]\nprompt_length_var: [0.3, 0.1]\n"
    )
    third = run(server, *QUICK, "--num-clients", 3, "--config-file", "more.yaml")
    assert server.truth()["num_requests"] == 3 * (3 + 6)
    assert len(points_in(tmp_path)) == 5
    assert third.stdout.count("1 of 1 points had been measured before") == 1

    server.reset()
    run(server, *QUICK, "--num-clients", 1, 3, "--force")
    assert server.truth()["num_requests"] == (1 + 6) + (3 + 6)
    assert len(points_in(tmp_path)) == 5
    again = [point for point in points_in(tmp_path) if point.path in kept]
    assert all(point.path.read_bytes() != kept[point.path] for point in again)


def table_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r" +\d", line)]


def test_a_sweep_that_ended_early_ends_there_again(run, mock_server, tmp_path):
    server = mock_server("--ttft", "60ms", "--capacity", 1)
    options = (*QUICK, "--num-clients", 1, 4, 8, "--early-stop-latency", 0.1)
    first = run(server, *options)
    # With 4 clients in line for a place of 60 ms, an answer takes 240 ms.
    assert "Ended early: mean latency" in first.stdout
    assert len(points_in(tmp_path)) == 2
    server.reset()
    second = run(server, *options)
    assert server.truth()["num_requests"] == 0
    assert "Ended early: mean latency" in second.stdout


def test_files_and_options_of_a_sweep(run, mock_server, tmp_path):
    (tmp_path / "sweep.yaml").write_text("prompt_length: [16, 48]\nnum_clients: [1, 2]\nmax_new_tokens: 4\n")  # fmt: skip
    server = mock_server()
    options = ("--config-file", "sweep.yaml", "--prompt_lenght_var", 0, "--max-new-tokens-var", 0, "--min-requests", 3, "--num-requests-per-client", 1)  # fmt: skip
    command = run(server, *options)
    assert "prompt-length-var" in command.stderr
    points = points_in(tmp_path)
    assert sorted((p.record["configuration"]["prompts"]["prompt_length"], len(p.traces)) for p in points) == [(16, 3), (16, 3), (48, 3), (48, 3)]  # fmt: skip
    measured = sorted(one["prompt_bytes"] for one in server.truth()["requests"])
    assert measured == [16] * (1 + 3 + 2 + 3) + [48] * (1 + 3 + 2 + 3)
    # No two prompts begin the same, warm-up included.
    assert len({one["prompt_crc32"] for one in server.truth()["requests"]}) == len(measured)


@pytest.mark.parametrize("options", [("--num-workers", 2), ("--num-workers", 2, "--use-threading")])
def test_loops_share_the_requests(run, mock_server, tmp_path, options):
    server = times(mock_server)
    run(server, *SHORT, *options, "--num-clients", 5, "--min-requests", 23, "--num-requests-per-client", 1)  # fmt: skip
    point = only_point_in(tmp_path)
    assert sorted(trace.index for trace in point.traces) == list(range(23))
    by_loop = [sorted(t.index for t in point.traces if t.worker == loop) for loop in range(2)]
    # Clients 0, 2, 4 and 1, 3.
    assert by_loop == [
        [i for i in range(23) if i % 5 % 2 == 0],
        [i for i in range(23) if i % 5 % 2],
    ]
    generators = point.record["generators"]
    assert generators["num_loops"] == 2
    assert generators["num_workers_per_rank"] == (1 if "--use-threading" in options else 2)
    assert point.figures["max_in_flight"] == 5
    assert server.truth()["in_flight"]["max"] == 5
    seen_at_once(pair(point, server.truth()))
    assert all(one <= other for one, other in pairwise(t.scheduled_ns for t in point.traces))
