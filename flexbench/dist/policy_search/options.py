"""The options of a policy search, one alias each. Imports nothing that takes time."""

from __future__ import annotations

from typing import Annotated

import typer

_POLICY = "Policy"

AUTO, GIVEN = "auto", "given"
POLICIES = (GIVEN, AUTO)
PLAN = "plan"

Action = Annotated[
    str | None,
    typer.Argument(
        metavar=f"[{PLAN}]",
        autocompletion=lambda: [PLAN],
        help="Only show the policy that --policy auto would choose, and what to expect of it.",
        show_default=False,
    ),
]

PolicyChoice = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="|".join(POLICIES),
        autocompletion=lambda: list(POLICIES),
        help="auto: measure some layers, and choose what of --percent, --gpu-batch-size and "
        "--num-gpu-batches is not given for the highest throughput. given: by the options.",
        rich_help_panel=_POLICY,
    ),
]

MaxBatch = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER",
        help="With --policy auto: prompts of a run at most. Default: 256.",
        rich_help_panel=_POLICY,
    ),
]

GpuMemory = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="With --policy auto: plan with so much of each GPU. Default: 0.9 of what is free.",
        rich_help_panel=_POLICY,
    ),
]

CpuMemory = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="With --policy auto: plan with so much of this host's memory. Default: 0.9 of what "
        "is free. Without CUDA, 'gpu' and 'cpu' share it.",
        rich_help_panel=_POLICY,
    ),
]
