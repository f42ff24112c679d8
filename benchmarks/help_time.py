"""How long `flexbench --help` takes, against a bare `import typer`.

Alternates both, prints medians and the median of the ratios. The goal is at most 3.

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
    flexbench = [str(Path(sys.executable).with_name("flexbench")), "--help"]
    typer = [sys.executable, "-c", "import typer"]
    seconds(flexbench), seconds(typer)  # the first runs read from disk
    pairs = [(seconds(flexbench), seconds(typer)) for _ in range(15)]
    ratios = [ours / bare for ours, bare in pairs]
    print(f"flexbench --help: median {statistics.median(p[0] for p in pairs) * 1000:.0f} ms")
    print(f"import typer:     median {statistics.median(p[1] for p in pairs) * 1000:.0f} ms")
    print(f"ratio:            median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
