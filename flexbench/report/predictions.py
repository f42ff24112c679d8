"""What `flexbench server-config` predicted of servers beside what they turned out to be.

Read from the JSON records of launched servers; nothing is computed here but a mean error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbench.core.errors import InputFileError
from flexbench.core.results import RECORD_SCHEMA_VERSION

SYSTEM = "server-config"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One figure of one server. None: it was not predicted, or not measured."""

    model: str
    num_blocks: int
    figure: str
    unit: str
    predicted: float | None
    measured: float | None
    error: float | None
    """predicted / measured - 1."""


def read_predictions(path: Path) -> Iterator[Prediction | InputFileError]:
    """The figures of all launched servers in a file of JSON lines.

    Records of other commands, and of servers that did not start, are passed over. A malformed line
    comes as the InputFileError that describes it. Raises InputFileError when the file itself cannot
    be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield from _parse(line)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    yield InputFileError(path, f"not a record: {_reason(error)}", line=number)
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _parse(line: str) -> list[Prediction]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("must be a JSON object")
    version = record["schema_version"]
    if version != RECORD_SCHEMA_VERSION:
        raise ValueError(
            f"schema_version {version!r} is not {RECORD_SCHEMA_VERSION}, the one known here"
        )
    if record["system"] != SYSTEM or record["status"] != "ok":
        return []
    predicted = record["predicted"]
    return [
        Prediction(
            model=_text(predicted["model"]),
            num_blocks=int(predicted["num_blocks"]),
            figure=_text(figure["name"]),
            unit=_text(figure["unit"]),
            predicted=_number(figure["predicted"]),
            measured=_number(figure["measured"]),
            error=_number(figure["error"]),
        )
        for figure in record["comparison"]
    ]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {value!r}")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value!r}")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class PredictionGroup:
    """All servers of one model with as many blocks: the means of a figure and of its error."""

    model: str
    num_blocks: int
    figure: str
    unit: str
    predicted: float | None
    measured: float | None
    error: float | None
    num_runs: int


def group_predictions(predictions: Sequence[Prediction]) -> list[PredictionGroup]:
    """Means over the servers of a model and number of blocks, in the order of their first run."""
    groups: dict[tuple[str, int, str, str], list[Prediction]] = {}
    for one in predictions:
        key = (one.model, one.num_blocks, one.figure, one.unit)
        groups.setdefault(key, []).append(one)
    return [
        PredictionGroup(
            model=model,
            num_blocks=num_blocks,
            figure=figure,
            unit=unit,
            predicted=_mean([one.predicted for one in members]),
            measured=_mean([one.measured for one in members]),
            error=_mean([one.error for one in members]),
            num_runs=len(members),
        )
        for (model, num_blocks, figure, unit), members in groups.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
