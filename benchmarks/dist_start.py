"""Time from the command to the first token: `flexbench dist` beside transformers.

Three programs read the same folder, an OPT model with random weights, and generate one token for
one prompt:

- `flexbench dist --gen-len 1`: the whole command, with all its checks. The first token is that of
  its warm-up, which is the first that it computes at all; that it is there is told on standard
  error ("Warm-up: done").
- flexbench from Python: OptLM and generate().
- transformers: OPTForCausalLM.from_pretrained() and generate(), in an environment of its own.

They take turns. Before each is timed, it is run once. "warm": the folder is in the system's cache;
"cold": it is taken out of the cache before each start. What was read from the disk is shown, as the
kernel counts it for the process. Phases are the times from the end of one to the end of the next.

    .venv/bin/python benchmarks/dist_start.py
    .venv/bin/python benchmarks/dist_start.py --model opt-125m --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.dist_peers import (
    DEFAULT_ENVIRONMENTS,
    SYSTEMS,
    TRANSFORMERS,
    clean_environment,
    find_python,
    model_folder,
)

GOAL = 1.0
TIMEOUT_S = 300
_SECTOR_BYTES = 512  # what getrusage counts in
_PHASES = ("import torch", "import", "load", "first token")
# What `flexbench dist` tells when a phase has ended, or the next begins.
_COMMAND_PHASES = {
    "Loading weights ...": "import",
    "Loading weights: done": "load",
    "Warm-up: done": "first token",
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """One of those timed."""

    name: str
    command: Sequence[str]
    phases: dict[str, str]
    """The phase that has ended when a line begins so."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a program."""

    ends_s: dict[str, float]
    """When each phase ended, from the start of the process on."""
    disk_bytes: int

    @property
    def first_token_s(self) -> float:
        """From the command to the first token."""
        return self.ends_s["first token"]

    def phase_s(self, phase: str) -> float:
        """How long a phase took; 0 of one that is not told by itself."""
        before = [self.ends_s[name] for name in _PHASES[: _PHASES.index(phase)] if name in self]
        return self.ends_s[phase] - max(before, default=0.0) if phase in self else 0.0

    def __contains__(self, phase: str) -> bool:
        return phase in self.ends_s


def start(program: Program, folder: Path, num_threads: int) -> Start:
    """Run a program to its end."""
    environment = clean_environment({"OMP_NUM_THREADS": str(num_threads)})
    started_at = time.perf_counter()
    process = subprocess.Popen(
        program.command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    ends_s: dict[str, float] = {}
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            for beginning, phase in program.phases.items():
                if line.startswith(beginning):
                    ends_s.setdefault(phase, time.perf_counter() - started_at)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0 or "first token" not in ends_s:
        sys.exit(f"{program.name} ended with {process.returncode}\n{''.join(lines[-5:])}")
    return Start(ends_s=ends_s, disk_bytes=usage.ru_inblock * _SECTOR_BYTES)


def drop_from_cache(folder: Path) -> None:
    """Let the system forget what it has read of a folder's files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def programs_of(folder: Path, python: Path, args: argparse.Namespace) -> list[Program]:
    """What is timed."""
    request = {
        "folder": str(folder),
        "dtype": args.dtype,
        "prompt_len": args.prompt_len,
        "num_threads": args.threads,
    }

    def worker(name: str, interpreter: str, system: str) -> Program:
        settings = json.dumps({**request, "system": system})
        command = [interpreter, "-m", "benchmarks.dist_workers.first_token", settings]
        return Program(
            name=name, command=command, phases={f"{phase}: done": phase for phase in _PHASES}
        )

    flexbench = [
        *(str(Path(sys.executable).with_name("flexbench")), "dist", "--model", str(folder)),
        *("--dtype", args.dtype, "--gpu-batch-size", "1", "--num-gpu-batches", "1"),
        *("--prompt-len", str(args.prompt_len), "--gen-len", "1", "--no-log"),
    ]
    return [
        worker(TRANSFORMERS, str(python), "transformers"),
        Program(name="flexbench dist", command=flexbench, phases=_COMMAND_PHASES),
        worker("flexbench, Python", sys.executable, "flexbench"),
    ]


def show(title: str, rounds: Sequence[dict[str, Start]]) -> None:
    """Medians of one state of the cache, and the median of the ratios to transformers."""
    print(f"\n{title}: median of {len(rounds)}, seconds")
    heads = "".join(f"{phase:>14}" for phase in _PHASES)
    print(f"{'':20}{heads}{'all':>8}{'ratio':>8}{'GB from disk':>14}")
    for name in rounds[0]:
        starts = [one[name] for one in rounds]
        phases = "".join(
            f"{statistics.median(start.phase_s(phase) for start in starts):14.2f}"
            if phase in starts[0]
            else f"{'-':>14}"
            for phase in _PHASES
        )
        total = statistics.median(start.first_token_s for start in starts)
        ratio = statistics.median(
            one[name].first_token_s / one[TRANSFORMERS].first_token_s for one in rounds
        )
        disk = statistics.median(start.disk_bytes for start in starts) / 1e9
        print(f"{name:20}{phases}{total:8.2f}{ratio:8.2f}{disk:14.2f}")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    parser.add_argument("--cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--environments", type=Path, default=DEFAULT_ENVIRONMENTS)
    return parser


def main() -> None:
    """Take turns, and print."""
    args = make_parser().parse_args()
    environments = args.environments.expanduser().absolute()
    python = find_python(SYSTEMS[TRANSFORMERS], environments, sys.executable)
    folder, _ = model_folder(args.model, args.dtype, environments / "models", python)
    programs = programs_of(folder.path, python, args)
    print(
        f"{args.model}, {args.dtype}, 1 prompt of {args.prompt_len} tokens, {args.threads} threads"
    )
    with tempfile.TemporaryDirectory(prefix="fb-") as place:
        for program in programs:
            start(program, Path(place), args.threads)
        for state in args.cache:
            rounds = []
            for number in range(args.repeats):
                turn = number % len(programs)
                one = {}
                for program in (*programs[turn:], *programs[:turn]):
                    if state == "cold":
                        drop_from_cache(folder.path)
                    one[program.name] = start(program, Path(place), args.threads)
                rounds.append({program.name: one[program.name] for program in programs})
            show(state, rounds)
    print(f"\nGoal: `flexbench dist` at most {GOAL:g} times transformers.")


if __name__ == "__main__":
    main()
