"""`flexbench report`: the command line of the reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexbench.core.errors import InputFileError
from flexbench.report.tables import Format

if TYPE_CHECKING:
    from flexbench.core.results import ResultRow


app = typer.Typer(add_completion=False)


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES...", help="Results files, with or without a header."),
    ],
    output_format: Annotated[
        Format, typer.Option("--format", help="How to print the report.")
    ] = Format.TABLE,
    skip_invalid: Annotated[
        bool,
        typer.Option(
            "--skip-invalid", help="Count malformed lines and go on, instead of stopping."
        ),
    ] = False,
) -> None:
    """Summarize results: every configuration's mean, smallest and largest figures.

    Reads the tab-separated files that the benchmarks write, and those of the original scripts.
    Runs with the same configuration are one line of the report.
    """
    from flexbench.report.aggregate import group_by_configuration
    from flexbench.report.tables import TEXT_FORMATS, to_table

    rows = _Rows(files, skip_invalid=skip_invalid)
    groups = group_by_configuration(rows)
    if rows.num_skipped:
        lines = "line" if rows.num_skipped == 1 else "lines"
        typer.echo(f"Skipped {rows.num_skipped} malformed {lines}.", err=True)
    if not groups:
        raise InputFileError(", ".join(map(str, files)), "no runs in there")
    if output_format is Format.TABLE:
        from rich.console import Console

        Console().print(to_table(groups))
    else:
        typer.echo(TEXT_FORMATS[output_format](groups))


class _Rows:
    """The rows of several files; malformed ones are raised, or counted when they are skipped."""

    def __init__(self, files: Sequence[Path], *, skip_invalid: bool) -> None:
        self._files = files
        self._skip_invalid = skip_invalid
        self.num_skipped = 0

    def __iter__(self) -> Iterator[ResultRow]:
        from flexbench.core.results import read_rows

        for path in self._files:
            for row in read_rows(path):
                if not isinstance(row, InputFileError):
                    yield row
                elif self._skip_invalid:
                    self.num_skipped += 1
                else:
                    raise row
