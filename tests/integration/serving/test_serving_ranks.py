"""`flexbench serving` under mpirun: every rank sends its part of the load, rank 0 keeps the results."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from statistics import median

import psutil
import pytest

from tests.integration.conftest import FLEXBENCH, Command
from tests.integration.dist.conftest import MPIRUN, set_variables
from tests.integration.serving.conftest import MockServer
from tests.integration.serving.points import MS, SHORT, median_ms, only_point_in, pair, points_in

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not MPIRUN.exists(), reason="there is no mpirun beside this Python"),
]

LONG_S = 60
IN_TIME_S = 10

Launch = Callable[..., Command]


@pytest.fixture
def launch(flexbench: Launch, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Starts two ranks of `flexbench serving` against a server."""
    set_variables(monkeypatch)

    def start(server: MockServer, *options: object) -> Command:
        program = (MPIRUN, "--oversubscribe", "-np", 2, *FLEXBENCH)
        return flexbench("serving", "--api-url", server.url, *SHORT, *options, program=program)

    return start


def rank_of(command: Command, number: int) -> psutil.Process:
    """The command's process of a rank: the one that none of its kind has started."""

    def find() -> psutil.Process | None:
        for process in command.family():
            variables = process.environ()
            title = " ".join(process.cmdline())
            if variables.get("OMPI_COMM_WORLD_RANK") == str(number) and "-m flexbench" in title:
                return process
        return None

    found: psutil.Process = command.wait_for(find, f"rank {number}", LONG_S)
    return found


@pytest.mark.timing
def test_two_ranks_send_one_load_together(launch, mock_server, tmp_path):
    server = mock_server("--ttft", "20ms", "--itl", "2ms")
    command = launch(server, "--num-clients", 5, "--min-requests", 43, "--num-requests-per-client", 1)  # fmt: skip
    assert command.finish(LONG_S) == 0, command.stderr
    point, truth = only_point_in(tmp_path), server.truth()
    # Clients 0, 2 and 4 are rank 0's, 1 and 3 rank 1's; request i is of client i % 5.
    traces = point.traces
    assert sorted(trace.index for trace in traces) == list(range(43))
    for trace in traces:
        assert trace.is_ok
        assert trace.worker == trace.index % 5 % 2
    assert point.figures["max_in_flight"] == 5
    # Each once, after a warm-up of each client.
    assert truth["num_requests"] == 43 + 5
    pairs = pair(point, truth)
    for one in pairs:
        assert one.sent <= one.arrived
        assert one.content[0] >= one.written[0]
    assert median_ms(one.content[0] - one.written[0] for one in pairs) < 5
    # Both start at the agreed moment.
    firsts = [min(trace.sent_ns for trace in traces if trace.worker == rank) for rank in range(2)]
    assert min(firsts) >= 0
    assert abs(firsts[0] - firsts[1]) < 50 * MS
    assert median(trace.sent_ns for trace in traces if trace.index < 5) < 50 * MS
    # Said and kept once.
    assert command.stdout.count("Results: ") == 1
    assert command.stdout.count("requests/s") <= 2
    assert command.stderr.count("5 clients: done in") == 1
    assert (tmp_path / "results/serving/serving.tsv").read_text().count("\n") == 2
    (line,) = (tmp_path / "results/serving/serving.jsonl").read_text().splitlines()
    generators = json.loads(line)["generators"]
    assert generators["num_ranks"] == 2
    assert [loop["part"] for loop in generators["loops"]] == [0, 1]
    assert len(generators["clocks"]) == 2
    command.assert_nothing_left()

    # A second start reads what is there: nobody sends anything.
    server.reset()
    again = launch(server, "--num-clients", 5, "--min-requests", 43, "--num-requests-per-client", 1)
    assert again.finish(LONG_S) == 0, again.stderr
    assert "1 of 1 points had been measured before" in again.stdout
    assert server.truth()["num_requests"] == 0


@pytest.mark.timing
def test_ranks_share_a_rate_and_measure_one_point_after_the_other(launch, mock_server, tmp_path):
    server = mock_server("--ttft", "10ms")
    command = launch(server, "--rate", 40, 100, "--duration", "500ms", "--num-workers", 1)
    assert command.finish(LONG_S) == 0, command.stderr
    slow, fast = points_in(tmp_path)
    for point, number, gap_ms in ((slow, 20, 25), (fast, 50, 10)):
        traces = sorted(point.traces, key=lambda trace: trace.index)
        assert [trace.index for trace in traces] == list(range(number))
        assert [trace.scheduled_ns for trace in traces] == [gap_ms * MS * i for i in range(number)]
        # Every other one is rank 1's.
        assert [trace.worker for trace in traces] == [index % 2 for index in range(number)]
        assert min(trace.sent_ns - trace.scheduled_ns for trace in traces) >= 0
        assert median_ms(trace.sent_ns - trace.scheduled_ns for trace in traces) < 10


def test_ranks_with_other_options_do_not_start(flexbench, mock_server, monkeypatch, tmp_path):
    set_variables(monkeypatch)
    server = mock_server()
    one = (*FLEXBENCH, "serving", "--api-url", server.url, *SHORT, "--num-clients", 2)
    other = (*one, "--warmup-requests", 3)
    command = flexbench(program=(MPIRUN, "--oversubscribe", "-np", 1, *one, ":", "-np", 1, *other))
    assert command.finish(LONG_S) == 1
    assert "was started with other options" in command.stderr
    assert server.truth()["num_requests"] == 0
    assert points_in(tmp_path) == []


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(launch, mock_server, tmp_path, lost):
    server = mock_server("--ttft", "10ms")
    command = launch(server, "--num-clients", 4, "--duration", "60s")
    command.wait_for(lambda: server.truth()["num_requests"] >= 60, "requests", LONG_S)
    rank_of(command, lost).send_signal(signal.SIGKILL)
    assert command.finish(IN_TIME_S) != 0
    command.assert_nothing_left()
    if lost == 1:
        # Rank 0 keeps what it has measured itself.
        assert points_in(tmp_path), command.stderr
        point = only_point_in(tmp_path)
        assert point.record["status"] == "failed"
        assert "rank 1" in point.record["error"]
        assert {trace.worker for trace in point.traces} == {0}
        assert point.figures["num_ok"] > 10


def test_ctrl_c_ends_all_ranks(launch, mock_server, tmp_path):
    server = mock_server("--ttft", "10ms")
    command = launch(server, "--num-clients", 4, "--duration", "60s")
    command.wait_for(lambda: server.truth()["num_requests"] >= 60, "requests", LONG_S)
    command.process.send_signal(signal.SIGINT)
    assert command.finish(IN_TIME_S) != 0
    assert points_in(tmp_path), command.stderr
    assert only_point_in(tmp_path).record["status"] == "interrupted"
    command.assert_nothing_left()
