"""The bandwidth of this machine, by a speed test tool that is installed, if any.

Two tools are known: speedtest-cli, written in Python, which Petals uses, and Ookla's speedtest. The
package of the first also installs a script that is called speedtest, so names say little: what a
tool prints decides which one it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import IO, Any

from flexbench.core.signals import SignalWatch
from flexbench.server_config.speeds import Network

# Each tool refuses the other's option at once. Ookla's asks for the consent to its licence when it
# is run for the first time: that is for a person to give, so here it fails then.
_OPTIONS = {
    "speedtest-cli": ("--json", "--format=json"),
    "speedtest": ("--format=json", "--json"),
}
_POLL_INTERVAL_S = 0.05
_MAX_OUTPUT_BYTES = 2**20
_MAX_SCRIPT_BYTES = 2**16
_MAX_BITS_PER_S = 1e15
_MEASURED = "measured with "
# argparse's exit code for options it does not know, and sysexits.h's.
_USAGE_EXIT_CODES = (2, 64)
_UNREACHABLE = re.compile(
    r"cannot (retrieve|connect|open|resolve)|(unable|failed) to (connect|retrieve|resolve)"
    r"|could ?n[o']t (connect|resolve)|no (matched )?servers|timed out|urlopen error"
    r"|network is unreachable|no route to host",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class SpeedTest:
    """A program that is called like a speed test."""

    name: str
    path: Path


def find_speed_tests() -> tuple[SpeedTest, ...]:
    """The speed test tools beside this Python and on PATH, the one that Petals uses first."""
    # Not resolved: the programs of a virtual environment lie beside its link to Python.
    beside = str(Path(sys.executable).parent)
    found: dict[str, SpeedTest] = {}
    for name in _OPTIONS:
        for path in (shutil.which(name, path=beside), shutil.which(name)):
            if path is not None:
                found.setdefault(_identity(Path(path)), SpeedTest(name=name, path=Path(path)))
    return tuple(found.values())


def _identity(path: Path) -> str:
    """The same for the two names of speedtest-cli, which are equal scripts."""
    resolved = path.resolve()
    with suppress(OSError):
        if resolved.stat().st_size <= _MAX_SCRIPT_BYTES:
            return hashlib.sha256(resolved.read_bytes()).hexdigest()
    return str(resolved)


def measure_network(timeout_s: float) -> Network:
    """The bandwidth that a speed test finds within `timeout_s` seconds.

    Where none gives a result, it is what Petals assumes then, and `source` says why.
    """
    tools = find_speed_tests()
    if not tools:
        return _assumed("neither speedtest-cli nor speedtest is installed")
    deadline = time.monotonic() + timeout_s
    problems: list[_Problem] = []
    with SignalWatch() as signals:
        for tool in tools:
            for option in _OPTIONS[tool.name]:
                answer = _run(tool, option, deadline, signals)
                if isinstance(answer, Network):
                    return answer
                problems.append(answer)
                if answer.is_late:
                    return _assumed(f"{answer} within {timeout_s:g} s")
    told = [problem for problem in problems if not problem.is_usage]
    return _assumed(str((told or problems)[0]))


def is_measured(network: Network) -> bool:
    """Whether a speed test found it; else somebody gave or assumed it."""
    return network.source.startswith(_MEASURED)


def _assumed(reason: str) -> Network:
    return Network(source=f"{Network().source}: {reason}")


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Why a tool gave no result. `is_usage`: it did not know the option."""

    tool: str
    text: str
    is_usage: bool = False
    is_late: bool = False

    def __str__(self) -> str:
        return f"{self.tool} {self.text}"


def _run(tool: SpeedTest, option: str, deadline: float, signals: SignalWatch) -> Network | _Problem:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(  # noqa: S603 - the person's own tool, with constants
                [tool.path, option],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        except OSError:
            return _Problem(tool=tool.name, text="could not be started")
        try:
            exit_code = _wait(process, deadline, signals)
        finally:
            _end(process)
        if exit_code is None:
            return _Problem(tool=tool.name, text="did not end", is_late=True)
        printed = _read(output)
        network = _parse(printed)
        if network is not None:
            slower = min(network.download_bits_per_s, network.upload_bits_per_s)
            return network if slower > 0 else _Problem(tool=tool.name, text="measured 0 bit/s")
        return _problem(tool, exit_code, printed + _read(errors))


def _wait(process: subprocess.Popen[bytes], deadline: float, signals: SignalWatch) -> int | None:
    """The exit code; None when the deadline has passed. Raises Interrupted."""
    while process.poll() is None:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return None
        connection.wait([signals.wakeup], min(remaining_s, _POLL_INTERVAL_S))
        signals.raise_if_stopped()
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the tool, which leads a process group, if it still runs, and all that it started."""
    # A group keeps its number while anybody is in it. Where only the dead are, some systems refuse.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_MAX_OUTPUT_BYTES).decode(errors="replace")


def _problem(tool: SpeedTest, exit_code: int, printed: str) -> _Problem:
    if _UNREACHABLE.search(printed):
        return _Problem(tool=tool.name, text="reached no server")
    if exit_code == 0:
        return _Problem(tool=tool.name, text="printed no result that can be read")
    return _Problem(
        tool=tool.name,
        text=f"failed with exit code {exit_code}",
        is_usage=exit_code in _USAGE_EXIT_CODES,
    )


def _parse(printed: str) -> Network | None:
    """Nothing but the two bandwidths: the rest tells where somebody is."""
    for text in _candidates(printed):
        try:
            result = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(result, dict):
            continue
        for tool, bits_per_s in (("speedtest-cli", _bits_per_s), ("Ookla's speedtest", _bandwidth)):
            download, upload = bits_per_s(result.get("download")), bits_per_s(result.get("upload"))
            if download is not None and upload is not None:
                return Network(
                    download_bits_per_s=download,
                    upload_bits_per_s=upload,
                    source=f"{_MEASURED}{tool}",
                )
    return None


def _candidates(printed: str) -> Iterator[str]:
    """All that was printed, and each of its lines from the last on: some tools log before."""
    yield printed
    yield from reversed(printed.splitlines())


def _bits_per_s(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _MAX_BITS_PER_S else None


def _bandwidth(value: Any) -> float | None:
    """Ookla's: an object with the bandwidth in bytes/s."""
    bytes_per_s = _bits_per_s(value.get("bandwidth")) if isinstance(value, dict) else None
    return None if bytes_per_s is None else _bits_per_s(bytes_per_s * 8)
