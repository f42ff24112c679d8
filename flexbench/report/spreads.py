"""The spread of a figure over the runs of a group: the SQL of it, and what SQL cannot compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexbench.report.statistics import (
    CONFIDENCE,
    Array,
    Spread,
    bootstrap_intervals,
    t_value,
)

# Sums of more than this, and their squares, may be too large for a float: there they are computed
# of values shrunk by a power of two, which loses no digit.
_HUGE = 1e140
_SHRINK = 2.0**-600
_LARGEST = 1.7976931348623157e308


AGGREGATES = ("n", "min", "max", "mean", "std", "halves")


def aggregates(figure: str, percentiles: Sequence[float]) -> list[str]:
    """SQL for AGGREGATES of the column `figure`, over the runs of a group."""
    shares = ", ".join(f"{percentile / 100:.10g}" for percentile in percentiles)
    usual = f"FILTER (WHERE abs({figure}) < {_HUGE})"
    is_usual = f"max(abs({figure})) < {_HUGE}"
    return [
        f"count({figure}) AS {figure}_n",
        f"min({figure}) AS {figure}_min",
        f"max({figure}) AS {figure}_max",
        f"CASE WHEN {is_usual} THEN favg({figure}) {usual} ELSE favg({figure} * {_SHRINK}) END"
        f" AS {figure}_mean",
        f"CASE WHEN {is_usual} THEN stddev_samp({figure}) {usual}"
        f" ELSE stddev_samp({figure} * {_SHRINK}) END AS {figure}_std",
        # Halves: between two values it is interpolated, and their difference may be too large.
        f"quantile_cont({figure} / 2, [{shares}]) AS {figure}_halves",
    ]


def columns_of_spread(figure: str, percentiles: Sequence[float]) -> list[str]:
    """SQL for the columns that `spreads_of` takes, of a table that has AGGREGATES."""
    halves = (
        f"{figure}_halves[{place}] AS {figure}_half{place}"
        for place in range(1, len(percentiles) + 1)
    )
    return [*(f"{figure}_{name}" for name in AGGREGATES[:-1]), *halves]


def spreads_of(
    columns: Mapping[str, npt.NDArray[Any]],
    figure: str,
    percentiles: Sequence[float],
    bounds: tuple[Array, Array],
) -> list[Spread | None]:
    """The spread of a figure over each of many groups; None where no run has it.

    `bounds` are the ends of the intervals that were found by bootstrap, NaN where there are none;
    the others are mean ± t * s / sqrt(n).
    """
    counts = columns[f"{figure}_n"]
    lows, highs, means, stds = (
        floats(columns[f"{figure}_{name}"]) for name in ("min", "max", "mean", "std")
    )
    scales = np.where(np.maximum(abs(lows), abs(highs)) < _HUGE, 1.0, 1 / _SHRINK)
    with np.errstate(over="ignore"):
        # Roundings must not leave the range.
        means = np.clip(means * scales, lows, highs)
        stds = np.minimum(stds * scales, _LARGEST)
    middle = list(percentiles).index(50.0)
    values = [
        np.clip(2 * floats(columns[f"{figure}_half{place}"]), lows, highs).tolist()
        for place in range(1, len(percentiles) + 1)
    ]
    ends = _ends(counts, lows, means, stds, bounds)
    return [
        Spread(
            count=count,
            mean=mean,
            median=quantiles[middle],
            std=std if count > 1 else None,
            min=low,
            max=high,
            percentiles=quantiles,
            ci_low=start if count > 1 else None,
            ci_high=end if count > 1 else None,
        )
        if count
        else None
        for count, low, high, mean, std, start, end, quantiles in zip(
            *(column.tolist() for column in (counts, lows, highs, means, stds, *ends)),
            zip(*values, strict=True),
            strict=True,
        )
    ]


def floats(column: npt.NDArray[Any]) -> Array:
    """A column of numbers, NaN where there is none."""
    # A column of a query has a mask where it has nulls.
    mask = getattr(column, "mask", None)
    values = np.asarray(getattr(column, "data", column) if mask is None else column.data)
    numbers = values.astype(np.float64)
    if mask is not None:
        numbers[np.asarray(mask)] = np.nan
    return numbers


def _ends(
    counts: npt.NDArray[Any], lows: Array, means: Array, stds: Array, bounds: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Of all intervals: those of the bootstrap, else those of Student's t."""
    different, places = np.unique(counts, return_inverse=True)
    ts = np.array([t_value(CONFIDENCE, max(int(count) - 1, 1)) for count in different])
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        halves = ts[places] * stds / np.sqrt(counts)
        starts = np.clip(means - halves, np.where(lows >= 0, 0.0, -_LARGEST), _LARGEST)
        ends = np.clip(means + halves, -_LARGEST, _LARGEST)
    is_found = ~np.isnan(bounds[0])
    return np.where(is_found, bounds[0], starts), np.where(is_found, bounds[1], ends)


@dataclass(frozen=True, kw_only=True)
class RunsOfFigure:
    """One figure of many groups, in the order of their gid; without runs that do not have it."""

    gids: npt.NDArray[Any]
    values: Array
    starts: npt.NDArray[Any]
    """Where each group begins."""
    counts: npt.NDArray[Any]

    @classmethod
    def of(cls, batch: Mapping[str, npt.NDArray[Any]], name: str) -> RunsOfFigure:
        """The column `name` of a batch, whose runs are ordered by `gid`."""
        values = floats(batch[name])
        is_known = ~np.isnan(values)
        gids = np.asarray(batch["gid"])[is_known]
        starts = np.flatnonzero(np.diff(gids, prepend=-1))
        counts = np.diff(starts, append=len(gids))
        return cls(gids=gids, values=values[is_known], starts=starts, counts=counts)


def fill_intervals(bounds: tuple[Array, Array], runs: RunsOfFigure, *, seed: int) -> None:
    """Compute the intervals of these groups, those with as many runs together."""
    for count in np.unique(runs.counts[runs.counts > 1]).tolist():
        starts = runs.starts[runs.counts == count]
        samples = runs.values[starts[:, None] + np.arange(count)]
        gids = runs.gids[starts]
        bounds[0][gids], bounds[1][gids] = bootstrap_intervals(samples, seed=seed)
