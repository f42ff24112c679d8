"""Servers that do wrong: every fault is counted by its kind, once, and nothing hangs."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Command
from tests.integration.serving.conftest import MockServer
from tests.integration.serving.points import SHORT, only_point_in, points_in

LONG_S = 60
KEY = "sk-hunter2-and-no-other"

# What the server does to which request, and what that is called.
FAULTS = {
    "slow": "timeout",
    "close-before": "closed",
    "reset": "closed",
    "close-head": "closed",
    "close-mid-stream": "closed",
    "stall-mid-stream": "timeout",
    "garbage-http": "malformed",
    "garbage-json": "malformed",
    "garbage-event": "malformed",
    "429": "rate_limited",
    "500": "http_5xx",
    "503": "http_5xx",
    "error-event": "server_error",
    "empty": "empty",
    "no-done": None,  # all tokens are there, and a finish_reason
}
# The same, of an answer that comes at once.
WHOLE_FAULTS = {
    name: kind for name, kind in FAULTS.items() if name not in ("garbage-event", "no-done")
}

Run = Callable[..., Command]


@pytest.fixture
def run(flexbench: Callable[..., Command]) -> Run:
    """Runs `flexbench serving` against a server, to its end; nothing of it stays."""

    def run_it(server: MockServer | str, *options: object, code: int = 0) -> Command:
        url = server if isinstance(server, str) else server.url
        command = flexbench("serving", "--api-url", url, *SHORT, *options)
        assert command.finish(LONG_S) == code, command.stderr + command.stdout
        assert "Traceback" not in command.stderr
        command.assert_nothing_left()
        return command

    return run_it


def each_third(faults: dict[str, str | None]) -> tuple[object, ...]:
    """Options that let one fault after the other happen, with two good answers between."""
    options: list[object] = []
    for number, name in enumerate(faults):
        options += ["--fault", f"{name}:every=1000:from={3 * number + 1}"]
    return tuple(options)


@pytest.mark.parametrize(
    ("faults", "options"),
    [
        (FAULTS, ()),
        (FAULTS, ("--endpoint", "chat")),
        (WHOLE_FAULTS, ("--no-streaming",)),
    ],
)
def test_each_fault_is_one_failure_of_its_kind(run, mock_server, tmp_path, faults, options):
    server = mock_server("--ttft", "2ms", *each_third(faults))
    total = 3 * len(faults)
    command = run(server, *options, "--num-clients", 1, "--warmup-requests", 0, "--min-requests", total,
        "--num-requests-per-client", 1, "--request-timeout", "300ms")  # fmt: skip
    point = only_point_in(tmp_path)
    expected = dict.fromkeys(range(total))
    expected |= {3 * number + 1: kind for number, kind in enumerate(faults.values())}
    assert point.failures == expected
    kinds = Counter(kind for kind in faults.values() if kind is not None)
    assert point.figures["failures"] == kinds
    assert point.figures["num_failed"] == kinds.total()
    assert point.figures["num_ok"] == total - kinds.total()
    assert point.record["status"] == "ok"
    # Each was sent once, and whoever failed is not in the latencies.
    truth = server.truth()
    assert truth["num_requests"] == total
    assert point.figures["e2e"]["count"] == point.figures["num_ok"]
    assert point.figures["e2e"]["max"] < 0.3
    said = " ".join(command.stdout.split())
    assert f"{kinds['closed']} closed" in said
    assert f"{kinds['malformed']} malformed" in said
    assert all(trace.failure_message for trace in point.traces if trace.failure is not None)


def test_faults_of_some_leave_others_alone(run, mock_server, tmp_path):
    """Several clients, connections that are closed under their hands, two processes."""
    server = mock_server("--ttft", "2ms", "--fault", "close-mid-stream:every=5", "--fault", "500:every=7")  # fmt: skip
    run(server, "--num-clients", 6, "--num-workers", 2, "--warmup-requests", 0, "--min-requests", 70,
        "--num-requests-per-client", 1)  # fmt: skip
    point = only_point_in(tmp_path)
    # Of 70, every fifth is closed; of those that are not, every seventh fails.
    assert point.figures["failures"] == {"closed": 14, "http_5xx": 8}
    assert point.figures["num_ok"] == 48
    assert server.truth()["num_requests"] == 70


# --- a server that cannot be used ----------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_nobody_listens(run, tmp_path):
    port = free_port()
    command = run(f"http://127.0.0.1:{port}", "--num-clients", 1, code=1)
    assert f"nobody listens at 127.0.0.1:{port} (connection refused)" in command.stderr
    assert points_in(tmp_path) == []


def test_a_name_that_no_host_has(run):
    command = run("http://no-such-host.invalid:1", "--num-clients", 1, code=1)
    assert "'no-such-host.invalid' cannot be found" in command.stderr


def find_key(folder: Path, *texts: str) -> list[str]:
    """Where the key is."""
    places = [str(path) for path in folder.rglob("*") if path.is_file() and KEY in path.read_text(errors="replace")]  # fmt: skip
    return places + [text for text in texts if KEY in text]


@pytest.mark.parametrize("is_set", [True, False])
def test_a_wrong_key_is_told_by_its_variable(run, mock_server, tmp_path, temporary_folder, monkeypatch, is_set):  # fmt: skip
    monkeypatch.setenv("MOCK_KEY", "the right one")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if is_set:
        monkeypatch.setenv("SOME_KEY", KEY)
    server = mock_server("--api-key-env", "MOCK_KEY")
    command = run(server, "--api-key-env", "SOME_KEY", "--num-clients", 1, code=1)
    assert "unauthorized: HTTP 401: Incorrect API key provided" in command.stderr
    assert f"SOME_KEY, which is {'' if is_set else 'not '}set" in command.stderr
    assert find_key(tmp_path, command.stdout, command.stderr) == []
    assert find_key(temporary_folder) == []


def test_a_right_key_is_nowhere(run, mock_server, tmp_path, temporary_folder, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    server = mock_server("--api-key-env", "SOME_KEY", "--fault", "500:every=3")
    command = run(server, "--api-key-env", "SOME_KEY", "--num-clients", 2, "--min-requests", 10, "--num-requests-per-client", 1, "--log-dir", "logs")  # fmt: skip
    assert only_point_in(tmp_path).figures["num_ok"] > 0
    assert find_key(tmp_path, command.stdout, command.stderr) == []
    assert find_key(temporary_folder) == []


# --- too many failures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"), [("500", "http_5xx: HTTP 500"), ("garbage-http", "malformed")]
)  # fmt: skip
def test_no_warm_up_request_succeeds(run, mock_server, tmp_path, fault, said):
    server = mock_server("--fault", fault)
    command = run(server, "--num-clients", 3, code=1)
    assert "3 clients: no warm-up request succeeded: 3 x " in command.stderr
    assert said in command.stderr
    assert points_in(tmp_path) == []
    assert server.truth()["num_requests"] == 3


def test_some_failures_of_the_warm_up_are_noted(run, mock_server, tmp_path):
    server = mock_server("--fault", "503:every=1000")
    run(server, "--num-clients", 3, "--min-requests", 6, "--num-requests-per-client", 1)
    point = only_point_in(tmp_path)
    assert point.record["warmup_failures"] == {"http_5xx": 1}
    assert point.figures["num_ok"] == 6


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (("--max-errors", 5), "--max-errors is 5"),
        (("--max-error-rate", 0.2), "--max-error-rate is 0.2"),
    ],
)
def test_too_many_failures_end_a_point(run, mock_server, tmp_path, options, limit):
    server = mock_server("--ttft", "5ms", "--fault", "500:from=30")
    command = run(server, "--num-clients", 2, 3, "--warmup-requests", 0, "--duration", "30s", *options, code=1)  # fmt: skip
    assert limit in command.stderr
    assert "2 clients: " in command.stderr
    # The heavier load is not tried, and what was measured is kept.
    point = only_point_in(tmp_path)
    assert point.record["status"] == "failed"
    assert limit in point.record["error"]
    assert point.figures["num_ok"] == 30
    assert set(point.figures["failures"]) == {"http_5xx"}
    assert point.figures["num_failed"] > 5
    assert server.truth()["num_requests"] == len(point.traces)
    assert not (tmp_path / "results/serving/serving.tsv").exists()


def test_a_server_that_ends_in_the_middle(run, mock_server, tmp_path):
    server = mock_server("--ttft", "20ms", "--fault", "refuse-after:from=30")
    command = run(server, "--num-clients", 4, "--duration", "30s", "--warmup-requests", 0, code=1)
    point = only_point_in(tmp_path)
    assert point.record["status"] == "failed"
    # In flight were 4; all after that find nobody.
    assert 1 <= point.figures["failures"]["closed"] <= 4
    assert point.figures["failures"]["refused"] > 20
    assert set(point.figures["failures"]) == {"closed", "refused"}
    assert point.figures["num_ok"] >= 25
    assert "requests failed; --max-error-rate is 0.5" in command.stderr


def test_a_search_survives_errors(run, mock_server):
    """More clients than the server takes are refused; the search says so."""
    server = mock_server("--ttft", "10ms", "--fault", "503:every=2")
    command = run(server, "--saturation", "--duration", "300ms", "--warmup-requests", 2)
    assert "Failed at 1 client: " in " ".join(command.stdout.split())


def test_a_record_has_what_a_person_needs_to_find_a_failure(run, mock_server, tmp_path):
    server = mock_server("--fault", "error-event:every=2")
    run(server, "--num-clients", 1, "--warmup-requests", 0, "--min-requests", 4, "--num-requests-per-client", 1)  # fmt: skip
    failed: list[Any] = [trace for trace in only_point_in(tmp_path).traces if trace.failure]
    assert {trace.failure_message for trace in failed} == {"the engine died"}
    # Half of the tokens had come.
    assert {len(trace.content_ns) for trace in failed} == {4}
