"""`flexbench server-config` with real swarms and servers: what it finds, predicts and launches."""

from __future__ import annotations

import json
import math
import os
import select
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
from flexbench.core.errors import ConfigError, DeadlineError, RunError
from flexbench.core.fork_server import fork_server
from flexbench.core.processes import Deadline, Item
from flexbench.core.progress import Silence
from flexbench.models.config_file import find_model
from flexbench.models.shapes import ModelShape
from flexbench.petals.model import SwarmModel
from flexbench.petals_runtime.crew import open_crew
from flexbench.server_config import swarm_worker
from flexbench.server_config.addresses import check_ports, resolve_entrance
from flexbench.server_config.run_server import SwarmEntrance
from flexbench.server_config.swarm_check import check_swarm
from flexbench.server_config.swarm_worker import Reachability, Stage
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
# 4 blocks of 48 MiB: what loading takes is more than what Python and its threads take meanwhile.
WIDE_SHAPE = ModelShape(
    name="bloom",
    hidden_size=1024,
    num_attention_heads=16,
    num_hidden_layers=4,
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
        # It prints one line, when everything is up.
        assert select.select([process.stdout], [], [], 120)[0], "the swarm takes too long to start"
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
    peer = f"/ip4/127.0.0.1/tcp/9/p2p/{PEER_ID}"
    with pytest.raises(RunError) as caught:
        look([peer], 1, timeout_s=40)
    assert caught.value.message.startswith(
        f"the swarm cannot be reached through {peer}: none of its peers answers"
    )
    assert "Traceback" not in caught.value.details
    assert "Full log: " in caught.value.details


def test_a_peer_that_has_another_id(swarm, temporary_folder):
    peers = [f"{address.rpartition('/')[0]}/{PEER_ID}" for address in swarm.initial_peers]
    with pytest.raises(RunError, match="another peer id"):
        look(peers, 1, timeout_s=40)


@pytest.mark.timing
def test_the_check_of_the_reachability_ends_in_time(monkeypatch):
    def take_too_long(_network: object, heard: object) -> None:
        heard.put(Stage("asking"))
        heard.put(True)

    monkeypatch.setattr(swarm_worker, "_check_reachability", take_too_long)
    stages: list[Stage] = []
    started_at = time.monotonic()
    found = swarm_worker._reachability({}, 0.5, stages.append)
    assert 0.4 < time.monotonic() - started_at < 5
    assert found == Reachability(is_reachable=None, confirmations=1, answers=1)
    assert stages == [Stage("asking")]


@pytest.mark.timing
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


def weights_of(folder: Path, shape: ModelShape) -> Path:
    folder.mkdir()
    with open_crew() as crew:
        crew.start("writer", write_bloom, folder, shape)
        crew.next_message(Deadline(60, lambda: "no model"))
    return folder


@pytest.fixture(scope="module")
def bloom(tmp_path_factory) -> Path:
    """A folder with the weights of SHAPE."""
    return weights_of(tmp_path_factory.mktemp("models") / "bloom-tiny", SHAPE)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A folder with the weights of WIDE_SHAPE."""
    return weights_of(tmp_path_factory.mktemp("models") / "bloom-wide", WIDE_SHAPE)


@pytest.fixture(scope="module")
def launched(start, bloom) -> Iterator[SimpleNamespace]:
    """A server of the first three blocks, launched by the command and stopped by Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}"
    command = start(
        *COMMAND, bloom, *SERVER, "--block-indices", "0:3", "--new-swarm",
        "--host-maddrs", address, "--launch", "--format", "json",
    )  # fmt: skip
    command.wait_for_text("Starting the server")
    # Nobody listens there yet, and nobody else gets it any more.
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", port), 5):
        pass
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
        check_ports(SwarmEntrance(host_maddrs=(address,)))
    path = command.folder / "results/server_config.jsonl"
    command.wait_for(lambda: path.exists() and path.read_text(), "record", 120)
    record = json.loads(path.read_text())
    measured = record["measured"]
    assert measured["visible_addresses"] == [f"{address}/p2p/{measured['peer_id']}"]
    yield SimpleNamespace(command=command, record=record, measured=measured)
    command.process.send_signal(signal.SIGINT)
    assert command.finish(15) == 130
    assert "blocks ['bloom-tiny.0', 'bloom-tiny.1', 'bloom-tiny.2'] are offline" in command.stderr
    assert "Telling the swarm that the server goes (up to 8 s; Ctrl-C" in command.stderr
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
    assert server.finish(20) == 0  # run_server catches it
    server.assert_nothing_left()


@pytest.mark.timeout(400)  # speeds are measured twice, which takes a slow machine minutes
@pytest.mark.timing
def test_speeds_that_were_measured_are_what_is_predicted(start, wide):
    command = start(
        *COMMAND, wide, *SERVER, "--block-indices", "0:4", "--new-swarm", "--launch",
        "--measure", "--force", "--network", "100Mbit/s",
    )  # fmt: skip
    path = command.folder / "results/server_config.jsonl"
    command.wait_for(lambda: path.exists() and path.read_text(), "record", 300)
    record = json.loads(path.read_text())
    print(json.dumps(record["comparison"], indent=1))
    measured = record["measured"]
    comparison = {one["name"]: one for one in record["comparison"]}
    assert record["predicted"]["compute_source"]
    for name in ("Forward, one block", "Inference, one block", "Throughput announced"):
        error = comparison[name]["error"]
        assert math.isfinite(error)
        # Other tests run meanwhile; the same work is measured, with some noise.
        assert 1 / 5 < 1 + error < 5, name
    assert comparison["Network"]["predicted"] == pytest.approx(100e6 / (1024 * 16))
    # With n blocks, a request goes through (n + 1) / 2 of them on average.
    assert comparison["Throughput announced"]["predicted"] == pytest.approx(
        min(comparison["Forward, one block"]["predicted"] / 2.5, 100e6 / (1024 * 16))
    )
    assert measured["throughput"] == pytest.approx(
        min(measured["forward_rps"] / 2.5, measured["network_rps"])
    )
    assert comparison["Weights"]["measured"] > 190 * 2**20
    assert abs(comparison["Memory taken by loading"]["error"]) < 0.05
    command.process.send_signal(signal.SIGTERM)
    assert command.finish(15) == 143
    command.assert_nothing_left()


def test_a_server_that_has_joined_says_so_when_it_goes(start, wide):
    """Stopped while it loads its blocks, which is more or less done by then."""
    command = start(
        *COMMAND, wide, *SERVER, "--block-indices", "0:4", "--new-swarm", "--launch",
    )  # fmt: skip
    command.wait_for_text("are joining")
    command.process.send_signal(signal.SIGTERM)
    assert command.finish(12) == 143
    assert "are offline" in command.stderr
    assert "Predicted and measured" not in command.stdout
    assert not (command.folder / "results/server_config.jsonl").exists()
    command.assert_nothing_left()
    assert command.temporary_files() == []


def test_a_look_and_a_launch_in_one_and_a_server_that_is_killed(launched, start, bloom):
    command = start(
        *COMMAND, bloom, *SERVER, "--block-indices", "3:6", "--launch",
        "--initial-peers", *launched.measured["visible_addresses"],
    )  # fmt: skip
    command.wait_for(lambda: "Predicted and measured" in command.stdout, "comparison", 60)
    record = json.loads((command.folder / "results/server_config.jsonl").read_text())
    assert (record["measured"]["start"], record["measured"]["end"]) == (3, 6)
    shown = " ".join(command.stdout.split())
    assert "Blocks that nobody serves 3:6" in shown
    assert f"...{launched.measured['peer_id'][-6:]} 0:3 online" in shown
    command.worker("server").kill()
    command.wait_for_text("server was killed by SIGKILL", timeout_s=5)
    assert command.finish(10) == 1
    assert "Full log: " in command.stderr
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
