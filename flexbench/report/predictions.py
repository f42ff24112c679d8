"""What `flexbench server-config` predicted of servers beside what they turned out to be.

Read from the JSON records of launched servers; nothing is computed here but a mean error.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbench.core.errors import InputFileError
from flexbench.core.results import RECORD_SCHEMA_VERSION

SYSTEM = "server-config"
_MAX_COUNT = 10**9
_MAX_QUOTE_LENGTH = 60


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
                except _RecordError as error:
                    yield InputFileError(path, f"not a record: {error}", line=number)
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error


class _RecordError(ValueError):
    """What is wrong with a record, for people."""


def _parse(line: str) -> list[Prediction]:
    record = _load(line)
    version = _value(record, "schema_version")
    if version != RECORD_SCHEMA_VERSION:
        raise _RecordError(
            f"schema_version {_quote(version)} is not {RECORD_SCHEMA_VERSION}, the one known here"
        )
    if _value(record, "system") != SYSTEM or _value(record, "status") != "ok":
        return []
    predicted = _object("predicted", _value(record, "predicted"))
    figures = _value(record, "comparison")
    if not isinstance(figures, list):
        raise _RecordError(f"comparison must be a list, not {_quote(figures)}")
    return [
        Prediction(
            model=_text(predicted, "model"),
            num_blocks=_count(predicted, "num_blocks"),
            figure=_text(figure, "name"),
            unit=_text(figure, "unit"),
            predicted=_number(figure, "predicted"),
            measured=_number(figure, "measured"),
            error=_number(figure, "error"),
        )
        for figure in (_object("each of comparison", figure) for figure in figures)
    ]


def _load(line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise _RecordError(f"it is not JSON (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise _RecordError("it is not JSON that can be read") from error
    return _object("it", record)


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _RecordError(f"{name} must be a JSON object, not {_quote(value)}")
    return value


def _value(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise _RecordError(f"{name!r} is missing")
    return values[name]


def _text(values: Mapping[str, Any], name: str) -> str:
    value = _value(values, name)
    # Half of a surrogate pair, which JSON can write, cannot be printed.
    if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
        raise _RecordError(f"{name} must be a text, not {_quote(value)}")
    return value


def _count(values: Mapping[str, Any], name: str) -> int:
    value = _value(values, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_COUNT:
        raise _RecordError(f"{name} must be a whole number of at least 1, not {_quote(value)}")
    return value


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = _value(values, name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise _RecordError(f"{name} must be a finite number, not {_quote(value)}")
    return float(value)


def _quote(value: Any) -> str:
    """As it stands in the file, unless it is long."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= _MAX_QUOTE_LENGTH else f"{text[:_MAX_QUOTE_LENGTH]}..."


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
    # Not a sum divided at the end, which can overflow.
    return math.fsum(value / len(known) for value in known) if known else None
