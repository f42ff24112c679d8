"""Workers that come to an end in every way there is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from flexbench.core.errors import DeadlineError, Interrupted, WorkerError
from flexbench.core.processes import Crew, Deadline, Finished, Item, Ready
from flexbench.core.signals import SignalWatch
from tests.integration import workers


@pytest.fixture
def crew(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "scratch").mkdir()
    with (
        SignalWatch() as signals,
        Crew(
            log_folder=tmp_path / "logs", scratch_folder=tmp_path / "scratch", signals=signals
        ) as crew,
    ):
        yield crew


def deadline(seconds: float = 20) -> Deadline:
    return Deadline(seconds, lambda: f"nothing within {seconds} s")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_gone(*pids: int, within_s: float = 5) -> None:
    expires_at = time.monotonic() + within_s
    while not all(map(is_gone, pids)) and time.monotonic() < expires_at:
        time.sleep(0.02)
    assert all(map(is_gone, pids))


def test_messages_arrive_in_order_and_the_release_carries_its_payload(crew):
    worker = crew.start("worker", workers.report_and_finish, 1, "two")
    assert crew.next_message(deadline()) == (worker, Ready())
    before = time.monotonic()
    released_at = crew.release([worker], payload="go")
    assert before <= released_at <= time.monotonic()
    messages = [crew.next_message(deadline())[1] for _ in range(4)]
    assert messages == [Item("go"), Item(1), Item("two"), Finished()]
    with pytest.raises(DeadlineError, match="nothing within"):
        crew.next_message(deadline(0.3))


def test_an_exception_is_reported_with_its_text_and_log(crew):
    crew.start("client 3", workers.fail, "no such block")
    with pytest.raises(WorkerError) as raised:
        crew.next_message(deadline())
    assert raised.value.message == "client 3 failed: RuntimeError: no such block"
    assert "about to fail" in raised.value.details
    assert "Full log: " in raised.value.details
    assert "client-3.log" in raised.value.details


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_what_a_killed_worker_has_reported_comes_before_its_death(crew, number):
    worker = crew.start("victim", workers.report_then_kill_itself, number)
    assert crew.next_message(deadline()) == (worker, Item("last words"))
    with pytest.raises(WorkerError, match=f"victim was killed by {number.name}"):
        crew.next_message(deadline())


def test_a_worker_that_just_exits_is_an_error(crew):
    crew.start("worker", workers.exit_silently)
    with pytest.raises(WorkerError, match="ended unexpectedly with exit code 7"):
        crew.next_message(deadline())


@pytest.mark.timing
def test_the_death_of_one_is_noticed_while_others_wait(crew):
    crew.start("waiting", workers.wait_for_ever)
    victim = crew.start("victim", workers.wait_for_ever)
    assert {crew.next_message(deadline())[0].name for _ in range(2)} == {"waiting", "victim"}
    threading.Timer(0.2, os.kill, (victim.process.pid, signal.SIGKILL)).start()
    started_at = time.monotonic()
    with pytest.raises(WorkerError, match="victim was killed by SIGKILL"):
        crew.next_message(deadline())
    assert time.monotonic() - started_at < 2


def test_releasing_a_dead_worker_is_no_error_of_its_own(crew):
    victim = crew.start("victim", workers.exit_silently)
    time.sleep(0.5)
    crew.release([victim], payload="x" * 100_000)
    with pytest.raises(WorkerError, match="victim"):
        crew.next_message(deadline())


@pytest.mark.timing
def test_ending_takes_what_a_worker_has_started_with_it(crew):
    worker = crew.start("worker", workers.start_a_stubborn_child)
    _, message = crew.next_message(deadline())
    started_at = time.monotonic()
    crew.end([worker])
    assert time.monotonic() - started_at < 5
    assert_gone(*message.payload)


def test_children_of_a_worker_that_was_killed_are_ended_too(crew):
    worker = crew.start("worker", workers.start_a_stubborn_child)
    _, message = crew.next_message(deadline())
    worker.process.kill()
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        crew.next_message(deadline())
    crew.end([worker])
    assert_gone(*message.payload)
    # Not even a zombie: its orphans became ours, and we have collected them.
    with pytest.raises(ProcessLookupError):
        os.killpg(worker.process.pid, 0)


@pytest.mark.timing
def test_a_deadline_says_what_was_waited_for(crew):
    crew.start("worker", workers.wait_for_ever)
    crew.next_message(deadline())
    started_at = time.monotonic()
    with pytest.raises(DeadlineError, match=r"nothing within 0\.5 s"):
        crew.next_message(deadline(0.5))
    assert 0.4 < time.monotonic() - started_at < 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_the_waiting(crew, number):
    crew.start("worker", workers.wait_for_ever)
    crew.next_message(deadline())
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    with pytest.raises(Interrupted) as raised:
        crew.next_message(deadline())
    assert raised.value.exit_code == 128 + number


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with SignalWatch():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_nobody_waited_for_is_not_lost(number):
    watch = SignalWatch()
    watch.__enter__()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    with pytest.raises(Interrupted) as raised:
        watch.__exit__(None, None, None)
    assert raised.value.exit_code == 128 + number


def test_a_second_signal_does_not_disturb_the_ending(crew):
    worker = crew.start("worker", workers.start_a_stubborn_child)
    _, message = crew.next_message(deadline())
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted):
        crew.next_message(deadline())
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    crew.end([worker])
    assert_gone(*message.payload)


def test_no_process_of_ours_is_left_behind(tmp_path):
    before = children()
    with (
        SignalWatch() as signals,
        Crew(log_folder=tmp_path, scratch_folder=tmp_path, signals=signals) as crew,
    ):
        crew.start("worker", workers.wait_for_ever)
        crew.next_message(deadline())
    expires_at = time.monotonic() + 5
    while (left := children() - before) and time.monotonic() < expires_at:
        time.sleep(0.05)
    assert left == set()


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_shared_memory_of_the_caller_survives_a_crew(tmp_path):
    """The resource tracker would remove it, if a crew ended one that it has not started."""
    code = (
        "import sys\n"
        "from multiprocessing.shared_memory import SharedMemory\n"
        "from pathlib import Path\n"
        "from flexbench.core.processes import Crew\n"
        "from flexbench.core.signals import SignalWatch\n"
        "memory = SharedMemory(create=True, size=8)\n"
        "folder = Path(sys.argv[1])\n"
        "with SignalWatch() as signals, Crew(log_folder=folder, scratch_folder=folder,\n"
        "        signals=signals):\n"
        "    pass\n"
        "SharedMemory(memory.name).close()\n"
        "memory.close()\n"
        "memory.unlink()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_ignored_signal_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with SignalWatch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            watch.raise_if_stopped()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_ctrl_c_in_a_terminal_reaches_the_fork_server_too(tmp_path, temporary_folder):
    """The whole foreground group gets it, also while the fork server is still importing."""
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(30)\n")
    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\n"
        "from flexbench.core.errors import Interrupted\n"
        "from flexbench.core.processes import Crew, Deadline\n"
        "from flexbench.core.signals import SignalWatch\n"
        "from tests.integration import workers\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    try:\n"
        "        with SignalWatch() as signals, Crew(log_folder=folder, scratch_folder=folder,\n"
        "                signals=signals, preload=['slow_module']) as crew:\n"
        "            print('starting', flush=True)\n"
        "            crew.start('worker', workers.wait_for_ever)\n"
        "            while True:\n"
        "                crew.next_message(Deadline(20, str))\n"
        "    except Interrupted as error:\n"
        "        print(error)\n"
    )
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{os.getcwd()}:{tmp_path}"},
    ) as parent:
        assert parent.stdout.readline() == "starting\n"
        time.sleep(0.5)
        os.killpg(parent.pid, signal.SIGINT)
        output, errors = parent.communicate(timeout=10)
    assert output == "Stopped by Ctrl-C.\n"
    assert errors == ""
    assert parent.returncode == 0


def test_arguments_that_cannot_be_unpacked_are_an_error_with_a_log(crew):
    crew.start("worker", workers.wait_for_ever, workers.FailsToArrive())
    with pytest.raises(WorkerError, match="worker failed: ImportError: not in this process") as e:
        crew.next_message(deadline())
    assert "Traceback" in e.value.details


def test_temporary_files_of_workers_are_in_the_scratch_folder(crew, tmp_path):
    crew.start("worker", workers.leave_a_temporary_file)
    _, message = crew.next_message(deadline())
    assert message.payload.startswith(str(tmp_path / "scratch"))


def test_workers_end_when_the_parent_is_killed(tmp_path, temporary_folder):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flexbench.core.processes import Crew, Deadline\n"
        "from flexbench.core.signals import SignalWatch\n"
        "from tests.integration import workers\n"
        "folder = Path(sys.argv[1])\n"
        "with SignalWatch() as signals, Crew(log_folder=folder, scratch_folder=folder,\n"
        "        signals=signals) as crew:\n"
        "    crew.start('worker', workers.start_a_stubborn_child)\n"
        "    print(*crew.next_message(Deadline(20, str))[1].payload, flush=True)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(f"if __name__ == '__main__':\n    exec({code!r})\n")
    with subprocess.Popen(
        [sys.executable, script, tmp_path],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as parent:
        worker, stubborn = map(int, parent.stdout.readline().split())
        assert not is_gone(worker)
        parent.kill()
    assert_gone(worker)
    # SIGTERM is all that is left to send by then, and this one ignores it.
    os.kill(stubborn, signal.SIGKILL)
