"""How well `flexbench dist --policy auto` predicts and chooses, against a grid search.

    python benchmarks/dist_policy.py [--model facebook/opt-125m] [--cpu-memory 0.85] [--rounds 3]

Memory is limited so that not everything fits, and something has to be on disk. The search chooses a
policy; it and every policy of a grid of placements and batch sizes are run, one after the other in
every round. Disks and shared machines change within minutes, so each round measures the search's
constants anew, and what it runs is compared with what these predict. Medians are printed: measured
with predicted throughput, and the chosen policy's with the best of the grid. Policies that do not
fit into the limit are left out. Goals: predictions within 15 %, the choice within 10 % of the best.
Beside each figure stand what the disk and a matrix product gave right before it, and in the first
row right after the search: where these differ, no prediction can hold.
Nothing but `flexbench[dist]` is needed, and about a minute a round.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from flexbench.core.progress import Progress, show_progress
from flexbench.dist.benchmark import run_benchmark
from flexbench.dist.config import DistConfig
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.plan import DistPlan, make_plan
from flexbench.dist.policy_search.constants import Constants
from flexbench.dist.policy_search.memory import find_limits, with_policy
from flexbench.dist.policy_search.prediction import predict
from flexbench.dist.policy_search.request import PolicyRequest
from flexbench.dist.policy_search.together import search_policy
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.measuring import measure_ceilings
from flexbench.ranks.launch import Launch, detect_launch

# Weights, cache and activations, on gpu and cpu each; the rest is on disk.
PLACEMENTS = {
    "all in memory": (100, 0, 100, 0, 100, 0),
    "half the weights on disk": (50, 0, 100, 0, 100, 0),
    "weights on disk": (0, 0, 100, 0, 100, 0),
    "cache on disk": (100, 0, 0, 0, 100, 0),
    "half of both on disk": (50, 0, 50, 0, 100, 0),
}
BATCHES = ((4, 1), (12, 1), (12, 2))
CEILINGS = ("disk GB/s", "GFLOP/s")
PREDICTION_GOAL, CHOICE_GOAL = 0.15, 0.10


def main() -> None:
    """Search, run, compare."""
    options = read_options()
    launch = detect_launch({})
    rounds: list[dict[str, Run]] = []
    searched: list[Ceilings] = []
    with TemporaryDirectory() as folder, show_progress(Console(stderr=True), quiet=False) as bar:
        config = DistConfig(
            model=options.model,
            dtype=options.dtype,
            prompt_len=options.prompt_len,
            gen_len=options.gen_len,
            output=Path(folder) / "dist.tsv",
            no_log=True,
        )
        plan = make_plan(config, num_stages=1, has_gpu=False)
        request = PolicyRequest(cpu_memory=options.cpu_memory, max_batch=options.max_batch)
        plans = fitting_grid(plan, request)
        for turn in range(options.rounds):
            bar.note(f"Round {turn + 1} of {options.rounds}")
            found = search_policy(plan, request, launch, head_ip=None, port=None, progress=bar)
            plans = {"chosen": found} | plans  # the first round's choice stays
            assert found.search is not None
            searched.append(ceilings_now(Path(folder), plan.model.dtype))
            rounds.append(run_all(plans, found.search.constants, launch, bar))
    show(plans, rounds, searched)


def read_options() -> argparse.Namespace:
    """The case, and how often it is run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="facebook/opt-125m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--gen-len", type=int, default=8)
    parser.add_argument("--cpu-memory", type=float, default=0.85, help="GiB")
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def fitting_grid(plan: DistPlan, request: PolicyRequest) -> dict[str, DistPlan]:
    """The grid's plans that fit into the limit, by name."""
    limits = find_limits(plan, request)
    grid = {
        f"{name}, {size} x {count}": with_policy(plan, percent, size, count)
        for (name, percent), (size, count) in itertools.product(PLACEMENTS.items(), BATCHES)
    }
    return {
        name: candidate
        for name, candidate in grid.items()
        if not limits.excess([stage.total for stage in candidate.stages])
    }


@dataclass(frozen=True)
class Run:
    """One policy in one round: tokens/s."""

    predicted: float
    measured: float
    before: Ceilings
    """Of the machine, right before it."""

    @property
    def ratio(self) -> float:
        """Measured by predicted."""
        return self.measured / self.predicted


def run_all(
    plans: dict[str, DistPlan], constants: Constants, launch: Launch, bar: Progress
) -> dict[str, Run]:
    """Every plan once, with what `constants` predict."""
    runs = {}
    for name, plan in plans.items():
        bar.note(name)
        before = ceilings_now(plan.config.output.parent, plan.model.dtype)
        outcome = run_benchmark(replace(plan, search=None), launch, progress=bar)
        assert outcome is not None
        measured = outcome.measurement.figures()["total_throughput"]
        runs[name] = Run(predict(plan, constants).throughput, measured, before)
    return runs


def ceilings_now(folder: Path, dtype: str) -> Ceilings:
    """Of this machine's CPU and of the disk that `folder` is on."""
    with TemporaryDirectory(dir=folder) as offload:
        env = ExecutionEnv.create(offload)
        try:
            return measure_ceilings(env, getattr(torch, dtype), with_disk=True)
        finally:
            env.disk.close()


def show(
    plans: dict[str, DistPlan], rounds: list[dict[str, Run]], searched: list[Ceilings]
) -> None:
    """The table, and whether the goals are met."""
    measured = {name: median(turn[name].measured for turn in rounds) for name in plans}
    ratios = {name: median(turn[name].ratio for turn in rounds) for name in plans}
    table = Table("policy", "batches", "percent", "predicted", "measured", "ratio", *CEILINGS)
    table.add_row("(search)", *[""] * 5, *cells_of(searched))
    for name, plan in sorted(plans.items(), key=lambda item: -measured[item[0]]):
        config = plan.config
        table.add_row(
            name.partition(", ")[0],
            f"{config.gpu_batch_size} x {config.num_gpu_batches}",
            " ".join(f"{share:g}" for share in config.percent),
            f"{median(turn[name].predicted for turn in rounds):.1f}",
            f"{measured[name]:.1f}",
            f"{ratios[name]:.2f}",
            *cells_of([turn[name].before for turn in rounds]),
        )
    off = {name: abs(ratio - 1) for name, ratio in ratios.items()}
    of_best = median(
        turn["chosen"].measured
        / max(run.measured for name, run in turn.items() if name != "chosen")
        for turn in rounds
    )
    console = Console(width=110)
    console.print(table)
    console.print(
        f"Measured / predicted: {ratios['chosen']:.2f} of the chosen policy, goal within "
        f"{PREDICTION_GOAL:.0%}; of all, {median(off.values()):.0%} off in the median and "
        f"{max(off.values()):.0%} at most"
    )
    console.print(
        f"Chosen policy / best of the grid: {of_best:.2f}, goal at least {1 - CHOICE_GOAL:.2f}"
    )


def cells_of(ceilings: list[Ceilings]) -> tuple[str, str]:
    """Medians, as CEILINGS names them."""
    read = median(each.disk_read_bytes_per_s or 0.0 for each in ceilings)
    multiplied = median(each.matmul_flops_per_s for each in ceilings)
    return f"{read / 1e9:.2f}", f"{multiplied / 1e9:.0f}"


if __name__ == "__main__":
    main()
