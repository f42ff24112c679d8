"""How long `flexbench --help` and an offline estimate take, against a bare `import typer`.

Alternates them, prints medians and the median of the ratios. The goal for the help is at most 3,
for `flexbench server-config --dry-run` an answer within 2 s.

    .venv/bin/python benchmarks/help_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(command: list[str]) -> float:
    """Wall time of one run."""
    started_at = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started_at


def main() -> None:
    """Alternate, and print."""
    flexbench = str(Path(sys.executable).with_name("flexbench"))
    commands = {
        "import typer": [sys.executable, "-c", "import typer"],
        "flexbench --help": [flexbench, "--help"],
        "flexbench server-config --dry-run": [flexbench, "server-config", "--dry-run"],
    }
    for command in commands.values():
        seconds(command)  # the first runs read from disk
    rounds = [{name: seconds(command) for name, command in commands.items()} for _ in range(15)]
    for name in commands:
        median = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times["import typer"] for times in rounds)
        print(f"{name:34} median {median * 1000:5.0f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
