"""Weights on disk: how well reading and computing overlap, and what accelerate's disk_offload does.

overlap: `--percent 0 0 100 0 100 0`. One process does the whole run, all its reads without the
computing, and all its computing without the reads, in turns; the figure is the median of
total / max(reads, computing). The goal is at most 1.1. Where prompts take longer to compute than to
read weights for, and later tokens the other way round, that is out of reach with room for two
layers: "by token" is the median of total / sum over tokens of max(reads, computing). And where both
use the same cores and memory, either is slower beside the other: "at once" is the time of both side
by side, with nothing that waits for anything, which is what the machine can do.

accelerate: both systems within the same memory, by default half of what the weights take. Batch
sizes are tuned for each: short runs of each candidate tell what it would give, and how much memory
it takes, which is the peak of the process's anonymous memory while it generates (loading is not
counted, nor are accelerate's mapped files: gifts). The best that fits runs in full, in turns. The
goal is at least 5 times accelerate's tokens/s. Flexbench may put keys and values on disk, too.

Reads are real: flexbench reads past the system's cache (O_DIRECT); accelerate maps files, which are
taken out of the cache before each pass through the model. The kernel's count of bytes that each
process has had from the disk is shown beside the bytes that its weights have.

    .venv/bin/python benchmarks/dist_offload.py
    .venv/bin/python benchmarks/dist_offload.py --model opt-125m --parts overlap --repeats 3
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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.dist_peers import (
    DEFAULT_ENVIRONMENTS,
    SYSTEMS,
    TRANSFORMERS,
    clean_environment,
    find_python,
    model_folder,
)
from flexbench.dist.opt_config import OptConfig

OVERLAP_GOAL = 1.1
THROUGHPUT_GOAL = 5.0
_SAMPLE_S = 0.01
_TRIAL_TOKENS = 3
_GIB = 2**30
_WEIGHTS_ON_DISK = (0, 0, 100, 0, 100, 0)
_ALL_ON_DISK = (0, 0, 0, 0, 100, 0)
# Prompts of accelerate's trials; all of a run are one batch.
_ACCELERATE = (8, 16, 24, 32, 48, 64, 96, 128)
# Prompts, and how many of them are one batch.
_FLEXBENCH = ((64, 32), (128, 64), (128, 128), (256, 64), (256, 128), (512, 64), (512, 128))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a worker is to do."""

    system: str
    folder: str
    dtype: str
    offload_dir: str
    num_threads: int
    num_prompts: int
    gpu_batch_size: int
    prompt_len: int
    gen_len: int
    percent: tuple[int, ...] = _WEIGHTS_ON_DISK
    modes: tuple[str, ...] = ("total",)
    repeats: int = 1

    @property
    def label(self) -> str:
        """In a table."""
        parts = f"{self.num_prompts}" + (
            f" as {self.num_prompts // self.gpu_batch_size} x {self.gpu_batch_size}"
            if self.gpu_batch_size < self.num_prompts
            else ""
        )
        return f"{self.system}, {parts}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out."""

    request: Request
    lines: list[dict[str, Any]]
    peak_bytes: int
    """Of anonymous memory, while it worked. Loading may take more, and more or less each time."""

    def seconds(self, mode: str) -> list[float]:
        """Of each repeat."""
        return [line["seconds"] for line in self.lines if line["mode"] == mode]

    def token_seconds(self, mode: str) -> list[list[float]]:
        """Of each repeat, what each token took: the first one is the prefill."""
        ends = [line["token_ends_s"] for line in self.lines if line["mode"] == mode]
        return [[end - begin for begin, end in pairwise([0.0, *each])] for each in ends]

    def tokens_per_s(self, gen_len: int) -> float:
        """What `gen_len` tokens would give, if each took as long as the last of these did."""
        ends = self.lines[-1]["token_ends_s"]
        step_s = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
        seconds: float = ends[0] + (gen_len - 1) * step_s
        return self.request.num_prompts * gen_len / seconds


def work(request: Request, python: Path) -> Result | None:
    """Start a worker, and watch its memory; None and a word on stderr if it fails."""
    variables = {"OMP_NUM_THREADS": str(request.num_threads)}
    command = [str(python), "-m", "benchmarks.dist_workers.offload", json.dumps(asdict(request))]
    samples: list[tuple[float, int]] = []
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=clean_environment(variables), stdout=output, stderr=errors
        )
        try:
            while process.poll() is None:
                samples.append((time.monotonic(), anonymous_bytes(process.pid)))
                time.sleep(_SAMPLE_S)
        finally:
            process.kill()
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            said = errors.read().strip().splitlines() or ["?"]
            tell(f"{request.label} ended with {process.returncode}: {said[-1]}")
            return None
        lines = [json.loads(line) for line in output if line.startswith("{")]
    started_at = min(line["started_at"] for line in lines)
    peak = max(size for sampled_at, size in samples if sampled_at >= started_at)
    return Result(request=request, lines=lines, peak_bytes=peak)


def anonymous_bytes(pid: int) -> int:
    """What a process has in memory that is in no file; 0 when it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def tell(text: str) -> None:
    """What is going on."""
    print(text, file=sys.stderr, flush=True)


# --- overlap ---


def measure_overlap(base: Request, batch_sizes: Sequence[int]) -> None:
    """Print total, reads and computing for each batch size."""
    print(f"\nOverlap: {base.prompt_len} + {base.gen_len} tokens, seconds (medians)")
    print(
        f"{'prompts':>8}{'total':>9}{'reads':>9}{'computing':>11}{'at once':>9}{'ratio':>8}"
        f"{'by token':>10}{'of both at once':>17}{'GB/s':>8}  how read"
    )
    for batch_size in batch_sizes:
        request = replace(
            base,
            num_prompts=batch_size,
            gpu_batch_size=batch_size,
            modes=("total", "disk", "compute", "at once"),
        )
        result = work(request, Path(sys.executable))
        if result is None:
            continue
        total, disk, compute, at_once = times = [result.seconds(mode) for mode in request.modes]
        ratios = [t / max(d, c) for t, d, c in zip(total, disk, compute, strict=True)]
        by_token = ratios_by_token(*(result.token_seconds(mode) for mode in request.modes[:3]))
        of_both = [t / both for t, both in zip(total, at_once, strict=True)]
        whole = next(line for line in result.lines if line["mode"] == "total")
        medians = [statistics.median(of_mode) for of_mode in times]
        rate = whole["read_bytes"] / medians[0] / 1e9
        print(
            f"{batch_size:8}{medians[0]:9.2f}{medians[1]:9.2f}{medians[2]:11.2f}{medians[3]:9.2f}"
            f"{statistics.median(ratios):8.2f}{statistics.median(by_token):10.2f}"
            f"{statistics.median(of_both):17.2f}{rate:8.2f}  {whole['access']}, "
            f"{whole['read_bytes'] / 1e9:.2f} GB from disk",
            flush=True,
        )


def ratios_by_token(
    total: Sequence[Sequence[float]],
    reads: Sequence[Sequence[float]],
    computing: Sequence[Sequence[float]],
) -> list[float]:
    """Of each repeat, the time of all tokens by the sum of what is longer in each.

    Seconds by repeat and token. Room for keys and values, which is made before the first token, is
    in none of them.
    """
    return [
        sum(of_total) / sum(map(max, of_reads, of_computing))
        for of_total, of_reads, of_computing in zip(total, reads, computing, strict=True)
    ]


# --- against accelerate ---


def find_best(trials: Iterator[tuple[Request, Path]], memory: float, gen_len: int) -> Request:
    """The fastest that fits into memory, by short runs. Ends when nothing fits."""
    best: tuple[float, Request] | None = None
    for request, python in trials:
        result = work(replace(request, gen_len=_TRIAL_TOKENS), python)
        if result is None:
            continue
        rate, peak = result.tokens_per_s(gen_len), result.peak_bytes / _GIB
        fits = result.peak_bytes <= memory
        tell(f"{request.label}: {rate:.2f} tokens/s, {peak:.2f} GiB{'' if fits else ', too much'}")
        if fits and (best is None or rate > best[0]):
            best = rate, request
        if not fits and request.gpu_batch_size == request.num_prompts:
            break  # larger batches do not fit, either
    if best is None:
        sys.exit("nothing fits into that memory: choose a larger --memory")
    return best[1]


def measure_throughput(
    base: Request, config: OptConfig, python: Path, args: argparse.Namespace
) -> None:
    """Print both systems' tokens/s, each at its best batch size."""
    memory = args.memory * _GIB if args.memory else config.model_bytes() / 2
    accelerate = replace(
        base, system="accelerate", offload_dir=f"{base.folder}-accelerate", percent=()
    )
    own = Path(sys.executable)
    programs = {
        "accelerate": (accelerate, python, [(size, size) for size in _ACCELERATE]),
        "flexbench": (replace(base, percent=_ALL_ON_DISK), own, list(_FLEXBENCH)),
    }
    chosen = []
    for name, (request, interpreter, sizes) in programs.items():
        allowed = [pair for pair in sizes if pair[0] <= args.max_prompts]
        trials = (
            (replace(request, num_prompts=prompts, gpu_batch_size=batch), interpreter)
            for prompts, batch in allowed
        )
        tell(f"{name}: trials")
        chosen.append((find_best(trials, memory, base.gen_len), interpreter))
    rounds = []
    for number in range(args.repeats):
        results = [work(*one) for one in (chosen if number % 2 else chosen[::-1])]
        done = {result.request.system: result for result in results if result is not None}
        if len(done) == len(chosen):
            rounds.append(done)
    if not rounds:
        sys.exit("no round was complete")
    print(f"\nWithin {memory / _GIB:.2f} GiB: {base.prompt_len} + {base.gen_len} tokens, medians")
    print(f"{'':32}{'s':>8}{'tokens/s':>10}{'GiB':>7}{'GB from disk':>14}  weights' GB x passes")
    for name in programs:
        of_name = [done[name] for done in rounds]
        request = of_name[0].request
        seconds = statistics.median(result.seconds("total")[0] for result in of_name)
        disk = statistics.median(result.lines[0]["read_bytes"] for result in of_name) / 1e9
        peak = max(result.peak_bytes for result in of_name) / _GIB
        rate = request.num_prompts * request.gen_len / seconds
        weights = config.model_bytes() * request.gen_len / 1e9
        print(f"{request.label:32}{seconds:8.1f}{rate:10.2f}{peak:7.2f}{disk:14.1f}  {weights:.1f}")
    ratio = statistics.median(
        rate_of(done["flexbench"]) / rate_of(done["accelerate"]) for done in rounds
    )
    print(f"flexbench / accelerate: {ratio:.2f} (goal: at least {THROUGHPUT_GOAL:g})")


def rate_of(result: Result) -> float:
    """Tokens/s of a whole run."""
    return result.request.num_prompts * result.request.gen_len / result.seconds("total")[0]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--parts", nargs="+", choices=("overlap", "accelerate"), default=["overlap", "accelerate"]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[4, 16, 64], help="of overlap"
    )
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--memory", type=float, help="GiB; default: half of the weights")
    parser.add_argument("--max-prompts", type=int, default=512, help="at most so many are tried")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    parser.add_argument("--environments", type=Path, default=DEFAULT_ENVIRONMENTS)
    return parser


def main() -> None:
    """Measure, and print."""
    args = make_parser().parse_args()
    environments = args.environments.expanduser().absolute()
    python = find_python(SYSTEMS[TRANSFORMERS], environments, sys.executable)
    folder, config = model_folder(args.model, args.dtype, environments / "models", python)
    base = Request(
        system="flexbench",
        folder=str(folder.path),
        dtype=args.dtype,
        # On the same disk as accelerate's files.
        offload_dir=str(folder.path.parent),
        num_threads=args.threads,
        num_prompts=1,
        gpu_batch_size=1,
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        repeats=1,
    )
    print(f"{args.model}, {args.dtype}, {args.threads} threads, weights on disk")
    if "overlap" in args.parts:
        measure_overlap(replace(base, repeats=args.repeats), args.batch_sizes)
    if "accelerate" in args.parts:
        measure_throughput(base, config, python, args)


if __name__ == "__main__":
    main()
