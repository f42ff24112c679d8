"""`flexbench serving` beside inference-perf, guidellm and aiperf, in front of the same mock server.

Every load generator, with all its processes, has one core, the server another one. They take turns,
scenario by scenario, and medians are shown. All figures but a search's result come from the server:
it notes when each request was there and when each token was written. TTFT error is what the load
generator reports for a request, less what the server did for that very request; where the two can
not be matched, it is the difference of the distributions. Figures are per core: pinning is hard on
tools that consist of many processes.

Peers are installed from the package registry, newest, into environments of their own. One that
cannot be had is named, and left out.

    .venv/bin/python benchmarks/serving_vs_peers.py
    .venv/bin/python benchmarks/serving_vs_peers.py --only flexbench --scenario A --repeats 1
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load_generators import (
    LOG,
    AIPerf,
    Flexbench,
    GuideLLM,
    InferencePerf,
    LoadGenerator,
    NotInstalledError,
    Reported,
    Scenario,
)
from benchmarks.mock_server import in_flight, percentile

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="A", title="256 streams", concurrency=256),
        Scenario(name="B", title="64 streams", concurrency=64),
        Scenario(
            name="C",
            title="64 connections, 1 token at once, not streaming, no delay",
            concurrency=64,
            output_tokens=1,
            ttft_ms=0,
            itl_ms=0,
            streaming=False,
        ),
        Scenario(name="D", title="start to first request, 1 stream", concurrency=1, duration_s=2),
        Scenario(
            name="E",
            title="saturation point of a server with 8 places",
            concurrency=64,
            capacity=8,
            is_search=True,
            duration_s=5,
        ),
    )
}
PEERS: dict[str, Callable[[Path, str], LoadGenerator]] = {
    peer.name: peer for peer in (InferencePerf, GuideLLM, AIPerf)
}
NAMES = ("flexbench", *PEERS)
DEFAULT_ENVIRONMENTS = Path.home() / ".cache" / "flexbench-peers"
MOCK_SERVER = Path(__file__).with_name("mock_server.py")
START_TIMEOUT_S = 10
RUN_TIMEOUT_S = 180
SEARCH_TIMEOUT_S = 600
_SAMPLE_S = 0.2
_TAIL_LINES = 5


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one run came to. None: it has no such figure."""

    requests_per_s: float | None = None
    """Ended at the server, in the steady middle: the half of the time around its middle."""
    in_flight: float | None = None
    """At the server, on average over the steady middle."""
    ttft_error_p50_ms: float | None = None
    ttft_error_p99_ms: float | None = None
    num_matched: float | None = None
    """Requests whose TTFT error is known one by one."""
    cpu_ms_per_request: float | None = None
    """User and system time of all its processes, in the steady middle."""
    start_s: float | None = None
    """From the start of its process to its first request at the server."""
    wall_s: float | None = None
    """From the start of its process to its end."""
    found: float | None = None
    """Of a search: the streams, or the requests/s, at the saturation point."""
    found_error: float | None = None
    """As a fraction of the truth."""
    server_lateness_p99_ms: float | None = None
    server_busy: float | None = None
    """CPU time of the server as a fraction of the time between first and last request."""


class RunFailedError(Exception):
    """A load generator did not end well; has the last lines of what it said."""


# --- one run ---


@contextmanager
def mock_server(scenario: Scenario, core: int, folder: Path) -> Iterator[str]:
    """A server for a scenario on a core: its URL. Its truth is in `folder` afterwards."""
    command = [sys.executable, str(MOCK_SERVER), "--end-with-parent"]
    command += ["--ttft", f"{scenario.ttft_ms:g}ms", "--itl", f"{scenario.itl_ms:g}ms"]
    command += ["--truth", str(folder / "truth.json")]
    if scenario.capacity is not None:
        command += ["--capacity", str(scenario.capacity)]
    # Not preexec_fn, which this process with its threads could not bear: taskset does it.
    process = subprocess.Popen(_pinned(core, command), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        try:
            process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _pinned(core: int, command: list[str]) -> list[str]:
    return ["taskset", "--cpu-list", str(core), *command]


class CpuMeter(threading.Thread):
    """Samples the CPU time that a process and all that descend from it have used."""

    def __init__(self, root: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._used: dict[tuple[int, float], float] = {}
        self._stopped = threading.Event()
        self.times_ns: list[int] = []
        self.seconds: list[float] = []

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._stopped.wait(_SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        try:
            family = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return
        for process in family:
            try:
                times = process.cpu_times()
                self._used[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue  # has ended; what it used until the last sample stays
        self.times_ns.append(time.monotonic_ns())
        self.seconds.append(sum(self._used.values()))

    def stop(self) -> None:
        """Take no more samples."""
        self._stopped.set()
        self.join()

    def used_between(self, since_ns: int, until_ns: int) -> float | None:
        """Seconds of CPU from one moment to the other, interpolated; None: not sampled there."""
        if len(self.times_ns) < 2 or not self.times_ns[0] <= since_ns < until_ns:
            return None
        if until_ns > self.times_ns[-1]:
            return None
        return self._at(until_ns) - self._at(since_ns)

    def _at(self, moment_ns: int) -> float:
        after = max(bisect_left(self.times_ns, moment_ns), 1)
        t0, t1 = self.times_ns[after - 1 : after + 1]
        s0, s1 = self.seconds[after - 1 : after + 1]
        return s0 + (s1 - s0) * ((moment_ns - t0) / (t1 - t0))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A load generator's run: what the server saw of it, and what it cost."""

    truth: dict[str, Any]
    meter: CpuMeter
    started_ns: int
    ended_ns: int


def run_once(
    generator: LoadGenerator, scenario: Scenario, cores: tuple[int, int], folder: Path
) -> Run:
    """Let a load generator do a scenario in front of a server of its own. Raises RunFailedError."""
    client_core, server_core = cores
    with mock_server(scenario, server_core, folder) as url, (folder / LOG).open("wb") as log:
        command = _pinned(client_core, generator.command(scenario, url, folder))
        started_ns = time.monotonic_ns()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **generator.variables()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        meter = CpuMeter(psutil.Process(process.pid))
        meter.start()
        try:
            code = process.wait(SEARCH_TIMEOUT_S if scenario.is_search else RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RunFailedError("not ended in time") from None
        finally:
            ended_ns = time.monotonic_ns()
            meter.stop()
            _end_group(process)
    if code != 0:
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
        raise RunFailedError(f"exit code {code}\n" + "\n".join(lines[-_TAIL_LINES:]))
    truth = json.loads((folder / "truth.json").read_bytes())
    return Run(truth=truth, meter=meter, started_ns=started_ns, ended_ns=ended_ns)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the processes of a session that was started for one load generator."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


# --- figures ---


def figures_of(generator: LoadGenerator, scenario: Scenario, run: Run, folder: Path) -> Figures:
    """What a run came to. Raises RunFailedError if nothing arrived at the server."""
    requests = run.truth["requests"]
    if not requests:
        raise RunFailedError("no request arrived at the server")
    start_s = (requests[0]["arrived_ns"] - run.started_ns) / 1e9
    wall_s = (run.ended_ns - run.started_ns) / 1e9
    server = {
        "server_lateness_p99_ms": run.truth["lateness_ms"]["p99"],
        "server_busy": run.truth["cpu_s"] / _span_s(run.truth),
    }
    if scenario.is_search:
        point = generator.saturation_point(folder)
        assert scenario.ideal_rate is not None
        assert scenario.capacity is not None
        found = point.streams if point.streams is not None else point.rate_per_s
        truth = scenario.capacity if point.streams is not None else scenario.ideal_rate
        error = None if found is None else found / truth - 1
        return Figures(start_s=start_s, wall_s=wall_s, found=found, found_error=error, **server)
    since, until = steady_middle(run.truth)
    ended = [row for row in requests if row["outcome"] == "complete" and row["ended_ns"]]
    in_window = sum(since <= row["ended_ns"] < until for row in ended)
    spans = [(row["arrived_ns"], row["ended_ns"] or until) for row in requests]
    cpu_s = run.meter.used_between(since, until)
    p50, p99, matched = ttft_errors(ended, generator.reported(folder))
    return Figures(
        requests_per_s=in_window / (until - since) * 1e9,
        in_flight=in_flight(spans, since, until)["mean"],
        ttft_error_p50_ms=p50,
        ttft_error_p99_ms=p99,
        num_matched=matched,
        cpu_ms_per_request=None if cpu_s is None or not in_window else cpu_s / in_window * 1e3,
        start_s=start_s,
        wall_s=wall_s,
        **server,
    )


def _span_s(truth: dict[str, Any]) -> float:
    nanoseconds: int = truth["last_ns"] - truth["first_ns"]
    return max(nanoseconds, 1) / 1e9


def steady_middle(truth: dict[str, Any]) -> tuple[int, int]:
    """The half of the time between first and last request that lies around its middle."""
    first, last = truth["first_ns"], truth["last_ns"]
    quarter = (last - first) // 4
    return first + quarter, last - quarter


def ttft_errors(
    served: Sequence[dict[str, Any]], reported: Sequence[Reported]
) -> tuple[float | None, float | None, int]:
    """Reported TTFT less the server's: its median, its 99th percentile, and how many were matched.

    Matched are requests by their id or by their prompt, where a load generator tells these, else by
    their order, if it saw as many as the server. Otherwise percentiles are subtracted.
    """
    streams = [row for row in served if row["streaming"] and row["written_ns"]]
    if not streams or not reported:
        return None, None, 0
    errors = sorted(mine.ttft_ms - _ttft_ms(row) for row, mine in _matches(streams, reported))
    if errors:
        return percentile(errors, 0.5), percentile(errors, 0.99), len(errors)
    mine = sorted(request.ttft_ms for request in reported)
    true = sorted(map(_ttft_ms, streams))
    p50, p99 = (percentile(mine, share) - percentile(true, share) for share in (0.5, 0.99))
    return p50, p99, 0


def _ttft_ms(row: dict[str, Any]) -> float:
    nanoseconds: int = row["written_ns"][0] - row["arrived_ns"]
    return nanoseconds / 1e6


def _matches(
    served: Sequence[dict[str, Any]], reported: Sequence[Reported]
) -> list[tuple[dict[str, Any], Reported]]:
    in_order = sorted(reported, key=lambda request: request.sent_at)
    keys: tuple[tuple[str, Callable[[Reported], Any]], ...] = (
        ("request_id", lambda request: request.request_id),
        ("prompt_crc32", lambda request: request.prompt_crc32),
    )
    for name, key_of in keys:
        if key_of(in_order[0]) is None:
            continue
        # The same prompt may have been sent several times: first come, first matched.
        rows: dict[Any, deque[dict[str, Any]]] = defaultdict(deque)
        for row in served:
            rows[row[name]].append(row)
        waiting = ((rows[key_of(request)], request) for request in in_order)
        return [(candidates.popleft(), request) for candidates, request in waiting if candidates]
    # Requests of a warm-up, which are not reported, come first.
    last = sorted(served, key=lambda row: row["arrived_ns"])[-len(in_order) :]
    return list(zip(last, in_order, strict=True)) if len(last) == len(in_order) else []


def median_of(runs: Sequence[Figures]) -> Figures:
    """The median of each figure, of the runs that have it."""
    medians = {}
    for field in fields(Figures):
        values = [v for run in runs if (v := getattr(run, field.name)) is not None]
        medians[field.name] = statistics.median(values) if values else None
    return Figures(**medians)


# --- all of them ---


def measure(
    generators: Sequence[LoadGenerator],
    scenarios: Sequence[Scenario],
    cores: tuple[int, int],
    args: argparse.Namespace,
) -> dict[tuple[str, str], list[Figures]]:
    """Every load generator in every scenario, in turns. A search is done once."""
    runs: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    for number in range(args.repeats):
        for scenario in scenarios:
            if scenario.is_search and number > 0:
                continue
            for generator in generators:
                about = f"{scenario.name} {generator.name} {number + 1} of {args.repeats}"
                with tempfile.TemporaryDirectory(prefix="fb-") as name:
                    folder = Path(name)
                    try:
                        run = run_once(generator, scenario, cores, folder)
                        figures = figures_of(generator, scenario, run, folder)
                    except (RunFailedError, KeyError, OSError, ValueError) as error:
                        print(f"{about}: {type(error).__name__}: {error}", file=sys.stderr)
                        if args.keep is not None:
                            shutil.copytree(folder, args.keep / about.replace(" ", "-"))
                        continue
                print(f"{about}: {shown_briefly(figures)}", file=sys.stderr, flush=True)
                runs[scenario.name, generator.name].append(figures)
    return runs


def shown_briefly(figures: Figures) -> str:
    """One line: every figure that there is."""
    values = asdict(figures).items()
    return ", ".join(f"{name} {value:.4g}" for name, value in values if value is not None)


def find_generators(args: argparse.Namespace) -> list[LoadGenerator]:
    """Those asked for that can be had here."""
    found: list[LoadGenerator] = []
    for name in args.only or NAMES:
        try:
            found.append(
                PEERS[name](args.environments, args.python) if name in PEERS else Flexbench()
            )
        except NotInstalledError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def newest_python() -> str:
    """The newest Python that starts: peers ask for more than flexbench does."""
    for name in ("python3.13", "python3.12"):
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return sys.executable


def show(
    runs: dict[tuple[str, str], list[Figures]],
    generators: Sequence[LoadGenerator],
    scenarios: Sequence[Scenario],
) -> None:
    """One table a scenario."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for scenario in scenarios:
        table = Table(title=f"{scenario.name}: {scenario.title}{_ideal(scenario)}")
        columns = COLUMNS_OF_SEARCH if scenario.is_search else COLUMNS
        table.add_column("load generator")
        for title, _ in columns:
            table.add_column(title, justify="right")
        for generator in generators:
            done = runs.get((scenario.name, generator.name))
            name = f"{generator.name} {generator.version}"
            if not done:
                table.add_row(name, *("failed" for _ in columns))
                continue
            median = median_of(done)
            table.add_row(name, *(_cell(getattr(median, field)) for _, field in columns))
        console.print(table)


COLUMNS = (
    ("requests/s", "requests_per_s"),
    ("in flight at the server", "in_flight"),
    ("TTFT error p50, ms", "ttft_error_p50_ms"),
    ("p99, ms", "ttft_error_p99_ms"),
    ("CPU ms per request", "cpu_ms_per_request"),
    ("start to first request, s", "start_s"),
    ("server late p99, ms", "server_lateness_p99_ms"),
    ("server busy", "server_busy"),
)
COLUMNS_OF_SEARCH = (
    ("found", "found"),
    ("error", "found_error"),
    ("seconds", "wall_s"),
    ("start to first request, s", "start_s"),
)


def _ideal(scenario: Scenario) -> str:
    if scenario.ideal_rate is None:
        return ""
    if scenario.is_search:
        return f" (truth: {scenario.capacity} streams, {scenario.ideal_rate:.1f} requests/s)"
    return f" (ideal: {scenario.ideal_rate:.0f} requests/s, {scenario.concurrency} in flight)"


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def to_json(
    runs: dict[tuple[str, str], list[Figures]],
    generators: Sequence[LoadGenerator],
    scenarios: Sequence[Scenario],
) -> dict[str, Any]:
    """Versions, ideals, medians and single runs."""
    return {
        "versions": {generator.name: generator.version for generator in generators},
        "python": sys.version.split()[0],
        "load_average": os.getloadavg(),
        "scenarios": {
            scenario.name: {
                **asdict(scenario),
                "ideal_requests_per_s": scenario.ideal_rate,
                "load_generators": {
                    generator.name: {
                        "median": asdict(median_of(done)),
                        "runs": [asdict(figures) for figures in done],
                    }
                    for generator in generators
                    if (done := runs.get((scenario.name, generator.name)))
                },
            }
            for scenario in scenarios
        },
    }


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=NAMES, help="repeatable; default: all")
    parser.add_argument(
        "--scenario", action="append", choices=list(SCENARIOS), help="repeatable; default: all"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=DEFAULT_ENVIRONMENTS)
    parser.add_argument("--python", default=None, help="that makes them; default: the newest")
    parser.add_argument("--client-core", type=int, default=None, help="default: the last one")
    parser.add_argument("--server-core", type=int, default=None, help="default: the first one")
    parser.add_argument("--json", type=Path, help="where figures go; default: standard output")
    parser.add_argument("--keep", type=Path, help="where the files of runs that failed go")
    return parser


def main() -> None:
    """Measure, and print."""
    parser = make_parser()
    args = parser.parse_args()
    available = sorted(os.sched_getaffinity(0))
    client = available[-1] if args.client_core is None else args.client_core
    server = available[0] if args.server_core is None else args.server_core
    if client == server or not {client, server} <= set(available):
        parser.error(f"two different cores of {available} are needed")
    os.sched_setaffinity(0, {server})  # not where a load generator is measured
    args.environments = args.environments.expanduser().absolute()
    args.python = args.python or newest_python()
    scenarios = [SCENARIOS[name] for name in args.scenario or SCENARIOS]
    generators = find_generators(args)
    runs = measure(generators, scenarios, (client, server), args)
    show(runs, generators, scenarios)
    text = json.dumps(to_json(runs, generators, scenarios), indent=1)
    if args.json is not None:
        args.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
