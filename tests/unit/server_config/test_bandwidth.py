"""The network test, with tools that print what the real ones print, and worse."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from flexbench.server_config.bandwidth import (
    find_speed_tests,
    is_measured,
    measure_network,
)
from flexbench.server_config.speeds import DEFAULT_BITS_PER_S, Network

PYTHON_RESULT = {
    "download": 93e6,
    "upload": 41.5e6,
    "ping": 9.1,
    "server": {"name": "Somewhere", "host": "example.net"},
    "client": {"ip": "192.0.2.7", "isp": "An ISP"},
}
OOKLA_RESULT = {
    "type": "result",
    "download": {"bandwidth": 12_500_000, "bytes": 100},
    "upload": {"bandwidth": 2_500_000, "bytes": 100},
    "interface": {"externalIp": "192.0.2.7"},
    "server": {"name": "Somewhere"},
}
REFUSES_FORMAT = 'if [ "$1" != --json ]; then echo "unrecognized arguments" >&2; exit 2; fi\n'
REFUSES_JSON = 'if [ "$1" != --format=json ]; then echo "Unrecognized option" >&2; exit 64; fi\n'


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(tmp_path, monkeypatch)


class Tools:
    """Folders that stand for PATH and for the folder of Python, empty at first."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on_path = folder / "on path"
        self.beside_python = folder / "beside python"
        for each in (self.on_path, self.beside_python):
            each.mkdir()
        monkeypatch.setenv("PATH", str(self.on_path))
        monkeypatch.setattr(sys, "executable", str(self.beside_python / "python"))

    def write(self, name: str, script: str, *, beside_python: bool = False) -> Path:
        tool = (self.beside_python if beside_python else self.on_path) / name
        tool.write_text(f"#!/bin/sh\n{script}")
        tool.chmod(0o755)
        return tool

    def print_json(self, name: str, result: object, check: str = "", **where: bool) -> None:
        self.write(name, f"{check}echo '{json.dumps(result)}'\n", **where)


def assert_assumed(network: Network, reason: str) -> None:
    assert (network.download_bits_per_s, network.upload_bits_per_s) == (
        DEFAULT_BITS_PER_S,
        DEFAULT_BITS_PER_S,
    )
    assert network.source == f"assumed, as Petals does: {reason}"
    assert not is_measured(network)


def test_speedtest_cli_gives_bits(tools):
    tools.print_json("speedtest-cli", PYTHON_RESULT, REFUSES_FORMAT)
    assert measure_network(20) == Network(
        download_bits_per_s=93e6, upload_bits_per_s=41.5e6, source="measured with speedtest-cli"
    )


def test_ooklas_tool_gives_bytes(tools):
    tools.print_json("speedtest", OOKLA_RESULT, REFUSES_JSON)
    assert measure_network(20) == Network(
        download_bits_per_s=100e6, upload_bits_per_s=20e6, source="measured with Ookla's speedtest"
    )


def test_what_is_printed_and_not_the_name_says_which_tool_it_is(tools):
    """The package speedtest-cli installs a script that is called speedtest, too."""
    tools.print_json("speedtest", PYTHON_RESULT, REFUSES_FORMAT)
    assert measure_network(20).source == "measured with speedtest-cli"
    tools.print_json("speedtest-cli", OOKLA_RESULT, REFUSES_JSON, beside_python=True)
    assert measure_network(20).source == "measured with Ookla's speedtest"


def test_the_tool_beside_python_comes_first(tools):
    tools.print_json("speedtest-cli", PYTHON_RESULT)
    tools.print_json("speedtest-cli", {**PYTHON_RESULT, "upload": 5e6}, beside_python=True)
    assert measure_network(20).upload_bits_per_s == 5e6


def test_two_names_of_one_script_are_one_tool(tools):
    for name in ("speedtest", "speedtest-cli"):
        tools.write(name, "exit 1\n")
    assert [tool.name for tool in find_speed_tests()] == ["speedtest-cli"]
    tools.write("speedtest", "exit 3\n")
    assert [tool.name for tool in find_speed_tests()] == ["speedtest-cli", "speedtest"]


def test_the_second_tool_is_asked_when_the_first_fails(tools):
    tools.write("speedtest-cli", "exit 1\n")
    tools.print_json("speedtest", OOKLA_RESULT, REFUSES_JSON)
    assert measure_network(20).source == "measured with Ookla's speedtest"


def test_lines_before_the_result_do_not_matter(tools):
    tools.write(
        "speedtest",
        f"echo '{{\"type\": \"log\"}}'\necho warning\necho '{json.dumps(OOKLA_RESULT)}'\n",
    )
    assert measure_network(20).upload_bits_per_s == 20e6


def test_nothing_but_two_numbers_is_kept(tools):
    tools.print_json("speedtest-cli", PYTHON_RESULT)
    kept = repr(measure_network(20))
    assert not any(word in kept for word in ("192.0.2.7", "ISP", "Somewhere", "example"))


def test_without_a_tool_it_says_so(tools):
    assert find_speed_tests() == ()
    assert_assumed(measure_network(20), "neither speedtest-cli nor speedtest is installed")


def test_a_tool_that_reaches_no_server(tools):
    """The words of speedtest-cli 2.1.3 without a network."""
    tools.write(
        "speedtest-cli",
        'if [ "$1" != --json ]; then exit 2; fi\n'
        "echo 'Cannot retrieve speedtest configuration' >&2\n"
        "echo 'ERROR: <urlopen error [Errno -2] Name or service not known>' >&2\nexit 1\n",
    )
    assert_assumed(measure_network(20), "speedtest-cli reached no server")


def test_a_tool_that_fails_with_secrets_in_its_words(tools):
    tools.write("speedtest", "echo 'client 192.0.2.7 is blocked'\nexit 1\n")
    assert_assumed(measure_network(20), "speedtest failed with exit code 1")


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "Testing from An ISP",
        "[1, 2]",
        '{"download": 5}',
        '{"download": true, "upload": true}',
        '{"download": NaN, "upload": 1}',
        '{"download": -5, "upload": 1}',
        '{"download": 1e308, "upload": 1}',
        '{"download": 1, "upload": 1e400}',
        f'{{"download": 1, "upload": 1{"0" * 400}}}',
        '{"download": {"bandwidth": 1e308}, "upload": {"bandwidth": 1}}',
        '{"download": {"bandwidth": 9e14}, "upload": {"bandwidth": 1}}',
        '{"download": {"bandwidth": "fast"}, "upload": {}}',
        "[" * 100_000,
    ],
    ids=lambda garbage: garbage[:30] or "nothing",
)
def test_garbage_is_no_result(tools, garbage):
    (tools.on_path / "garbage").write_text(garbage)
    tools.write(
        "speedtest-cli",
        f'while read -r line || [ -n "$line" ]; do echo "$line"; done < \'{tools.on_path}/garbage\'\n',
    )
    assert_assumed(measure_network(20), "speedtest-cli printed no result that can be read")


def test_a_speed_of_zero_is_no_result(tools):
    tools.print_json("speedtest-cli", {**PYTHON_RESULT, "upload": 0})
    assert_assumed(measure_network(20), "speedtest-cli measured 0 bit/s")


def test_a_file_that_is_no_program(tools):
    tools.write("speedtest-cli", "").write_bytes(b"\x7fELF, not really")
    assert_assumed(measure_network(20), "speedtest-cli could not be started")


@pytest.mark.timing
def test_a_tool_that_hangs_is_killed_with_all_that_it_started(tools, tmp_path):
    sleep = Path("/bin/sleep")
    tools.write(
        "speedtest-cli",
        f"trap '' TERM\n{sleep} 600 &\necho $$ $! > '{tmp_path}/pids'\nwait\n",
    )
    started_at = time.monotonic()
    network = measure_network(1)
    assert 1 <= time.monotonic() - started_at < 5
    assert_assumed(network, "speedtest-cli did not end within 1 s")
    for pid in (tmp_path / "pids").read_text().split():
        assert_gone(int(pid))


@pytest.mark.parametrize("exit_code", [0, 1])
def test_what_a_tool_leaves_behind_is_killed_too(tools, tmp_path, exit_code):
    tools.write(
        "speedtest-cli",
        f"/bin/sleep 600 &\necho $! >> '{tmp_path}/pids'\n"
        f"echo '{json.dumps(PYTHON_RESULT)}'\nexit {exit_code}\n",
    )
    network = measure_network(20)
    assert network.upload_bits_per_s == 41.5e6
    assert is_measured(network)
    for pid in (tmp_path / "pids").read_text().split():
        assert_gone(int(pid))


def assert_gone(pid: int) -> None:
    expires_at = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < expires_at, f"{pid} still runs"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # An orphan waits for the system's first process to collect it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
