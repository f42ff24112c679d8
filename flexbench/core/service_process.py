"""A server that flexbench starts itself: waited for, watched, and ended with all it has started.

Between flexbench and the server stands a small process, see service_watcher.py, that ends the
server when flexbench has gone, even if that was killed.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flexbench.core.errors import ConfigError, DeadlineError, WorkerError
from flexbench.core.progress import Phase
from flexbench.core.units import format_seconds

LOCAL_HOST = "127.0.0.1"
# vLLM takes 2 to 3 seconds to end in order; what is killed may leave shared memory behind.
STOP_GRACE_S = 10.0
# Beyond the server's own grace: the watcher's kill, and its end.
_WATCHER_GRACE_S = 7.0
_START_TIMEOUT_S = 30.0
_CHECK_EVERY_S = 0.05
_SHOW_EVERY_S = 1.0
_SHOWN_LENGTH = 60
_NEWS_S = 0.1
_LOG_LINES_SHOWN = 15
_LOG_BYTES_READ = 65536
# Keys for endpoints of others, by default in these variables: no server that is started needs them.
_KEYS_FOR_OTHERS = ("OPENAI_API_KEY", "AZUREML_API_KEY")
_WATCHER = Path(__file__).with_name("service_watcher.py")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class ServiceProcess:
    """One server. `stop` ends it and everything it has started, by their ids."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str | None] | None = None,
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        """A server that is not started yet; `name` is for people.

        `environment` is added to this process's own, of which keys for other endpoints are left
        out; None takes a variable away. What the server prints is appended to `log_path`.
        """
        self.name = name
        self.log_path = log_path
        self._command = list(command)
        self._environment = environment or {}
        self._stop_grace_s = stop_grace_s
        self._watcher: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._reported = b""
        self.pid: int | None = None
        """Of the server's first process, which leads a process group of this number."""
        self._exit_code: int | None = None

    def start(self) -> None:
        """Start the server. Raises WorkerError when the system refuses to."""
        environment = {**os.environ, **dict.fromkeys(_KEYS_FOR_OTHERS), **self._environment}
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._watcher = subprocess.Popen(  # noqa: S603 - a script of our own
                # Isolated: whatever the server's environment says is not for the watcher.
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(_WATCHER),
                    f"{self._stop_grace_s}",
                    *self._command,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={name: text for name, text in environment.items() if text is not None},
                start_new_session=True,  # a Ctrl-C is for flexbench, which knows what to do
            )
        word, _, rest = self._next_report(_START_TIMEOUT_S).partition(" ")
        if word == "started":
            self.pid = int(rest)
            return
        self.stop()
        raise WorkerError(
            self.name,
            f"could not be started: {rest or 'no answer'}",
            details=self.last_log_lines(),
        )

    def wait_until_ready(
        self,
        check: Callable[[], bool],
        *,
        timeout_s: float,
        raise_if_stopped: Callable[[], None],
        phase: Phase | None = None,
    ) -> float:
        """Wait until `check` says that the server is ready; returns the seconds that it took.

        `check` is to take less than half a second. `phase` shows the wait, and the last line of the
        server's log. Raises WorkerError with the last lines of the
        log when the server ends instead, DeadlineError when `timeout_s` is over.
        """
        started_at = time.monotonic()
        shown_s = 0.0
        while True:
            raise_if_stopped()
            is_ready = check()
            if is_ready:
                # Another server may have answered in its place: the end of ours would be news.
                self._note_end(_NEWS_S)
            self.raise_if_ended()
            waited_s = time.monotonic() - started_at
            if is_ready:
                return waited_s
            if waited_s >= timeout_s:
                raise DeadlineError(
                    f"{self.name} was not ready within {format_seconds(timeout_s)} "
                    "(--service-timeout)",
                    details=self.last_log_lines(),
                )
            if phase is not None and waited_s - shown_s >= _SHOW_EVERY_S:
                shown_s = waited_s
                line = (self._last_lines(1) or [""])[0].strip()[:_SHOWN_LENGTH]
                phase.show(f"{waited_s:.0f} s; {line}" if line else f"{waited_s:.0f} s", 0)
            time.sleep(_CHECK_EVERY_S)

    def raise_if_ended(self) -> None:
        """Raise WorkerError, with the last lines of its log, if the server does not run."""
        if self.is_running:
            return
        raise WorkerError(self.name, self._how_it_ended(), details=self.last_log_lines())

    @property
    def is_running(self) -> bool:
        """Whether the server's first process runs, as far as is known."""
        if self._watcher is None or self._exit_code is not None:
            return False
        is_watched = self._watcher.poll() is None
        self._note_end(0)  # after the look at the watcher, which reports before it ends itself
        return self._exit_code is None and is_watched

    @property
    def is_to_be_stopped(self) -> bool:
        """Whether it was started, and not stopped since, even if it has ended by itself."""
        return self._watcher is not None

    def stop(self) -> None:
        """End the server and all that it started, and wait for that; nothing if that is done."""
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        with suppress(ProcessLookupError):
            watcher.send_signal(signal.SIGTERM)
        watcher.stdin.close()
        try:
            watcher.wait(self._stop_grace_s + _WATCHER_GRACE_S)
        except subprocess.TimeoutExpired:
            watcher.kill()
            watcher.wait()
        if self.pid is not None and watcher.returncode != 0:
            # The watcher did not come to its end: the server's group is still ours to end.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        watcher.stdout.close()

    def last_log_lines(self) -> str:
        """The end of what the server has printed, and where the rest is."""
        return "\n".join([*self._last_lines(_LOG_LINES_SHOWN), f"Full log: {self.log_path}"])

    def _last_lines(self, count: int) -> list[str]:
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - _LOG_BYTES_READ))
                text = log.read().decode(errors="replace")
        except OSError:
            return []
        lines = [_printable(line) for line in text.splitlines()]
        return [line for line in lines if line.strip()][-count:]

    def _note_end(self, timeout_s: float) -> None:
        report = self._next_report(timeout_s)
        if report.startswith("ended "):
            self._exit_code = int(report.removeprefix("ended "))

    def _next_report(self, timeout_s: float) -> str:
        """The watcher's next line; "" if there is none within the time."""
        assert self._watcher is not None
        assert self._watcher.stdout is not None
        expires_at = time.monotonic() + timeout_s
        while b"\n" not in self._reported:
            left_s = max(0.0, expires_at - time.monotonic())
            if not select.select([self._watcher.stdout], [], [], left_s)[0]:
                return ""
            received = os.read(self._watcher.stdout.fileno(), 4096)
            if not received:
                return ""
            self._reported += received
        line, _, self._reported = self._reported.partition(b"\n")
        return line.decode(errors="replace")

    def _how_it_ended(self) -> str:
        code = self._exit_code
        if code is None:
            return "has lost the process that watches it"
        if code < 0:
            with suppress(ValueError):
                return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def find_port(port: int | None, *, num_ports: int = 1) -> int:
    """The first of `num_ports` consecutive free TCP ports on this machine; `port` itself if given.

    Raises ConfigError naming --port if one of those from `port` on is taken.
    """
    if port is not None:
        taken = _first_taken(port, num_ports)
        if taken is not None:
            raise ConfigError(
                "--port", f"{taken} is in use on {LOCAL_HOST}; leave it out for a free one"
            )
        return port
    while True:
        with socket.socket() as chosen:
            chosen.bind((LOCAL_HOST, 0))
            number = int(chosen.getsockname()[1])
        if number + num_ports <= 2**16 and _first_taken(number, num_ports) is None:
            return number


def _first_taken(port: int, num_ports: int) -> int | None:
    for number in range(port, port + num_ports):
        with socket.socket() as attempt:
            # What a server that has just ended left in TIME_WAIT does not keep a new one away.
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind((LOCAL_HOST, number))
            except OSError:
                return number
    return None


def _printable(line: str) -> str:
    """Without colours and other control characters, which would change what a terminal shows."""
    return "".join(filter(str.isprintable, _ESCAPES.sub("", line.expandtabs(4))))
