"""A report's groups as text in each of its formats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from flexbench.core.results import CONFIGURATION_COLUMNS
from flexbench.report.aggregate import Group

if TYPE_CHECKING:
    from rich.table import Table

# Short enough that all twelve columns fit into a terminal of 80.
_HEADINGS = {
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


class Format(StrEnum):
    """What a report can be printed as."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"


def to_records(groups: Sequence[Group]) -> list[dict[str, Any]]:
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


def format_figure(value: float) -> str:
    """At least four significant digits, no exponent below a million: 22.53, 0.0457, 12345."""
    if value == 0:
        return "0"
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text and value < 1e6 else text


def to_table(groups: Sequence[Group]) -> Table:
    """A rich table that fits into 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in _HEADINGS.values():
        # A figure that is too long for its column is folded, never cut.
        table.add_column(heading, justify="right", overflow="fold")
    for record in to_records(groups):
        table.add_row(*_cells(record))
    return table


def to_markdown(groups: Sequence[Group]) -> str:
    """A GitHub table."""
    names = list(_HEADINGS)
    lines = [
        "| " + " | ".join(names) + " |",
        "|" + "|".join(" ---: " for _ in names) + "|",
        *("| " + " | ".join(_cells(record)) + " |" for record in to_records(groups)),
    ]
    return "\n".join(lines)


def to_csv(groups: Sequence[Group]) -> str:
    """Comma-separated values with a header, every digit kept."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(_HEADINGS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(to_records(groups))
    return text.getvalue().rstrip("\n")


def to_json(groups: Sequence[Group]) -> str:
    """A JSON list with one object a group, every digit kept."""
    return json.dumps(to_records(groups), indent=2, allow_nan=False)


TEXT_FORMATS: dict[Format, Callable[[Sequence[Group]], str]] = {
    Format.MARKDOWN: to_markdown,
    Format.CSV: to_csv,
    Format.JSON: to_json,
}


def _cells(record: dict[str, Any]) -> list[str]:
    return [
        str(value) if isinstance(value, int) else format_figure(value) for value in record.values()
    ]
