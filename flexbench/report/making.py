"""A report from its beginning to its end: read, summarize, compare, draw."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.core.progress import Progress
from flexbench.report.charts.chart import Chart, PlotKind
from flexbench.report.charts.making import make_charts
from flexbench.report.comparison import Comparison, compare
from flexbench.report.config import ALL_PLOTS, Format, ReportConfig
from flexbench.report.interruption import stoppable
from flexbench.report.prediction_table import prediction_table
from flexbench.report.predictions import SERVER_COLUMNS, Prediction
from flexbench.report.reading import Reading, read_all
from flexbench.report.reading.copies import drop_files_of
from flexbench.report.reading.files import find_files
from flexbench.report.selection import Selection, where
from flexbench.report.sentences import summary_of
from flexbench.report.store import RunStore
from flexbench.report.summary import summarize
from flexbench.report.systems import compare_systems
from flexbench.report.table import Table

if TYPE_CHECKING:
    from flexbench.report.page.details import RunDetails


_SERVERS = "server-config"
_TITLE = ("system", "model", "started_at")


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report says, in no format yet."""

    subject: str
    """What was read."""
    summary: tuple[str, ...]
    """The answer in sentences."""
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    runs: tuple[RunDetails, ...]
    """Of a page: everything that is known of the first runs of each row."""
    num_runs: int
    comparison: Comparison | None
    notes: tuple[str, ...]
    """What is in no figure, and why."""


def make_report(config: ReportConfig, selection: Selection, progress: Progress) -> Report:
    """Read everything and answer. Input is never changed.

    Raises InputFileError for what cannot be read, or has nothing to report, and ConfigError for a
    selection that cannot be made, or would mix runs that cannot be compared.
    """
    _check_output(config)
    with stoppable(), RunStore() as store:
        reading = _select(store, _read(config.paths, store, config, progress), selection)
        comparison = _compare(config, selection, store, progress)
        tables = _tables(config, selection, store, reading, comparison)
        if not any(table.rows for table in tables):
            raise InputFileError(_names(config.paths), "no runs in there that are selected")
        is_page = config.output_format is Format.HTML
        return Report(
            subject=_subject(config),
            summary=tuple(summary_of(store, reading, tables)),
            tables=tuple(tables),
            charts=tuple(_charts(config, store, reading)),
            runs=tuple(_details(store, tables)) if is_page else (),
            num_runs=len(store),
            comparison=comparison,
            notes=tuple(_notes(reading)),
        )


def _check_output(config: ReportConfig) -> None:
    """Reports never change what they read, baseline included."""
    if config.output is None or not config.output.exists():
        return
    files, _ = find_files((*config.paths, *config.baseline))
    if any(os.path.samefile(config.output, file.path) for file in files):
        raise ConfigError("--output", f"{config.output} is one of the files to read")


def _subject(config: ReportConfig) -> str:
    """What the report is about."""
    if not config.baseline:
        return f"Results in {_names(config.paths)}"
    return f"Results in {_names(config.paths)}, compared with {_names(config.baseline)}"


def _read(
    paths: Sequence[Path], store: RunStore, config: ReportConfig, progress: Progress
) -> Reading:
    with progress.phase("Reading results", total=1) as phase:
        reading = read_all(
            paths,
            store,
            skip_invalid=config.skip_invalid,
            tell=lambda what, done, total: phase.show(what, done / max(total, 1)),
        )
        phase.advance()
    if reading.num_skipped:
        progress.note("\n  ".join((f"{_skipped(reading)}:", *reading.first_skipped)))
    if not len(store) and not reading.predictions:
        raise InputFileError(_names(paths), "no runs in there")
    return reading


def _select(store: RunStore, reading: Reading, selection: Selection) -> Reading:
    """Leave in the store, and of the predictions, only what the filters let through."""
    condition, parameters = where(store, selection.filters)
    store.connection.execute(
        f"DELETE FROM runs WHERE NOT coalesce({condition}, FALSE)",  # noqa: S608 - no values in it
        parameters,
    )
    if not selection.filters:
        return reading
    predictions = [one for one in reading.predictions if _is_selected(one, selection)]
    return replace(reading, predictions=predictions)


def _is_selected(prediction: Prediction, selection: Selection) -> bool:
    """Predictions have no other columns; of one they do not have, nothing holds."""
    known = {name: getattr(prediction, name) for name in ("model", "figure", *SERVER_COLUMNS)}
    known = {name: None if value is None else str(value) for name, value in known.items()}
    known["system"] = _SERVERS
    return all(one.holds_for_text(known.get(one.column)) for one in selection.filters)


def _compare(
    config: ReportConfig, selection: Selection, store: RunStore, progress: Progress
) -> Comparison | None:
    if not config.baseline:
        return None
    with RunStore() as old:
        _read(config.baseline, old, config, progress)
        if dropped := drop_files_of(store, old):
            runs = "1 run" if dropped == 1 else f"{dropped:,} runs"
            progress.note(f"Left out of the new runs: {runs} in files of the baseline.")
        return compare(old, store, selection, max_regression=config.max_regression)


def _tables(
    config: ReportConfig,
    selection: Selection,
    store: RunStore,
    reading: Reading,
    comparison: Comparison | None,
) -> list[Table]:
    """All tables; of a comparison only its own, unless they are for a page."""
    if comparison is not None:
        if config.output_format is not Format.HTML:
            return [comparison.table]
        # Of a comparison the order is asked for; the columns of other tables are others.
        selection = replace(selection, sort=())
    tables = [] if comparison is None else [comparison.table]
    tables += summarize(store, selection)
    systems = compare_systems(store, selection, with_published=config.published)
    if systems is not None:
        tables.append(systems)
    if reading.predictions:
        tables.append(prediction_table(reading.predictions))
    return tables


def _charts(config: ReportConfig, store: RunStore, reading: Reading) -> list[Chart]:
    """Those asked for; a page has all."""
    is_all = ALL_PLOTS in config.plots or (config.save_plots is not None and not config.plots)
    if is_all or config.output_format is Format.HTML:
        kinds = set(PlotKind)
    else:
        kinds = {PlotKind(name) for name in config.plots}
    if not kinds:
        return []
    return make_charts(store, reading.predictions, reading.curves, kinds)


def _skipped(reading: Reading) -> str:
    what = "line or record" if reading.num_skipped == 1 else "lines and records"
    first = len(reading.first_skipped)
    only = f" (the first {first} follow)" if reading.num_skipped > first else ""
    return f"Skipped {reading.num_skipped:,} malformed {what}{only}"


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _notes(reading: Reading) -> Iterator[str]:
    for count, what in (
        (reading.num_failed, "that failed"),
        (reading.num_interrupted, "that were interrupted"),
    ):
        if count:
            yield f"Records of runs {what}, which are in no figure: {count:,}."
    if reading.num_unfinished:
        first = "; ".join(reading.first_unfinished)
        yield f"Lines that are not finished, as of a run that is just ending: {first}"
    if reading.num_copies:
        yield f"Rows that are copies of rows in other files, counted once: {reading.num_copies:,}."
    if reading.num_skipped:
        yield f"{_skipped(reading)}: {'; '.join(reading.first_skipped)}"


def _details(store: RunStore, tables: Sequence[Table]) -> Iterator[RunDetails]:
    from flexbench.report.page.details import MOST_RUNS, RunDetails

    ids = dict.fromkeys(one for table in tables for row in table.rows for one in row.run_ids)
    for number in list(ids)[:MOST_RUNS]:
        (row,) = store.rows("SELECT * FROM runs WHERE id = ?", [number])
        known = {
            name: value
            for name, value in row.items()
            if value is not None and name not in ("id", "details", "setup", "figures")
        }
        details = json.loads(row["details"] or "{}") or known
        where = row["source"] if row["line"] is None else f"{row['source']}:{row['line']}"
        yield RunDetails(
            id=number,
            title=" ".join(str(row[name]) for name in _TITLE if row[name]),
            source=where,
            details=details,
        )
