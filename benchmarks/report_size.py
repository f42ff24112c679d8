"""How long a report of a million runs takes, and how much memory.

Writes a folder with thousands of results files as `flexbench petals` leaves them, a part of them
with a record for each row, and runs `flexbench report` on it in a process of its own. A plain loop
over the same rows, each read by `core.results.read_rows` and grouped in a dict, is timed beside it.

    .venv/bin/python benchmarks/report_size.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flexbench.core.results import COLUMNS, InputFileError, ResultRow, format_row, read_rows

HEADER = "\t".join(COLUMNS) + "\n"
LENGTHS = (128, 256, 512, 1024)
PLAIN = "--plain"


def make_row(source: random.Random) -> ResultRow:
    """A run of one of 120 configurations, with figures that have all their digits."""
    num_processes = source.randint(1, 10)
    return ResultRow(
        batch_size=source.choice((1, 2, 4)),
        num_micro_batches=1,
        num_processes=num_processes,
        sequence_length=source.choice(LENGTHS),
        max_tokens=32,
        throughput=num_processes * source.gauss(10, 1) + 20,
        mean_latency=abs(source.gauss(3, 0.2)) + 0.1,
    )


def make_record(row: ResultRow, number: int) -> dict[str, Any]:
    """What `flexbench petals` writes of a run with two requests a client, as long as a real one."""
    values = {name: getattr(row, name) for name in COLUMNS}
    load = {name: values[name] for name in COLUMNS[:5]}
    hops = [{"peer_id": "x" * 52, "start": start, "end": start + 6} for start in (0, 6)]
    request = {
        "latency_s": row.mean_latency,
        "started_after_release_s": 0.01,
        "generated_tokens": 32,
        "failed_attempts": 0,
        "route": hops,
    }
    clients = [
        {"process_index": index, "warmup_s": 2.5, "requests": [request, request]}
        for index in range(row.num_processes)
    ]
    return {
        "schema_version": 1,
        "system": "petals",
        "status": "ok",
        "started_at": f"2026-01-01T00:00:00.{number:09}+00:00",
        "run": load,
        "model": {"name": "facebook/opt-125m", "hidden_size": 768, "num_hidden_layers": 12},
        "initial_peers": ["/ip4/127.0.0.1/tcp/31337/p2p/" + "x" * 52],
        "configuration": {"device": "auto", "num_servers": 2, "prefix": "facebook/opt-125m"},
        "swarm": {"servers": hops, "device": "cpu", "dtype": "float32", "embedded": True},
        "machine": {"os": "Linux", "cpu": "a CPU", "num_cpus": 8, "gpus": []},
        "figures": {"throughput": row.throughput, "mean_latency": row.mean_latency},
        "clients": clients,
    }


def write_folder(folder: Path, *, num_files: int, num_rows: int, record_share: float) -> int:
    """Write the files; how many bytes they have."""
    source = random.Random(0)  # noqa: S311
    per_file, rest = divmod(num_rows, num_files)
    written = num_records = 0
    for number in range(num_files):
        rows = [make_row(source) for _ in range(per_file + (number < rest))]
        path = folder / f"{number // 100:03}" / f"run-{number:05}.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(HEADER + "".join(f"{format_row(row)}\n" for row in rows))
        written += path.stat().st_size
        if num_records < record_share * num_rows:
            path = path.with_suffix(".jsonl")
            records = (make_record(row, num_records + index) for index, row in enumerate(rows))
            path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
            num_records += len(rows)
            written += path.stat().st_size
    return written


def loop_plainly(folder: Path) -> None:
    """Mean throughput and latency of each configuration, as a script of ten lines would do it."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for path in folder.rglob("*.tsv"):
        for row in read_rows(path):
            if isinstance(row, InputFileError):
                raise row
            key = tuple(getattr(row, name) for name in COLUMNS[:5])
            group = groups.setdefault(key, [0, 0.0, 0.0])
            group[0] += 1
            group[1] += row.throughput
            group[2] += row.mean_latency
    print(f"{len(groups)} configurations")


def run(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak resident MiB, and the output of a command that is to succeed."""
    started_at = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started_at
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{command[0]} ended with exit code {process.returncode}")
    return seconds, usage.ru_maxrss / 1024, output


def main() -> None:
    """Write, run, and print."""
    parser = argparse.ArgumentParser(description="Time and memory of a report of many runs.")
    parser.add_argument("--files", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--record-share", type=float, default=0.01, help="rows that have a record")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--format", default="csv")
    parser.add_argument(PLAIN, metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain is not None:
        loop_plainly(args.plain)
        return
    with tempfile.TemporaryDirectory(prefix="flexbench-report-size-") as name:
        folder = Path(name)
        written = write_folder(
            folder, num_files=args.files, num_rows=args.rows, record_share=args.record_share
        )
        print(f"{args.rows:,} rows in {args.files:,} files, {written / 2**20:.0f} MiB")
        report = [sys.executable, "-m", "flexbench", "report", name, "--format", args.format]
        plain = [sys.executable, __file__, PLAIN, name]
        # In turns: what else the machine does falls upon both.
        results = [(run(report), run(plain)) for _ in range(args.repeats)]
    for title, side in (("flexbench report", 0), ("plain loop", 1)):
        seconds, memory, output = min((pair[side] for pair in results), key=lambda one: one[0])
        lines = output.count("\n")
        print(f"{title + ':':<18} {seconds:6.2f} s, {memory:5.0f} MiB, {lines} lines of output")
    ratio = min(pair[0][0] for pair in results) / min(pair[1][0] for pair in results)
    print(f"the report takes {ratio:.2f} times as long as the loop")


if __name__ == "__main__":
    main()
