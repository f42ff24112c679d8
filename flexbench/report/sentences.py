"""The answer in sentences, for the top of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from flexbench.report.formats.cells import cell, format_figure
from flexbench.report.reading import Reading
from flexbench.report.runs import GATE_COLUMNS, PROJECTED
from flexbench.report.store import RunStore
from flexbench.report.table import Column, Kind, Row, Table

_MOST_DESCRIBING = 8
_MOST_OF_A_SYSTEM = 3


def summary_of(store: RunStore, reading: Reading, tables: Sequence[Table]) -> Iterator[str]:
    """How many runs there are, the best rows of each system, and how systems compare."""
    yield _counts(store, reading)
    for table in tables:
        if table.name == "runs":
            yield from _best(table)
        elif table.name == "systems":
            yield from _ratios(table)


def _counts(store: RunStore, reading: Reading) -> str:
    systems = store.rows(
        "SELECT system, count(*) AS num_runs FROM runs GROUP BY system"
        " ORDER BY num_runs DESC, system"
    )
    parts = [
        f"{row['num_runs']:,} of {row['system']}"
        if row["system"] is not None
        else f"{row['num_runs']:,} without a record"
        for row in systems
    ]
    if reading.predictions:
        parts.append(f"{len(reading.predictions):,} predicted figures of servers")
    runs, files = (
        f"1 {noun}" if count == 1 else f"{count:,} {noun}s"
        for count, noun in ((len(store), "run"), (reading.num_files, "file"))
    )
    return f"{runs} from {files}: {', '.join(parts)}."


def _best(table: Table) -> Iterator[str]:
    """Of all that can be compared, the row with the highest mean throughput.

    Only of rows that say something of the service itself.
    """
    best: dict[tuple[Any, ...], Row] = {}
    for row in table.rows:
        throughput = row.values.get("throughput_mean")
        is_doubtful = row.is_mixed or row.values.get("num_client_limited")
        if throughput is None or is_doubtful or row.values.get("basis") == PROJECTED:
            continue
        alike = tuple(row.values.get(name) for name in GATE_COLUMNS)
        if alike not in best or throughput > best[alike].values["throughput_mean"]:
            best[alike] = row
    for row in list(best.values())[:_MOST_OF_A_SYSTEM]:
        throughput = format_figure(row.values["throughput_mean"])
        yield f"{table.title}: up to {throughput} tokens/s{_how_sure(row)}{_with(table, row)}."
    if len(best) > _MOST_OF_A_SYSTEM:
        yield f"{table.title}: {len(best) - _MOST_OF_A_SYSTEM} more that cannot be compared."


def _how_sure(row: Row) -> str:
    number = row.values.get("num_runs") or 1
    low, high = (row.values.get(f"throughput_ci_{end}") for end in ("low", "high"))
    if number == 1:
        return " in one run"
    if low is None or high is None:
        return f" (mean of {number:,} runs)"
    interval = f"{format_figure(low)} to {format_figure(high)}"
    return f" (mean of {number:,} runs, 95 % interval {interval})"


def _with(table: Table, row: Row) -> str:
    """What sets the row apart, in the words of the table's headings."""
    describing = takewhile(_is_describing, (one for one in table.columns if one.is_shown))
    parts = [
        f"{' '.join(column.heading.split())} {cell(column, row)}"
        for column in describing
        if row.values.get(column.name) is not None
    ]
    return f", with {', '.join(parts[:_MOST_DESCRIBING])}" if parts else ""


def _is_describing(column: Column) -> bool:
    return column.kind in (Kind.TEXT, Kind.COUNT)


def _ratios(table: Table) -> Iterator[str]:
    for row in table.rows:
        ratio = row.values.get("ratio")
        if ratio is None or row.is_mixed:
            continue
        model, prompt, new = (
            row.values.get(name) for name in ("model", "sequence_length", "max_tokens")
        )
        yield (
            f"petals gave {ratio:.3g} times the throughput of dist for {model} with {prompt} "
            f"prompt tokens and {new} new ones."
        )
