from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

pytest.importorskip("psutil", reason="processes are looked at with psutil")

import psutil

from flexbench.core.errors import ConfigError, DeadlineError, Interrupted, WorkerError
from flexbench.core.progress import Silence
from flexbench.core.service_process import ServiceProcess, find_port

PYTHON = [sys.executable, "-S", "-c"]
# Says which processes there are, itself and one in a session of its own; neither ends by itself.
FAMILY = """
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
with open("pids.tmp", "w") as file:
    file.write(f"{os.getpid()} {other.pid}")
os.rename("pids.tmp", "pids")
time.sleep(60)
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []

    def make_one(code, *, stop_grace_s=1.0, **options):
        process = ServiceProcess(
            "server",
            [*PYTHON, textwrap.dedent(code)],
            log_path=tmp_path / "server.log",
            stop_grace_s=stop_grace_s,
            **options,
        )
        made.append(process)
        return process

    yield make_one
    for process in made:
        process.stop()


def never_stopped():
    pass


def wait(process, check, timeout_s=5.0):
    return process.wait_until_ready(check, timeout_s=timeout_s, raise_if_stopped=never_stopped)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids):
    expires_at = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < expires_at:
        time.sleep(0.01)
    return [pid for pid in pids if is_running(pid)]


def family(folder):
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def test_a_server_runs_until_it_is_stopped(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TAKEN_AWAY", "1")
    process = make(
        """
        import os, pathlib, time
        print(os.environ["ADDED"], "TAKEN_AWAY" in os.environ, flush=True)
        pathlib.Path("ready").touch()
        time.sleep(60)
        """,
        environment={"ADDED": "added", "TAKEN_AWAY": None},
    )
    process.start()
    assert wait(process, (tmp_path / "ready").exists) < 5
    assert process.is_running
    assert os.getpgid(process.pid) == process.pid
    assert is_running(process.pid)
    process.stop()
    assert not is_running(process.pid)
    assert not process.is_running
    assert (tmp_path / "server.log").read_text() == "added False\n"
    process.stop()


def test_a_server_is_not_told_the_keys_of_other_endpoints(make, tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "AZUREML_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "s3cret")
    code = "import os; print([n for n in os.environ if n.endswith('_API_KEY')]); raise SystemExit"
    for environment in (None, {"OPENAI_API_KEY": "given"}):
        process = make(code, environment=environment)
        process.start()
        with pytest.raises(WorkerError):
            wait(process, lambda: False)
        process.stop()
    log = (tmp_path / "server.log").read_text().splitlines()
    assert [sorted(ast.literal_eval(line)) for line in log] == [
        ["VLLM_API_KEY"],
        ["OPENAI_API_KEY", "VLLM_API_KEY"],
    ]


def test_a_wait_shows_the_last_line_of_the_log(make, monkeypatch):
    class Shown(Silence):
        def __init__(self):
            self.shown = []

        def show(self, text, completed):
            self.shown.append((text, completed))

    monkeypatch.setattr("flexbench.core.service_process._SHOW_EVERY_S", 0.2)
    process = make(
        r"""
        import time
        print("first\n  \x1b[31m" + "loading " * 10, end="\n\n", flush=True)
        time.sleep(60)
        """
    )
    process.start()
    phase = Shown()
    with pytest.raises(DeadlineError):
        process.wait_until_ready(
            lambda: False, timeout_s=0.7, raise_if_stopped=never_stopped, phase=phase
        )
    assert 1 <= len(phase.shown) <= 3
    # 60 characters of it.
    assert phase.shown[-1] in [(f"{s} s; " + "loading " * 7 + "load", 0) for s in (0, 1)]
    assert process.is_to_be_stopped
    process.stop()
    assert not process.is_to_be_stopped


def test_one_that_ends_shows_the_end_of_its_log(make, tmp_path):
    (tmp_path / "server.log").write_text("of an earlier one\n")
    process = make(
        r"""
        import sys
        for number in range(30):
            print(f"\x1b[31mline {number}\x1b[0m\x07", file=sys.stderr)
        sys.exit(3)
        """
    )
    process.start()
    with pytest.raises(WorkerError, match=r"^server ended with exit code 3$") as caught:
        wait(process, lambda: False)
    assert caught.value.details.splitlines() == [
        *(f"line {number}" for number in range(15, 30)),
        f"Full log: {tmp_path / 'server.log'}",
    ]


def test_an_earlier_log_is_not_shown(make, tmp_path):
    (tmp_path / "server.log").write_text("of an earlier one\n")
    process = make("raise SystemExit('its own')")
    process.start()
    with pytest.raises(WorkerError) as caught:
        wait(process, lambda: False)
    assert caught.value.details.splitlines()[0] == "its own"


def test_one_that_ends_while_another_answers_in_its_place(make):
    process = make("raise SystemExit(1)")
    process.start()
    with pytest.raises(WorkerError, match="ended with exit code 1"):
        wait(process, lambda: not psutil.pid_exists(process.pid))


def test_one_that_was_killed(make):
    process = make("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    process.start()
    with pytest.raises(WorkerError, match="was killed by SIGKILL"):
        wait(process, lambda: False)


def test_one_that_is_not_ready_in_time(make):
    process = make("import time; print('loading', flush=True); time.sleep(60)")
    process.start()
    with pytest.raises(DeadlineError, match=r"within 500 ms \(--service-timeout\)") as caught:
        wait(process, lambda: False, timeout_s=0.5)
    assert caught.value.details.startswith("loading\n")
    assert process.is_running


def test_a_wait_ends_with_ctrl_c(make):
    process = make("import time; time.sleep(60)")
    process.start()

    def stopped():
        raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted):
        process.wait_until_ready(lambda: False, timeout_s=60, raise_if_stopped=stopped)


def test_a_command_that_is_not_there(tmp_path):
    process = ServiceProcess("server", [str(tmp_path / "none")], log_path=tmp_path / "log")
    with pytest.raises(WorkerError, match="server could not be started: No such file"):
        process.start()
    process.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are not found")
def test_processes_that_left_its_group_are_ended(make, tmp_path):
    process = make(FAMILY)
    process.start()
    wait(process, (tmp_path / "pids").exists)
    pids = family(tmp_path)
    assert pids[0] == process.pid
    process.stop()
    assert [pid for pid in pids if is_running(pid)] == []


@pytest.mark.timing
def test_one_that_ignores_sigterm_is_killed(make, tmp_path):
    process = make(f"{STUBBORN}; {FAMILY}", stop_grace_s=0.3)
    process.start()
    wait(process, (tmp_path / "pids").exists)
    started_at = time.monotonic()
    process.stop()
    assert 0.3 <= time.monotonic() - started_at < 3
    assert not is_running(process.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are not found")
def test_what_one_that_was_killed_leaves_is_ended(make, tmp_path):
    process = make(FAMILY)
    process.start()
    wait(process, (tmp_path / "pids").exists)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError):
        wait(process, lambda: False)
    assert wait_until_gone(family(tmp_path)) == []


def test_all_end_when_flexbench_is_killed(tmp_path):
    code = f"""
import pathlib, time
from flexbench.core.service_process import ServiceProcess
process = ServiceProcess("server", {[*PYTHON, FAMILY]!r}, log_path=pathlib.Path("log"), stop_grace_s=1.0)
process.start()
time.sleep(60)
"""
    flexbench = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    expires_at = time.monotonic() + 10
    while not (tmp_path / "pids").exists() and time.monotonic() < expires_at:
        time.sleep(0.01)
    pids = family(tmp_path)
    assert all(map(is_running, pids))
    flexbench.kill()
    flexbench.wait()
    assert wait_until_gone(pids) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it lives on until stop()")
def test_it_ends_with_what_watches_it(make, tmp_path):
    process = make(
        f"{STUBBORN}; import pathlib, time; pathlib.Path('ready').touch(); time.sleep(60)"
    )
    process.start()
    wait(process, (tmp_path / "ready").exists)
    psutil.Process(process.pid).parent().kill()
    with pytest.raises(WorkerError, match="has lost the process that watches it"):
        wait(process, lambda: False)
    assert wait_until_gone([process.pid]) == []


def test_a_free_port():
    port = find_port(None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        with pytest.raises(ConfigError, match=rf"^--port: {port} is in use on 127\.0\.0\.1"):
            find_port(port)
        with pytest.raises(ConfigError, match=rf"^--port: {port} is in use"):
            find_port(port - 1, num_ports=2)
    assert find_port(port) == port
