"""`flexbench dist` as two stages of one thread each, beside one process with two threads.

The same prompts in both: the process takes them as one batch, the pipeline as T blocks, which are
under way at once (--num-inner-iterations). They take turns, each time as processes of their own
under the launcher that a user would take; figures are from their records. Shown are medians, the
ratio of total throughput (the median over the repeats, goal: at least 0.9), and the bubble: the
share of the stages' time that was spent waiting, beside what the run's own schedule gives with
equal stages (goal: within 5 points) and (S - 1) / (T + S - 1), which is for a pipeline that is
filled and drained once.

    .venv/bin/python benchmarks/dist_pipeline.py
    .venv/bin/python benchmarks/dist_pipeline.py --model facebook/opt-1.3b --num-inner-iterations 4
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(sys.executable).parent
NUM_STAGES = 2
GOAL, BUBBLE_GOAL = 0.9, 0.05
RUN_TIMEOUT_S = 600
_END_TIMEOUT_S = 10
_TAIL_LINES = 5


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one run, by their names in its record."""

    num_prompts: int
    total_throughput: float
    prefill_latency: float
    decode_latency: float
    bubble_fraction: float
    bubble_of_schedule: float
    bubble_theory: float
    busy_s: tuple[float, ...]
    """Of each stage: what it did not wait."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Figures:
        """From a line of the results' .jsonl file. Raises KeyError."""
        names = (
            *("total_throughput", "prefill_latency", "decode_latency"),
            *("bubble_fraction", "bubble_of_schedule", "bubble_theory"),
        )
        return cls(
            num_prompts=record["run"]["num_prompts"],
            busy_s=tuple(
                stage["wall_s"] - stage["send_s"] - stage["receive_s"] for stage in record["stages"]
            ),
            **{name: record["figures"][name] for name in names},
        )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A run of the one process, and the pipeline's run after it."""

    single: Figures
    pipeline: Figures

    @property
    def ratio(self) -> float:
        """The pipeline's throughput by the process's."""
        return self.pipeline.total_throughput / self.single.total_throughput

    @property
    def bubble_error(self) -> float:
        """How far the measured bubble is above the schedule's."""
        return self.pipeline.bubble_fraction - self.pipeline.bubble_of_schedule


def command(args: argparse.Namespace, batch_size: int, output: Path) -> list[str]:
    """A run of `flexbench dist`, but for its launcher."""
    return [
        *(str(PROGRAMS / "flexbench"), "dist", "--quiet", "--no-log"),
        *("--model", args.model, "--dtype", args.dtype),
        *("--prompt-len", str(args.prompt_len), "--gen-len", str(args.gen_len)),
        *("--gpu-batch-size", str(batch_size), "--output", str(output)),
    ]


def pipeline_command(args: argparse.Namespace, output: Path) -> list[str]:
    """The same prompts in T blocks, on two ranks that are bound to a core each."""
    return [
        *(str(PROGRAMS / "mpirun"), "-np", str(NUM_STAGES), "--bind-to", args.bind_to),
        *command(args, args.num_prompts // args.num_inner_iterations, output),
        *("--num-inner-iterations", str(args.num_inner_iterations), "--balance", args.balance),
        *(["--async-comm"] if args.async_comm else []),
    ]


def run(arguments: Sequence[str], output: Path, num_threads: int) -> Figures:
    """Run it, and read the record it appended. Raises RuntimeError when there is none."""
    variables = {"OMP_NUM_THREADS": str(num_threads)}
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(
        arguments,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=RUN_TIMEOUT_S)
    finally:
        end(process)
    if process.returncode != 0:
        lines = errors.strip().splitlines()
        raise RuntimeError(f"exit code {process.returncode}\n" + "\n".join(lines[-_TAIL_LINES:]))
    lines = output.with_suffix(".jsonl").read_text().splitlines()
    return Figures.from_record(json.loads(lines[-1]))


def end(process: subprocess.Popen[str]) -> None:
    """End a run, if it has not ended: mpirun ends its ranks when it is told to."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(args: argparse.Namespace) -> list[Pair]:
    """One after the other, as often as asked."""
    pairs = []
    with tempfile.TemporaryDirectory(prefix="fb-") as folder:
        one, two = Path(folder) / "one.tsv", Path(folder) / "two.tsv"
        for number in range(args.repeats):
            single = run(command(args, args.num_prompts, one), one, NUM_STAGES)
            pipeline = run(pipeline_command(args, two), two, 1)
            pairs.append(Pair(single=single, pipeline=pipeline))
            print(f"{number + 1} of {args.repeats}: {pairs[-1].ratio:.3f}", file=sys.stderr)
    return pairs


def show(pairs: Sequence[Pair], args: argparse.Namespace) -> None:
    """Medians, and the two goals."""

    def median(figures: Sequence[Figures], name: str) -> float:
        return float(statistics.median(getattr(each, name) for each in figures))

    print(
        f"{args.model} {args.dtype}, {args.num_prompts} prompts of {args.prompt_len} + "
        f"{args.gen_len} tokens, {args.repeats} times"
    )
    runs = {
        "1 process, 2 threads": [pair.single for pair in pairs],
        f"2 stages, 1 thread each, T={args.num_inner_iterations}": [p.pipeline for p in pairs],
    }
    for name, figures in runs.items():
        print(
            f"{name:32} {median(figures, 'total_throughput'):8.1f} tokens/s, "
            f"prefill {median(figures, 'prefill_latency'):.3f} s, "
            f"decode {median(figures, 'decode_latency'):.3f} s"
        )
    ratio = statistics.median(pair.ratio for pair in pairs)
    print(f"ratio {ratio:.3f} (goal: at least {GOAL})")
    stages = [pair.pipeline for pair in pairs]
    error = statistics.median(pair.bubble_error for pair in pairs)
    print(
        f"bubble {median(stages, 'bubble_fraction'):.1%}, of the schedule "
        f"{median(stages, 'bubble_of_schedule'):.1%}: {error * 100:+.1f} points "
        f"(goal: within {BUBBLE_GOAL * 100:.0f}); "
        f"(S - 1) / (T + S - 1) = {median(stages, 'bubble_theory'):.1%}"
    )
    busy = [statistics.median(times) for times in zip(*(s.busy_s for s in stages), strict=True)]
    print("stages were busy for " + " and ".join(f"{seconds:.3f} s" for seconds in busy))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="facebook/opt-125m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument(
        "--num-inner-iterations", type=int, default=2, metavar="T", help="a divisor of the prompts"
    )
    parser.add_argument("--balance", default="layers", help="of the layers among the stages")
    parser.add_argument("--async-comm", action="store_true")
    parser.add_argument("--bind-to", choices=("core", "none"), default="core")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where every single figure goes")
    return parser


def main() -> None:
    """Measure, and print."""
    parser = make_parser()
    args = parser.parse_args()
    if args.num_prompts % args.num_inner_iterations:
        parser.error("--num-prompts has to be a multiple of --num-inner-iterations")
    if len(os.sched_getaffinity(0)) < NUM_STAGES:
        parser.error(f"{NUM_STAGES} cores are needed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way
    try:
        pairs = measure(args)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        sys.exit(f"dist_pipeline: {error}")
    show(pairs, args)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(pair) for pair in pairs], indent=1) + "\n")


if __name__ == "__main__":
    main()
