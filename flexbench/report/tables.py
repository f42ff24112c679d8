"""A report's records as text in each of its formats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from flexbench.core.results import CONFIGURATION_COLUMNS
from flexbench.core.units import format_bytes
from flexbench.report.aggregate import Group
from flexbench.report.predictions import PredictionGroup

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]

# Short enough that all twelve columns fit into a terminal of 80.
RUN_HEADINGS = {
    "batch_size": "\nbatch",
    "num_micro_batches": "\nmicro",
    "num_processes": "\nprocs",
    "sequence_length": "\nprompt",
    "max_tokens": "\nnew",
    "throughput_mean": "tok/s\nmean",
    "throughput_min": "tok/s\nmin",
    "throughput_max": "tok/s\nmax",
    "mean_latency_mean": "lat s\nmean",
    "mean_latency_min": "lat s\nmin",
    "mean_latency_max": "lat s\nmax",
    "num_runs": "\nruns",
}

PREDICTION_HEADINGS = {
    "model": "model",
    "num_blocks": "blocks",
    "figure": "figure",
    "unit": "unit",
    "predicted": "predicted",
    "measured": "measured",
    "error": "error",
    "num_runs": "runs",
}


class Format(StrEnum):
    """What a report can be printed as."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"


def run_records(groups: Sequence[Group]) -> list[Record]:
    """Plain data: one dict a group, throughput in tokens/s and latency in seconds."""
    return [
        {
            **dict(zip(CONFIGURATION_COLUMNS, group.configuration, strict=True)),
            "throughput_mean": group.throughput.mean,
            "throughput_min": group.throughput.min,
            "throughput_max": group.throughput.max,
            "mean_latency_mean": group.mean_latency.mean,
            "mean_latency_min": group.mean_latency.min,
            "mean_latency_max": group.mean_latency.max,
            "num_runs": group.num_runs,
        }
        for group in groups
    ]


def prediction_records(groups: Sequence[PredictionGroup]) -> list[Record]:
    """Plain data: one dict a figure; `error` is a share, None what is not known."""
    return [{name: getattr(group, name) for name in PREDICTION_HEADINGS} for group in groups]


def format_figure(value: float) -> str:
    """At least four significant digits, no exponent below a million: 22.53, 0.0457, 12345."""
    if value == 0:
        return "0"
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text and value < 1e6 else text


def to_table(records: Sequence[Record], headings: Mapping[str, str]) -> Table:
    """A rich table that fits into 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    shown = _shown(headings)
    for name in shown:
        # A figure that is too long for its column is folded, never cut.
        is_text = isinstance(records[0][name], str)
        table.add_column(headings[name], justify="left" if is_text else "right", overflow="fold")
    for record in records:
        table.add_row(*map(Text, _cells(record, shown)))
    return table


def to_markdown(records: Sequence[Record], headings: Mapping[str, str]) -> str:
    """A GitHub table."""
    shown = _shown(headings)
    lines = [
        "| " + " | ".join(shown) + " |",
        "|" + "|".join(" ---: " for _ in shown) + "|",
        *("| " + " | ".join(map(_escape, _cells(record, shown))) + " |" for record in records),
    ]
    return "\n".join(lines)


def to_csv(records: Sequence[Record], headings: Mapping[str, str]) -> str:
    """Comma-separated values with a header, every digit kept."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(headings), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().rstrip("\n")


def to_json(records: Sequence[Record], _headings: Mapping[str, str]) -> str:
    """A JSON list with one object a record, every digit kept."""
    return json.dumps(records, indent=2, allow_nan=False)


TEXT_FORMATS: dict[Format, Callable[[Sequence[Record], Mapping[str, str]], str]] = {
    Format.MARKDOWN: to_markdown,
    Format.CSV: to_csv,
    Format.JSON: to_json,
}


def _escape(cell: str) -> str:
    """On one line, with nothing that ends a cell of a Markdown table."""
    return " ".join(cell.splitlines()).replace("|", "\\|")


def _cells(record: Record, shown: Iterable[str]) -> list[str]:
    return [_cell(name, record[name], record.get("unit")) for name in shown]


def _shown(headings: Mapping[str, str]) -> list[str]:
    """What people see: units stand with their figures."""
    return [name for name in headings if name != "unit"]


def _cell(name: str, value: Any, unit: str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if name == "error":
        return f"{value:+.1%}"
    if unit == "bytes":
        return format_bytes(value)
    return f"{format_figure(value)} {unit}" if unit else format_figure(value)
