"""`flexbench report`: the command line of the reports."""

from __future__ import annotations

import typer

from flexbench.core.errors import RegressionFoundError
from flexbench.core.options import QuickCommand
from flexbench.report import options
from flexbench.report.config import DEFAULT_MAX_REGRESSION, Format, ReportConfig, parse_share

app = typer.Typer(add_completion=False)


@app.command(cls=QuickCommand)
def report(
    paths: options.Paths,
    group_by: options.GroupBy = None,
    filters: options.Filters = None,
    sort: options.Sort = None,
    figures: options.Figures = None,
    stats: options.Stats = None,
    allow_mixed: options.AllowMixed = False,
    baseline: options.Baseline = None,
    max_regression: options.MaxRegression = DEFAULT_MAX_REGRESSION,
    published: options.Published = False,
    seed: options.Seed = 0,
    output_format: options.OutputFormat = Format.TABLE,
    output: options.Output = None,
    plots: options.Plots = None,
    save_plots: options.SavePlots = None,
    skip_invalid: options.SkipInvalid = False,
) -> None:
    """Summarize, compare and draw results: tables, plots, one HTML page, a verdict.

    Runs with the same configuration are one row: mean, spread, and an interval over repeats.
    Records beside the tables (.jsonl) tell the model, the machine and the rest of it.

    Exit codes: 2 for wrong input, 3 when a figure is worse than the baseline's.
    """
    config = ReportConfig(
        paths=tuple(paths),
        output_format=output_format,
        output=output,
        baseline=tuple(baseline or ()),
        max_regression=parse_share("--max-regression", max_regression),
        published=published,
        plots=tuple(plots or ()),
        save_plots=save_plots,
        skip_invalid=skip_invalid,
    )
    from flexbench.report.making import make_report
    from flexbench.report.selection import make_selection
    from flexbench.report.writing import open_progress, write

    selection = make_selection(
        group_by=group_by or (),
        filters=filters or (),
        sort=sort or (),
        figures=figures or (),
        stats=stats or (),
        allow_mixed=allow_mixed,
        seed=seed,
    )
    with open_progress() as progress:
        made = make_report(config, selection, progress)
    write(made, config)
    if made.comparison is not None and made.comparison.has_regression:
        found = RegressionFoundError(made.comparison.verdict)
        found.is_shown = output_format is Format.TABLE and output is None  # below the table
        raise found
