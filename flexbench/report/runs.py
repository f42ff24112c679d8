"""A run as every report sees it, whatever file and system it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexbench.core.results import CONFIGURATION_COLUMNS

MEASURED = "measured"
PROJECTED = "projected"
DUMMY = "dummy"
REAL = "real"

GATE_COLUMNS: tuple[str, ...] = (
    "system",
    "model",
    "weights",
    "basis",
    "dtype",
    "topology",
    "machine",
)
"""What runs must have in common to be averaged or compared."""

IDENTITY_COLUMNS: tuple[str, ...] = (*GATE_COLUMNS, *CONFIGURATION_COLUMNS)
"""With `setup`: the whole configuration of a run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run that came to its end. None: not known, as of rows that have no record."""

    source: Path
    """The file it was read from; of a row with a record beside it, the record's."""
    line: int | None = None
    """Counted from 1; None where the file is one record."""

    system: str | None = None
    """petals, dist or serving."""
    model: str | None = None
    weights: str | None = None
    """real or dummy; None as well of a service that does not tell."""
    basis: str | None = None
    """measured or projected."""
    dtype: str | None = None
    topology: str | None = None
    """What was spread over what, in words: "2 servers", "4 stages"."""
    machine: str | None = None
    """CPU, number of CPUs, GPUs, in words."""
    num_gpus: int | None = None
    """That the system under test used; 0: none."""

    batch_size: int
    num_micro_batches: int
    num_processes: int
    sequence_length: int
    max_tokens: int

    throughput: float | None = None
    """tokens/s"""
    mean_latency: float | None = None
    """s"""

    setup: Mapping[str, Any] = field(default_factory=dict)
    """The rest of its configuration that matters for its figures, flat: one value a name."""
    figures: Mapping[str, float | None] = field(default_factory=dict)
    """All other figures, flat: "total_latency", "ttft_p99"; names of core.metrics."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The record without what is long (requests, times of layers): for people who want it all."""
    started_at: str | None = None
    row_file: Path | None = None
    """Of a record: the TSV that has the same run as a row, which is then not counted again."""
    record_id: str | None = None
    """What copies of the same record (a line and a point's file) have in common."""
