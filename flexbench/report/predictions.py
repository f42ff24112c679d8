"""What `flexbench server-config` predicted of servers beside what they turned out to be.

Nothing is computed here but a mean error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
