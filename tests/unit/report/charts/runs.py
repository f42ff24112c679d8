"""Runs and stores of the tests of charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexbench.report.runs import Run
from flexbench.report.store import RunStore

HOSTILE = "<script>alert(1)</script>\x1b[31m\"'\n{{7*7}} datum.x ${x}"


def petals_run(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "source": Path("petals.jsonl"),
        "system": "petals",
        "model": "bigscience/bloom-560m",
        "weights": "real",
        "basis": "measured",
        "dtype": "float32",
        "topology": "2 servers",
        "machine": "AMD EPYC, 2 CPUs",
        "num_gpus": 0,
        "batch_size": 1,
        "num_micro_batches": 2,
        "num_processes": 1,
        "sequence_length": 32,
        "max_tokens": 8,
        "throughput": 12.0,
        "mean_latency": 1.5,
    }
    return Run(**{**values, **changes})


def dist_run(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "system": "dist",
        "model": "facebook/opt-125m",
        "weights": "dummy",
        "topology": "2 stages",
        "num_processes": 2,
        "batch_size": 4,
    }
    return petals_run(**{**values, **changes})


def serving_run(
    *,
    limited: bool = False,
    late: bool = False,
    rate_per_s: float | None = None,
    figures: Mapping[str, float] | None = None,
    setup: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Run:
    verdicts = {"client_limited": float(limited), "timing_uncertain": float(late)}
    rate = {} if rate_per_s is None else {"rate_per_s": rate_per_s}
    changes = {
        "figures": verdicts | dict(figures or {}),
        "setup": rate | dict(setup or {}),
    } | changes
    values: dict[str, Any] = {"system": "serving", "model": "m", "topology": None}
    return petals_run(**{**values, **changes})


def store_of(runs: Iterable[Run]) -> RunStore:
    store = RunStore()
    store.add(runs)
    return store


def stage(rank: int, **changes: Any) -> dict[str, Any]:
    """10 s: 2 loading, 5 computing, 2 waiting for the stage before, none for the next one."""
    times = {"wall_s": 10.0, "stalled_s": 2.0, "compute_s": 5.0, "receive_s": 2.0, "send_s": 0.0}
    return {"rank": rank, **times, **changes}


def moments(*rows: tuple[str, float, float]) -> dict[str, Any]:
    return {"columns": ["what", "start_s", "end_s"], "rows": [list(row) for row in rows]}
