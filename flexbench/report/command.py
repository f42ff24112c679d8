"""`flexbench report`: the command line of the reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import typer

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.report.tables import Format, Record

app = typer.Typer(add_completion=False)


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...",
            help="Results files, with or without a header, or server_config.jsonl.",
        ),
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
    Runs with the same configuration are one line of the report. Of the .jsonl files of flexbench
    server-config it shows what was predicted beside what was measured.
    """
    are_predictions = [path.suffix == ".jsonl" for path in files]
    if any(are_predictions) and not all(are_predictions):
        raise ConfigError("FILES", "tables of runs and .jsonl records cannot be in one report")
    if any(are_predictions):
        records, headings = _predictions(files, skip_invalid=skip_invalid)
    else:
        records, headings = _runs(files, skip_invalid=skip_invalid)
    if not records:
        missing = "no launched server is recorded" if any(are_predictions) else "no runs"
        raise InputFileError(", ".join(map(str, files)), f"{missing} in there")
    _print(records, headings, output_format)


def _runs(
    files: Sequence[Path], *, skip_invalid: bool
) -> tuple[Sequence[Record], Mapping[str, str]]:
    from flexbench.core.results import read_rows
    from flexbench.report.aggregate import group_by_configuration
    from flexbench.report.tables import RUN_HEADINGS, run_records

    rows = _Entries(files, read_rows, skip_invalid=skip_invalid)
    groups = group_by_configuration(rows)
    rows.tell_skipped()
    return run_records(groups), RUN_HEADINGS


def _predictions(
    files: Sequence[Path], *, skip_invalid: bool
) -> tuple[Sequence[Record], Mapping[str, str]]:
    from flexbench.report.predictions import group_predictions, read_predictions
    from flexbench.report.tables import PREDICTION_HEADINGS, prediction_records

    predictions = _Entries(files, read_predictions, skip_invalid=skip_invalid)
    groups = group_predictions(list(predictions))
    predictions.tell_skipped()
    return prediction_records(groups), PREDICTION_HEADINGS


def _print(records: Sequence[Record], headings: Mapping[str, str], output_format: Format) -> None:
    from flexbench.report.tables import TEXT_FORMATS, to_table

    if output_format is Format.TABLE:
        from rich.console import Console

        Console().print(to_table(records, headings))
    else:
        typer.echo(TEXT_FORMATS[output_format](records, headings))


Entry = TypeVar("Entry")


class _Entries(Generic[Entry]):
    """What is in several files; malformed lines are raised, or counted when they are skipped."""

    def __init__(
        self,
        files: Sequence[Path],
        read: Callable[[Path], Iterator[Entry | InputFileError]],
        *,
        skip_invalid: bool,
    ) -> None:
        self._files = files
        self._read = read
        self._skip_invalid = skip_invalid
        self._num_skipped = 0

    def __iter__(self) -> Iterator[Entry]:
        for path in self._files:
            for entry in self._read(path):
                if not isinstance(entry, InputFileError):
                    yield entry
                elif self._skip_invalid:
                    self._num_skipped += 1
                else:
                    raise entry

    def tell_skipped(self) -> None:
        """Say on standard error how many lines were skipped, if any."""
        if self._num_skipped:
            lines = "line" if self._num_skipped == 1 else "lines"
            typer.echo(f"Skipped {self._num_skipped} malformed {lines}.", err=True)
