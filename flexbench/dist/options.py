"""The options of `flexbench dist`, one alias each; the command's signature has their defaults.

Names and meanings are those of FlexGen's flex_opt and dist_flex_opt; what is new says so by being
in none of the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexbench.dist import config as defaults
from flexbench.dist.partition import Balance
from flexbench.models.shapes import OPT_SHAPES

_MODEL = "Model"
_LOAD = "Load"
_POLICY = "Policy"
_PIPELINE = "Pipeline"
_RESULTS = "Results"

Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        autocompletion=lambda: list(OPT_SHAPES),
        help="facebook/opt-125m to opt-175b, or a folder with an OPT model in Hugging Face's "
        "format.",
        rich_help_panel=_MODEL,
    ),
]

WeightsPath = Annotated[
    str | None,
    typer.Option(
        "--path",
        metavar="PATH",
        help="The weights: a Hugging Face folder, a name on its hub, or _DUMMY_ for random ones. "
        "Default: MODEL if that is a folder, else _DUMMY_.",
        rich_help_panel=_MODEL,
    ),
]

OffloadDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where 'disk' is. Files in there have no names, and vanish with the process. "
        "Default: /var/tmp.",
        rich_help_panel=_MODEL,
    ),
]

Dtype = Annotated[
    str,
    typer.Option(
        metavar="|".join(defaults.DTYPES),
        autocompletion=lambda: list(defaults.DTYPES),
        help="Type of weights, cache and activations. auto: float16 on a GPU, float32 on a CPU.",
        rich_help_panel=_MODEL,
    ),
]

PromptLen = Annotated[int, typer.Option(help="Tokens of a prompt.", rich_help_panel=_LOAD)]

GenLen = Annotated[int, typer.Option(help="New tokens of a prompt.", rich_help_panel=_LOAD)]

CutGenLen = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER",
        help="Generate only that many, and project the rest.",
        rich_help_panel=_LOAD,
    ),
]

DebugMode = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(defaults.DebugMode),
        autocompletion=lambda: list(defaults.DebugMode),
        help="Do a part of the layers and two tokens, and project the rest. breakdown: without "
        "overlap, so that every load, store and computation is timed by itself.",
        rich_help_panel=_LOAD,
    ),
]

GpuBatchSize = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER", help="Prompts computed at once. Default: 4.", rich_help_panel=_LOAD
    ),
]

NumGpuBatches = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER",
        help="Batches that pass through a layer while its weights are loaded. Default: 1.",
        rich_help_panel=_LOAD,
    ),
]

DoSample = Annotated[
    bool,
    typer.Option(
        "--do-sample", help="Draw tokens at random, not the likeliest.", rich_help_panel=_LOAD
    ),
]

Temperature = Annotated[
    float,
    typer.Option(help="Of sampling: below 1 favours likely tokens.", rich_help_panel=_LOAD),
]

Stop = Annotated[
    int | None,
    typer.Option(
        metavar="TOKEN", help="Token id that ends a prompt's generation.", rich_help_panel=_LOAD
    ),
]

Seed = Annotated[
    int,
    typer.Option(help="Of the prompts, dummy weights and sampling.", rich_help_panel=_LOAD),
]

PercentShares = Annotated[
    list[float] | None,
    typer.Option(
        "--percent",
        metavar="NUMBER...",
        help="Six shares in percent: weights on gpu and cpu, cache on gpu and cpu, activations on "
        "gpu and cpu; the rest is on disk. Default: 100 0 100 0 100 0.",
        rich_help_panel=_POLICY,
    ),
]

SepLayer = Annotated[
    bool,
    typer.Option(
        "--sep-layer/--no-sep-layer",
        help="Load attention and MLP as layers of their own.",
        rich_help_panel=_POLICY,
    ),
]

PinWeight = Annotated[
    bool,
    typer.Option(
        "--pin-weight/--no-pin-weight",
        help="Page-lock weights in host memory, for CUDA.",
        rich_help_panel=_POLICY,
    ),
]

CpuCacheCompute = Annotated[
    bool,
    typer.Option(
        "--cpu-cache-compute",
        help="Compute attention over the cache outside of the GPU on the CPU.",
        rich_help_panel=_POLICY,
    ),
]

AttnSparsity = Annotated[
    float,
    typer.Option(
        help="Share of past values that enter attention: those with most weight.",
        rich_help_panel=_POLICY,
    ),
]

CompressWeight = Annotated[
    bool,
    typer.Option(
        "--compress-weight", help="Keep weights in 4 bits, group-wise.", rich_help_panel=_POLICY
    ),
]

CompressCache = Annotated[
    bool,
    typer.Option(
        "--compress-cache", help="Keep the cache in 4 bits, group-wise.", rich_help_panel=_POLICY
    ),
]

Overlap = Annotated[
    bool,
    typer.Option(
        "--overlap/--no-overlap", help="Load and store while computing.", rich_help_panel=_POLICY
    ),
]

AllowOvercommit = Annotated[
    bool,
    typer.Option(
        "--allow-overcommit",
        help="Start even if the placement does not fit into free memory or disk space.",
        rich_help_panel=_POLICY,
    ),
]

HeadIp = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Address of rank 0's host, at which it listens. Only needed for several hosts.",
        rich_help_panel=_PIPELINE,
    ),
]

Port = Annotated[
    int | None,
    typer.Option(
        metavar="PORT", help="Port at that address. Default: a free one.", rich_help_panel=_PIPELINE
    ),
]

UseMpi = Annotated[
    bool,
    typer.Option(
        "--use-mpi",
        help="Insist on having been started by mpirun or srun. They are recognized anyway.",
        rich_help_panel=_PIPELINE,
    ),
]

Rank = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER",
        help="This process's number, where no launcher says it.",
        rich_help_panel=_PIPELINE,
    ),
]

LocalRank = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER",
        help="Its number on this host, which chooses its GPU.",
        rich_help_panel=_PIPELINE,
    ),
]

WorldSize = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER",
        help="Number of processes, where no launcher says it.",
        rich_help_panel=_PIPELINE,
    ),
]

CommDevice = Annotated[
    str,
    typer.Option(
        metavar="|".join(defaults.COMM_DEVICES),
        autocompletion=lambda: list(defaults.COMM_DEVICES),
        help="Where messages are sent from. gpu: over NCCL with CUDA, else over gloo like cpu.",
        rich_help_panel=_PIPELINE,
    ),
]

NumInnerIterations = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER",
        help="Blocks of prompts under way at once. Default: one a process.",
        rich_help_panel=_PIPELINE,
    ),
]

AsyncComm = Annotated[
    bool,
    typer.Option(
        "--async-comm", help="Send and receive while computing.", rich_help_panel=_PIPELINE
    ),
]

BalanceBy = Annotated[
    str,
    typer.Option(
        "--balance",
        metavar="|".join(Balance),
        autocompletion=lambda: list(Balance),
        help="What stages get equal shares of.",
        rich_help_panel=_PIPELINE,
    ),
]

CommTimeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="To wait for ranks at the start, and for a sign of life of each from then on.",
        rich_help_panel=_PIPELINE,
    ),
]

Output = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="Results, one tab-separated row a run, appended; a .jsonl file beside it gets "
        "every detail.",
        rich_help_panel=_RESULTS,
    ),
]

LogFile = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Log in FlexGen's form. auto: beside the results, named after the options.",
        rich_help_panel=_RESULTS,
    ),
]

NoLog = Annotated[
    bool, typer.Option("--no-log", help="Write no such log.", rich_help_panel=_RESULTS)
]

Verbose = Annotated[
    int,
    typer.Option(
        metavar="0|1|2",
        help="0: the results only. 1: placement, stages and memory, too. 2: and tokens.",
        rich_help_panel=_RESULTS,
    ),
]

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show nothing but errors.", rich_help_panel=_RESULTS)
]

Roofline = Annotated[
    bool,
    typer.Option(
        "--roofline",
        help="Measure memory, matrix products, copies and disk for some seconds before and after "
        "the run, and show how close it came to them.",
        rich_help_panel=_RESULTS,
    ),
]

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show what would be placed where, and stop.", rich_help_panel=_RESULTS
    ),
]
