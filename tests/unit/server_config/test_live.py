"""What a launched server leads to: something to show, a record, and words of warning."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from rich.progress import Progress as RichBar
from rich.text import Text

from flexbench.core.errors import FlexbenchError
from flexbench.core.progress import LiveProgress, Silence, progress_console
from flexbench.models.published import published_spec
from flexbench.petals_runtime.server_process import ServerFacts
from flexbench.server_config import live
from flexbench.server_config.config import ServerConfig, resolve_machine
from flexbench.server_config.estimate import estimate
from flexbench.server_config.formats import Answer, Format
from flexbench.server_config.printing import FindingPrinter
from flexbench.server_config.run_server import SwarmEntrance, run_server_arguments
from flexbench.server_config.speeds import ComputeSpeed, Network

FACTS = ServerFacts(
    peer_id="12D3KooWKMPJ2wZhc7VM7hfSDJmEwAExV3bgf2hYShyANcfvJxUA",
    visible_addresses=("/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWKMPJ2wZhc7VM7hfSDJmEwAExV3bgf2hYShyA",),
    start=0,
    end=3,
    torch_dtype="float32",
    quant_type="none",
    weights_bytes=1000,
    cache_bytes=1000,
    cache_tokens_left=1000,
    throughput=40.0,
    forward_rps=80.0,
    inference_rps=9.0,
    network_rps=5000.0,
    using_relay=False,
    memory_before_bytes=1000,
    memory_after_bytes=2000,
)  # fmt: skip
CONFIG = ServerConfig(
    model=published_spec("bloom-560m"), device="cpu", torch_dtype="float32", num_blocks=3
)


@pytest.fixture
def prediction() -> Answer:
    machine = resolve_machine(CONFIG, is_this_machine=True)
    one = estimate(CONFIG, machine, compute=ComputeSpeed(), network=Network())[0]
    return Answer(estimate=one, warnings=(), command="run_server")


class Notes(Silence):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def compare(prediction, save) -> tuple[list, Notes]:
    shown, notes = [], Notes()
    live._compare(prediction, SwarmEntrance(), "now", notes, shown.append, save, FACTS)
    return shown, notes


def test_a_server_is_recorded_and_shown(prediction):
    records: list = []
    shown, notes = compare(prediction, records.append)
    assert [finding.name for finding in shown] == ["comparison"]
    assert records[0]["system"] == "server-config"
    assert records[0]["measured"]["peer_id"] == FACTS.peer_id
    assert notes.told == []


def test_a_record_that_cannot_be_written_ends_no_server(prediction):
    def full_disk(record):
        raise FlexbenchError("x.jsonl: disk full", details=json.dumps(record))

    shown, notes = compare(prediction, full_disk)
    assert [finding.name for finding in shown] == ["comparison"]
    assert "disk full" in notes.told[0]
    assert FACTS.peer_id in notes.told[0]  # what was measured is not lost


def test_json_is_one_object_a_line(prediction, capsys):
    printer = FindingPrinter(Format.JSON)
    printer.show(live.Finding(name="swarm", record={"missing_blocks": []}))
    printer.show(live.Finding(name="configuration", record={"model": "m"}, answer=prediction))
    shown, _ = compare(prediction, lambda record: None)
    printer.show(shown[0])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"model": "m", "swarm": {"missing_blocks": []}}
    assert second["server"]["peer_id"] == FACTS.peer_id


def test_addresses_to_copy_stay_in_one_piece(prediction, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown, _ = compare(prediction, lambda record: None)
    FindingPrinter(Format.TABLE).show(shown[0])
    assert f"--initial-peers {FACTS.visible_addresses[0]}" in capsys.readouterr().out.splitlines()
    FindingPrinter(Format.MARKDOWN).show(shown[0])
    assert f"`--initial-peers {FACTS.visible_addresses[0]}`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entrance", "is_warned"),
    [
        (SwarmEntrance(initial_peers=("public",), host_maddrs=("/ip4/127.0.0.1/tcp/0",)), True),
        (SwarmEntrance(initial_peers=("/ip4/10.0.0.1/tcp/1/p2p/Q",), host_maddrs=("/ip4/127.0.0.1/tcp/0",)), True),
        (SwarmEntrance(initial_peers=("/ip4/127.0.0.1/tcp/1/p2p/Q",), host_maddrs=("/ip4/127.0.0.1/tcp/0",)), False),
        (SwarmEntrance(new_swarm=True, host_maddrs=("/ip4/127.0.0.1/tcp/0",)), False),
        (SwarmEntrance(initial_peers=("public",), port=31337), False),
    ],
)  # fmt: skip
def test_loopback_is_no_place_to_serve_a_swarm_elsewhere_from(entrance, is_warned):
    assert bool(live._loopback_warnings(entrance)) is is_warned


def test_the_public_swarm_is_joined_by_naming_no_peers(prediction):
    words = run_server_arguments(
        CONFIG,
        prediction.estimate,
        SwarmEntrance(initial_peers=("public",), dht_prefix="-odd", public_name="me"),
    )
    assert "--initial_peers" not in words
    assert "public" not in words
    assert words[-3:] == ("--dht_prefix=-odd", "--public_name", "me")


def test_a_bar_is_gone_while_something_else_is_printed():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=60)
    with RichBar(console=console, transient=True) as bar:
        progress = LiveProgress(bar, Text())
        with progress.phase("Starting", total=3):
            with progress.pause():
                assert not bar.live.is_started
            assert bar.live.is_started
            progress.note("/ip4/127.0.0.1/" + "x" * 80)
    assert "x" * 80 in text.getvalue()


def test_nobody_to_read_the_progress_is_no_reason_to_lose_the_results(monkeypatch, capfd):
    console = progress_console()

    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    console.file = Broken()
    console.print("lost")
    assert console.quiet
    print("kept", flush=True)
    assert capfd.readouterr().out == "kept\n"
