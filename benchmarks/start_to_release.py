"""How long until the clients are released, and where the time goes.

Runs `flexbench petals` with 4 clients and 2 servers several times and reads its records. The goal
is at most 25 s on 2 cores.

    .venv/bin/python benchmarks/start_to_release.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path


def one_start(folder: Path) -> dict[str, float]:
    """Seconds of one start, by phase."""
    output = folder / "petals.tsv"
    started_at = datetime.now(UTC)
    subprocess.run(
        [
            *(sys.executable, "-m", "flexbench", "petals", "--quiet", "--output", str(output)),
            *("--num-processes", "4", "--num-servers", "2"),
            *("--sequence-length", "256", "--max-tokens", "1"),
        ],
        check=True,
    )
    record = json.loads((folder / "petals.jsonl").read_text().splitlines()[-1])
    release = (datetime.fromisoformat(record["released_at"]) - started_at).total_seconds()
    swarm = record["swarm_startup_s"]
    clients = max(client["warmup_s"] for client in record["clients"])
    return {
        "command start": release - swarm - clients,
        "swarm (imports, DHT, weights, servers)": swarm,
        "clients (imports, DHT, embeddings, warm-up)": clients,
        "start to release": release,
    }


def main() -> None:
    """Repeat, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        starts = [one_start(Path(folder)) for _ in range(args.repeats)]
    for phase in starts[0]:
        values = [start[phase] for start in starts]
        print(
            f"{phase:45} median {statistics.median(values):5.1f} s "
            f"({min(values):.1f} to {max(values):.1f})"
        )


if __name__ == "__main__":
    main()
