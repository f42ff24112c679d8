"""The options of `flexbench report`, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexbench.report.config import Format

_SELECT = "What is shown"
_COMPARE = "Comparison"
_OUTPUT = "Output"

Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATHS...",
        help="Results: files (.tsv, .jsonl, .json), or folders with them.",
        show_default=False,
    ),
]
GroupBy = Annotated[
    list[str] | None,
    typer.Option(
        "--group-by",
        metavar="A,B",
        help="Average runs that have these columns in common, not their whole configuration.",
        rich_help_panel=_SELECT,
        show_default=False,
    ),
]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="'A>=4'",
        help="Only runs of which this holds: =, !=, <, <=, >, >=. Repeatable.",
        rich_help_panel=_SELECT,
        show_default=False,
    ),
]
Sort = Annotated[
    list[str] | None,
    typer.Option(
        "--sort",
        metavar="A,-B",
        help="Order of rows: columns or figures, with - the largest first.",
        rich_help_panel=_SELECT,
        show_default=False,
    ),
]
Figures = Annotated[
    list[str] | None,
    typer.Option(
        "--figure",
        metavar="NAME",
        help="A figure to show, such as ttft_p99. Repeatable. Default: each system's main ones.",
        rich_help_panel=_SELECT,
        show_default=False,
    ),
]
Stats = Annotated[
    list[str] | None,
    typer.Option(
        "--stat",
        metavar="NAME",
        help="Of each figure: mean, median, std, min, max, ci, p95 or another percentile. "
        "Repeatable.",
        rich_help_panel=_SELECT,
        show_default=False,
    ),
]
AllowMixed = Annotated[
    bool,
    typer.Option(
        "--allow-mixed",
        help="Go on, with a mark, where runs of different models, types, machines would mix.",
        rich_help_panel=_SELECT,
    ),
]
Baseline = Annotated[
    list[Path] | None,
    typer.Option(
        "--baseline",
        metavar="OLD",
        help="Compare with the results in this file or folder. Repeatable.",
        rich_help_panel=_COMPARE,
        show_default=False,
    ),
]
MaxRegression = Annotated[
    str,
    typer.Option(
        "--max-regression",
        metavar="SHARE",
        help="A change for the worse that is accepted. Beyond it and the noise: exit code 3.",
        rich_help_panel=_COMPARE,
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="Show what FlexGen's authors published beside runs of petals and dist.",
        rich_help_panel=_COMPARE,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the bootstrap.", rich_help_panel=_COMPARE)]
OutputFormat = Annotated[
    Format, typer.Option("--format", help="How the report is written.", rich_help_panel=_OUTPUT)
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where it is written. Default: standard output.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
Plots = Annotated[
    list[str] | None,
    typer.Option(
        "--plot",
        metavar="KIND",
        help="Draw in the terminal: throughput-latency, throughput-clients, latency-distribution, "
        "timeline, predicted-measured, or all. Repeatable.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
SavePlots = Annotated[
    Path | None,
    typer.Option(
        "--save-plots",
        metavar="FOLDER",
        help="Write plots as PNG and SVG files: those of --plot, or all.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
SkipInvalid = Annotated[
    bool,
    typer.Option(
        "--skip-invalid",
        help="Count malformed lines and go on, instead of stopping.",
        rich_help_panel=_OUTPUT,
    ),
]
