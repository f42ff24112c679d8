"""Runs, stores that hold them, and what reports make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexbench.report.comparison import Comparison, compare
from flexbench.report.runs import Run
from flexbench.report.selection import make_selection
from flexbench.report.store import RunStore
from flexbench.report.summary import summarize
from flexbench.report.table import Row, Table


def run(**changes: Any) -> Run:
    """A run without a record."""
    values = {
        "source": Path("runs.tsv"),
        "batch_size": 1,
        "num_micro_batches": 1,
        "num_processes": 4,
        "sequence_length": 512,
        "max_tokens": 32,
        "throughput": 20.0,
        "mean_latency": 5.0,
    }
    return Run(**(values | changes))


def known(**changes: Any) -> Run:
    """A run of dist with a record."""
    values = {
        "system": "dist",
        "model": "facebook/opt-6.7b",
        "weights": "dummy",
        "basis": "measured",
        "dtype": "float32",
        "topology": "4 stages",
        "machine": "EPYC, 2 CPUs",
    }
    return run(**(values | changes))


def point(concurrency: int | None, *, rate_per_s: float | None = None, **changes: Any) -> Run:
    """A point of serving."""
    figures = {"requests_per_s": 2.0, "ttft_p50": 0.1, "ttft_p99": 0.2, "e2e_p99": 3.0}
    setup = {"api": "vllm", "concurrency": concurrency, "rate_per_s": rate_per_s}
    values = {
        "system": "serving",
        "topology": "1 server",
        "num_processes": concurrency or 3,
        "figures": figures | changes.pop("figures", {}),
        "setup": {name: value for name, value in setup.items() if value is not None}
        | changes.pop("setup", {}),
    }
    return known(**(values | changes))


@contextmanager
def store_of(*runs: Run) -> Iterator[RunStore]:
    """A store with these runs."""
    with RunStore() as store:
        store.add(runs)
        yield store


def tables_of(*runs: Run, **options: Any) -> list[Table]:
    """The summary of these runs, selected as on a command line."""
    with store_of(*runs) as store:
        return summarize(store, make_selection(**options))


def column(table: Table, name: str) -> list[Any]:
    """The values of a column, row by row."""
    return [row.values.get(name) for row in table.rows]


def shown(table: Table) -> list[str]:
    """The columns that people see."""
    return [one.name for one in table.columns if one.is_shown]


def marked(rows: Sequence[Row]) -> list[list[str]]:
    """In what each row is best."""
    return [sorted(row.best) for row in rows]


def compared(
    old: Sequence[Run], new: Sequence[Run], *, max_regression: float = 0.05, **options: Any
) -> Comparison:
    with store_of(*old) as before, store_of(*new) as now:
        return compare(before, now, make_selection(**options), max_regression=max_regression)


def repeats(*throughputs: float, **changes: Any) -> list[Run]:
    return [known(throughput=one, mean_latency=None, **changes) for one in throughputs]


def verdicts(comparison: Comparison) -> list[str]:
    return column(comparison.table, "verdict")
