"""`flexbench server-config` with real swarms and servers: what it finds, predicts and launches."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from flexbench.cli import app
from flexbench.core.errors import DeadlineError, RunError
from flexbench.core.fork_server import fork_server
from flexbench.core.processes import Deadline, Item
from flexbench.core.progress import Silence
from flexbench.models.config_file import find_model
from flexbench.models.shapes import ModelShape
from flexbench.petals.model import SwarmModel
from flexbench.petals_runtime.crew import open_crew
from flexbench.server_config.addresses import resolve_entrance
from flexbench.server_config.run_server import SwarmEntrance
from flexbench.server_config.swarm_check import check_swarm
from flexbench.server_config.swarm_worker import Reachability
from tests.integration import workers
from tests.integration.conftest import FLEXBENCH, Command
from tests.integration.write_bloom import write_bloom

pytestmark = pytest.mark.swarm

PEER_ID = "12D3KooWKMPJ2wZhc7VM7hfSDJmEwAExV3bgf2hYShyANcfvJxUA"
SHAPE = ModelShape(
    name="bloom",
    hidden_size=640,
    num_attention_heads=10,
    num_hidden_layers=6,
    vocab_size=500,
)
CACHE_TOKENS = 384
COMMAND = (*FLEXBENCH, "server-config")
SERVER = ["--torch-dtype", "float32", "--attn-cache-tokens", CACHE_TOKENS]


@pytest.fixture(scope="module", autouse=True)
def one_fork_server() -> Iterator[None]:
    """The workers of this process come from one fork server: its imports take seconds."""
    with fork_server(["flexbench.petals_runtime.preload"]):
        yield


@pytest.fixture
def answer(temporary_folder, monkeypatch) -> Callable[..., dict]:
    """What `flexbench server-config` says of a swarm, in this process."""
    # No speeds that were measured on this machine.
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary_folder / "cache"))

    def ask(*arguments: object) -> dict:
        texts = ["server-config", "--format", "json", "--quiet", *map(str, arguments)]
        result = CliRunner().invoke(app, texts)
        assert result.exit_code == 0, result.output
        assert list(temporary_folder.glob("flexbench-*")) == []
        return json.loads(result.stdout)

    return ask


# --- a swarm with a hole ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swarm() -> Iterator[SimpleNamespace]:
    """Blocks 0:4 and 8:12 of opt-125m, as serve_part_of_swarm prints them."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.serve_part_of_swarm", "0:4", "8:12"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        line = process.stdout.readline()
        assert line, "the swarm did not start"
        yield SimpleNamespace(**json.loads(line))
        process.stdin.close()
        assert process.wait(20) == 0


def look(peers, num_blocks: int, *, timeout_s: float = 60, **entrance):
    resolved = resolve_entrance(
        SwarmEntrance(initial_peers=tuple(peers), dht_prefix="hole", **entrance), listens=True
    )
    return check_swarm(
        find_model("facebook/opt-125m"),
        resolved,
        num_blocks,
        connect_timeout_s=timeout_s,
        progress=Silence(),
    )


def test_the_hole_of_a_swarm_is_where_petals_would_go(swarm, temporary_folder):
    report = look(swarm.initial_peers, 3)
    found = [(s.peer_id, s.start, s.end) for s in report.servers]
    assert found == [(s["peer_id"], s["start"], s["end"]) for s in swarm.servers]
    assert {(s.state, s.throughput, s.cache_tokens_left) for s in report.servers} == {
        ("online", 1.0, 2 * 4 * 256)
    }
    assert report.throughputs == (1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1)
    assert report.missing == (range(4, 8),)
    assert report.window == range(4, 7)
    assert report.still_missing == (range(7, 8),)
    # Both servers have Petals' protocol for it; the peer of the DHT has not.
    assert report.reachability == Reachability(is_reachable=True, confirmations=2, answers=2)
    assert [address.rpartition("/")[0] for address in report.visible_addresses] == [
        "/ip4/127.0.0.1/tcp"
    ]


def test_nobody_to_ask_counts_as_reachable(swarm, temporary_folder):
    report = look(swarm.lonely_peers, 5)
    assert report.servers == ()
    assert report.missing == (range(12),)
    assert report.window == range(5)
    assert report.reachability == Reachability(is_reachable=None, confirmations=0, answers=0)


def test_an_address_that_nobody_reaches_means_relays(swarm, answer):
    found = answer(
        "opt-125m", "--torch-dtype", "float32", "--device", "cpu", "--num-blocks", 4,
        "--dht-prefix", "hole", "--initial-peers", *swarm.initial_peers,
        "--announce-maddrs", "/ip4/127.0.0.1/tcp/9",
    )  # fmt: skip
    assert found["swarm"]["reachability"] == {
        "is_reachable": False,
        "confirmations": 0,
        "answers": 2,
    }
    assert found["swarm"]["visible_addresses"] == ["/ip4/127.0.0.1/tcp/9"]
    assert found["swarm"]["missing_blocks"] == [[4, 8]]
    assert found["swarm"]["window"] == [4, 8]
    assert found["swarm"]["still_missing_blocks"] == []
    assert found["network"]["relay"] is True
    assert found["throughput"] == pytest.approx(found["network_rps"] / 5)


def test_a_swarm_that_cannot_be_reached(temporary_folder):
    with pytest.raises(RunError, match=r"cannot be reached through /ip4/127\.0\.0\.1/tcp/9"):
        look([f"/ip4/127.0.0.1/tcp/9/p2p/{PEER_ID}"], 1, timeout_s=40)


def test_a_swarm_that_does_not_answer_in_time(temporary_folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        peer = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{PEER_ID}"
        started_at = time.monotonic()
        with pytest.raises(DeadlineError) as caught:
            look([peer], 1, timeout_s=3)
        # p2pd gives up after 5 s and more, but is not waited for.
        assert time.monotonic() - started_at < 8
    # What it does by then depends on the machine: it takes seconds to load Petals.
    assert f"no answer from the swarm of {peer} within 3 s (--connect-timeout), while " in str(
        caught.value
    )


# --- launched servers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Command]]:
    """Starts programs with temporary files, and Petals' cache, in one place for all tests.

    Petals measures its throughput with the first server only.
    """
    commands: list[Command] = []
    with (
        tempfile.TemporaryDirectory(prefix="fbt-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PETALS_CACHE", f"{folder}/petals")
        patch.setenv("XDG_CACHE_HOME", f"{folder}/cache")
        # `python` is that of the environment.
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")

        def start_program(*program: object) -> Command:
            home = Path(folder) / str(len(commands))
            temporary = home / "t"
            temporary.mkdir(parents=True)
            commands.append(Command(list(map(str, program)), home, temporary))
            return commands[-1]

        yield start_program
        for command in commands:
            command.end()


@pytest.fixture(scope="module")
def bloom(tmp_path_factory) -> Path:
    """A folder with the weights of SHAPE."""
    folder: Path = tmp_path_factory.mktemp("models") / "bloom-tiny"
    folder.mkdir()
    with open_crew() as crew:
        crew.start("writer", write_bloom, folder, SHAPE)
        crew.next_message(Deadline(60, lambda: "no model"))
    return folder


@pytest.fixture(scope="module")
def launched(start, bloom) -> Iterator[SimpleNamespace]:
    """A server of the first three blocks, launched by the command and stopped by Ctrl-C."""
    command = start(
        *COMMAND, bloom, *SERVER, "--block-indices", "0:3", "--new-swarm",
        "--launch", "--format", "json",
    )  # fmt: skip
    path = command.folder / "results/server_config.jsonl"
    command.wait_for(lambda: path.exists() and path.read_text(), "record", 120)
    record = json.loads(path.read_text())
    yield SimpleNamespace(command=command, record=record, measured=record["measured"])
    command.process.send_signal(signal.SIGINT)
    assert command.finish(15) == 130
    assert "blocks ['bloom-tiny.0', 'bloom-tiny.1', 'bloom-tiny.2'] are offline" in command.stderr
    assert "Stopped by Ctrl-C." in command.stderr
    assert "Traceback" not in command.stderr
    command.assert_nothing_left()
    assert command.temporary_files() == []
    assert command.logs() == []


def test_a_real_server_takes_what_was_predicted(launched):
    comparison = {one["name"]: one for one in launched.record["comparison"]}
    print(json.dumps(launched.record["comparison"], indent=1))
    assert launched.record["status"] == "ok"
    assert (launched.measured["start"], launched.measured["end"]) == (0, 3)
    assert launched.measured["torch_dtype"] == "float32"
    assert launched.measured["quant_type"] == "none"

    parameters = 12 * SHAPE.hidden_size**2 + 13 * SHAPE.hidden_size
    assert comparison["Weights"]["measured"] == 3 * 4 * parameters
    assert abs(comparison["Weights"]["error"]) < 0.05
    cache_bytes = 3 * 2 * SHAPE.hidden_size * CACHE_TOKENS * 4
    assert comparison["Attention cache"]["measured"] == cache_bytes
    assert comparison["Attention cache"]["error"] == 0
    assert comparison["Cache tokens announced"]["measured"] == 3 * 2 * CACHE_TOKENS
    assert comparison["Cache tokens announced"]["error"] == 0
    assert comparison["Blocks"]["error"] == 0
    # Of its process only some MiB more are known: what Python and its threads take meanwhile.
    assert abs(comparison["Memory taken by loading"]["error"]) < 0.2


def test_a_real_server_announces_what_petals_formula_gives(launched):
    measured = launched.measured
    assert measured["throughput"] == pytest.approx(
        min(measured["forward_rps"] / 2, measured["network_rps"])
    )
    assert measured["inference_rps"] > 0
    assert "Measuring network and compute throughput" in launched.command.stderr


def test_standard_output_is_the_answer_and_then_the_server(launched):
    decoder = json.JSONDecoder()
    answer, end = decoder.raw_decode(launched.command.stdout)
    rest = launched.command.stdout[end:].strip()
    server, _ = decoder.raw_decode(rest)
    assert answer["command"] == launched.record["configuration"]["command"]
    assert answer["swarm"]["window"] == [0, 3]
    assert answer["swarm"]["still_missing_blocks"] == [[3, 6]]
    assert server["server"] == {
        key: value for key, value in launched.measured.items() if key != "num_blocks"
    }
    assert server["comparison"] == launched.record["comparison"]
    # Loopback, as nobody said anything else.
    assert all(a.startswith("/ip4/127.0.0.1/tcp/") for a in launched.measured["visible_addresses"])


def test_the_printed_command_fills_the_hole_and_a_client_generates(launched, start, bloom, answer):
    """A look at the launched server's swarm, the command as it is printed, and a request."""
    peers = launched.measured["visible_addresses"]
    found = answer(bloom, *SERVER, "--num-blocks", 3, "--initial-peers", *peers)
    assert found["swarm"]["missing_blocks"] == [[3, 6]]
    assert found["swarm"]["window"] == [3, 6]
    assert found["swarm"]["reachability"] == {
        "is_reachable": True,
        "confirmations": 1,
        "answers": 1,
    }
    server = start(*shlex.split(found["command"]))
    server.wait_for_text("[INFO] Started")
    with open_crew() as crew:
        model = SwarmModel(
            shape=SHAPE,
            dht_prefix="bloom-tiny",
            initial_peers=tuple(peers),
            weights_folder=str(bloom),
            dtype="float32",
        )
        crew.start("client", workers.generate_with_the_swarm_and_alone, model, 12, 5)
        _, message = crew.next_message(Deadline(90, lambda: "no tokens"))
    assert isinstance(message, Item)
    swarm_tokens, local_tokens = message.payload
    assert swarm_tokens == local_tokens
    assert "rpc_inference" in launched.command.stderr
    assert "rpc_inference" in server.stderr
    server.process.send_signal(signal.SIGINT)
    server.finish(20)
    server.assert_nothing_left()


def test_a_server_that_is_killed_ends_the_command(launched, start, bloom):
    command = start(
        *COMMAND, bloom, *SERVER, "--block-indices", "2:4", "--new-swarm",
        "--launch",
    )  # fmt: skip
    command.wait_for(lambda: "Predicted and measured" in command.stdout, "comparison", 60)
    command.worker("server").kill()
    command.wait_for_text("server was killed by SIGKILL", timeout_s=5)
    assert command.finish(10) == 1
    assert "Full log: " in command.stderr
    command.assert_nothing_left()
    assert command.temporary_files() == []


def test_a_launch_can_be_stopped_before_the_server_serves(start, bloom):
    command = start(
        *COMMAND, bloom, *SERVER, "--num-blocks", 2, "--new-swarm", "--launch",
        "--server-timeout", 60,
    )  # fmt: skip
    command.wait_for_text("Loading throughput info")
    command.process.send_signal(signal.SIGTERM)
    assert command.finish(5) == 143
    assert "Predicted and measured" not in command.stdout
    assert not (command.folder / "results/server_config.jsonl").exists()
    command.assert_nothing_left()
    assert command.temporary_files() == []


def test_a_port_in_use_is_refused_before_anything_starts(start, bloom):
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        command = start(
            *COMMAND, bloom, *SERVER, "--num-blocks", 2, "--new-swarm",
            "--launch", "--port", port,
        )  # fmt: skip
        assert command.finish(20) == 2
    assert f"--port: port {port} of 0.0.0.0 is in use" in command.stderr
    command.assert_nothing_left()
