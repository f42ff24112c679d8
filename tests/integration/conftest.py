"""Real processes: every test checks that it has left none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

FLEXBENCH = (sys.executable, "-m", "flexbench")
_MARK = "FLEXBENCH_TEST_MARK"


class Command:
    """A running `flexbench` command, and the processes that belong to it."""

    def __init__(self, program: list[str], folder: Path, temporary: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = folder
        self.temporary = temporary
        self._stdout = folder / "stdout"
        self._stderr = folder / "stderr"
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                program,
                cwd=folder,
                env={
                    **os.environ,
                    _MARK: self.mark,
                    "TMPDIR": str(self.temporary),
                    "PYTHONFAULTHANDLER": "1",  # see _where_it_is
                },
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def family(self) -> list[psutil.Process]:
        """All living processes that have inherited this command's mark, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get(_MARK) == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def worker(self, name: str, *, timeout_s: float = 60) -> psutil.Process:
        """The worker process called `name`, as soon as it exists."""
        title = f"flexbench: {name}"
        return self.wait_for(
            lambda: next(
                (p for p in self.workers() if " ".join(p.cmdline()).strip() == title), None
            ),
            f"a process called {title!r}",
            timeout_s,
        )

    def workers(self) -> list[psutil.Process]:
        """All workers, without what they started: the leaders of process groups."""
        return [p for p in self.family() if os.getpgid(p.pid) == p.pid != self.process.pid]

    def wait_for_text(self, text: str, *, timeout_s: float = 90) -> None:
        """Wait until `text` is in standard error."""
        self.wait_for(lambda: text in self.stderr, f"{text!r} in standard error", timeout_s)

    def wait_for(self, probe: Callable[[], Any], what: str, timeout_s: float) -> Any:
        expires_at = time.monotonic() + timeout_s
        while time.monotonic() < expires_at:
            has_ended = self.process.poll() is not None  # first: it may say something and end
            try:
                found = probe()
            except (psutil.NoSuchProcess, ProcessLookupError):
                found = None
            if found:
                return found
            assert not has_ended, f"ended before {what}: {self.stderr}"
            time.sleep(0.02)
        raise AssertionError(f"no {what} within {timeout_s} s; standard error: {self.stderr}")

    def finish(self, timeout_s: float) -> int:
        """Wait for the command's end; its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"did not end within {timeout_s} s; {self._where_it_is()}"
            ) from None

    def _where_it_is(self) -> str:
        """What its processes are doing, and standard error with the stacks of those of Python.

        Ends them: faulthandler writes the stacks of all threads when it is told to abort.
        """
        family = self.family()
        doing = []
        for process in family:
            try:
                line = " ".join(process.cmdline())[:120]
                seconds = sum(process.cpu_times()[:2])
                doing.append(f"{process.pid} {process.status()}, {seconds:.1f} s of CPU: {line}")
                process.send_signal(signal.SIGABRT)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=5)
        return "\n".join([f"load {os.getloadavg()}; its processes:", *doing, self.stderr])

    def assert_nothing_left(self, *, within_s: float = 5) -> None:
        """No process of the command lives on."""
        expires_at = time.monotonic() + within_s
        while self.family() and time.monotonic() < expires_at:
            time.sleep(0.05)
        assert [" ".join(process.cmdline()) for process in self.family()] == []

    def temporary_files(self) -> list[str]:
        """What the command has left in the folder for temporary files, logs left out."""
        left = (path for path in self.temporary.rglob("*") if not path.is_dir())
        return [str(path) for path in left if path.suffix != ".log"]

    def logs(self) -> list[Path]:
        """The logs that the command has kept."""
        return list(self.temporary.rglob("*.log"))

    def end(self) -> None:
        """Kill whatever there still is."""
        for process in self.family():
            process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where flexbench, and all processes that a test starts, put temporary files.

    Its path is short, unlike that of tmp_path: Unix sockets are made in there. The test's own
    process keeps its folder, in which multiprocessing has files until the end.
    """
    with tempfile.TemporaryDirectory(prefix="fbt-") as folder:
        monkeypatch.setattr("flexbench.core.folders.temporary_folder", lambda: folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def flexbench(tmp_path: Path, temporary_folder: Path) -> Iterator[Callable[..., Command]]:
    """Starts `flexbench` with arguments in a folder of its own."""
    commands: list[Command] = []

    def start(*arguments: object, program: tuple[object, ...] = FLEXBENCH) -> Command:
        command = Command(list(map(str, (*program, *arguments))), tmp_path, temporary_folder)
        commands.append(command)
        return command

    yield start
    for command in commands:
        command.end()
