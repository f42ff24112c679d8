"""How sure a mean is, from few repeats.

Intervals are those of the bootstrap: runs are drawn from the runs, again and again, and the means
of the draws are a picture of how far a mean may be off. Of few runs that picture is too narrow, by
sqrt((n - 1) / n), and it is used as if a normal distribution were right where Student's t is.
Hesterberg (What Teachers Should Know About the Bootstrap, 2015) therefore takes percentiles further
out. No percentile lies outside of the runs themselves, however: of two runs such an interval holds
the mean in half of all cases. So here the distances of the usual percentiles from the mean are
multiplied by the same two factors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
MOST_RESAMPLED = 200
"""Of more runs the interval is mean ± t * s / sqrt(n), which the bootstrap's is by then, too."""
MOST_RESAMPLED_AT_ONCE = 1_000_000
"""In tables of more, which nobody reads one by one, all intervals are such: figures times runs that
are to be resampled, where a group is as much work as 20 runs more."""

_LARGEST = sys.float_info.max
_CHUNK = 1_000_000  # resampled means at once: what fits into a processor's cache, roughly
_SERIES_FROM = 30  # degrees of freedom
_NORMAL_FROM = 1000
_LEAST_SHARE = 1e-3  # of its mean that a resampled one is taken to be
_MOST_RELATIVE = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure over the runs that have it, in its own unit."""

    count: int
    mean: float
    median: float
    std: float | None
    """Of a sample, by n - 1; None of one run."""
    min: float
    max: float
    percentiles: tuple[float, ...] = ()
    """Those that were asked for, in their order; between two runs interpolated."""
    ci_low: float | None = None
    """Of the 95 % interval of the mean; None of one run."""
    ci_high: float | None = None


def bootstrap_interval(
    values: Sequence[float] | Array, *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float] | None:
    """In which the mean lies with this probability; None of fewer than two values."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return None
    if sample.size > MOST_RESAMPLED:
        scale = float(np.abs(sample).max()) or 1.0
        scaled = sample / scale
        low, high = t_interval(
            float(scaled.mean()), float(scaled.std(ddof=1)), sample.size, confidence=confidence
        )
        return _finite(low * scale), _finite(high * scale)
    lows, highs = bootstrap_intervals(sample.reshape(1, -1), confidence=confidence, seed=seed)
    return float(lows[0]), float(highs[0])


def bootstrap_intervals(
    samples: Array,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[Array, Array]:
    """The lower and upper ends of many intervals; each row of `samples` is the runs of one mean.

    Rows have at least two values. All are resampled alike, which makes none of them less right.
    """
    num_rows, count = samples.shape
    lows, highs = np.empty(num_rows), np.empty(num_rows)
    stretch = t_value(confidence, count - 1) / _z_value(confidence)
    size = max(1, _CHUNK // num_resamples)
    for start in range(0, num_rows, size):
        rows = samples[start : start + size]
        scales = np.abs(rows).max(axis=1)
        scales[scales == 0] = 1.0
        scaled = rows / scales[:, None]  # so that nothing overflows
        below, above = _percentiles(
            _deviations(scaled, num_resamples=num_resamples, seed=seed), confidence
        )
        means = scaled.mean(axis=1)
        low, high = means + stretch * below, means + stretch * above
        # What is never negative has no negative mean.
        low = np.where(scaled.min(axis=1) >= 0, np.maximum(low, 0.0), low)
        with np.errstate(over="ignore"):
            lows[start : start + size] = np.clip(low * scales, -_LARGEST, _LARGEST)
            highs[start : start + size] = np.clip(high * scales, -_LARGEST, _LARGEST)
    return lows, highs


def is_affordable(num_groups: int, num_runs: int, num_figures: int) -> bool:
    """Whether so many groups, with so many runs together, are resampled within a second or two."""
    return (num_runs + 20 * num_groups) * num_figures <= MOST_RESAMPLED_AT_ONCE


def t_interval(
    mean: float, std: float, count: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """mean ± t * s / sqrt(n), of at least two runs."""
    half = t_value(confidence, count - 1) * std / math.sqrt(count)
    return _finite(mean - half), _finite(mean + half)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One side of a ratio."""

    count: int
    mean: float
    std: float | None
    values: Array | None = None
    """None: too many to be resampled."""

    @classmethod
    def of(cls, values: Sequence[float] | Array) -> Sample:
        """At least one value; they are finite."""
        array = np.asarray(values, dtype=np.float64)
        std = float(array.std(ddof=1)) if array.size > 1 else None
        return cls(count=array.size, mean=float(array.mean()), std=std, values=array)

    @property
    def relative_variance(self) -> float:
        """Of one run, as a share of the mean squared; 0 where it is not known."""
        if self.std is None or self.mean == 0:
            return 0.0
        share = min(self.std / abs(self.mean), _MOST_RELATIVE)
        return share * share


def ratio_interval(
    old: Sample, new: Sample, *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float] | None:
    """In which new / old, of their means, lies with this probability.

    Both are resampled, independently of each other; the logarithms of the ratios are stretched as
    those of a single mean are, with the degrees of freedom of Welch and Satterthwaite. None where a
    side has one run, or a mean is not above 0.
    """
    if min(old.count, new.count) < 2 or min(old.mean, new.mean) <= 0:
        return None
    errors = _errors_of_ratio(old, new)
    ratio = _finite(new.mean / old.mean)
    if sum(errors) == 0:
        return ratio, ratio
    t = _t_between(confidence, _degrees(errors, (old.count, new.count)))
    if any(one.values is None or one.count > MOST_RESAMPLED for one in (old, new)):
        return _around(ratio, -t * math.sqrt(sum(errors)), t * math.sqrt(sum(errors)))
    # Two seeds: the same draws on both sides would cancel out.
    logs = _log_means(new, seed + 1) - _log_means(old, seed)
    below, above = _percentiles(logs.reshape(1, -1), confidence)
    stretch = t / _z_value(confidence)
    return _around(ratio, stretch * float(below[0]), stretch * float(above[0]))


def chance_of_ratio(old: Sample, new: Sample) -> float | None:
    """How probable a ratio at least as far from 1 is where nothing changed: a two-sided p value.

    By the t of the logarithm and the degrees of freedom that `ratio_interval` has. None where that
    has no interval.
    """
    if min(old.count, new.count) < 2 or min(old.mean, new.mean) <= 0:
        return None
    errors = _errors_of_ratio(old, new)
    change = math.log(new.mean) - math.log(old.mean)
    return _chance(change, sum(errors), _degrees(errors, (old.count, new.count)))


def chance_of_difference(old: Sample, new: Sample) -> float | None:
    """The same of a difference, by Welch's t."""
    if old.std is None or new.std is None:
        return None
    errors = [one.std**2 / one.count for one in (old, new) if one.std is not None]
    degrees = _degrees(errors, (old.count, new.count))
    return _chance(new.mean - old.mean, sum(errors), degrees)


def chance_from_noise(
    ratio: float, *, relative_std: float, degrees: int, counts: tuple[int, int]
) -> float:
    """The same of a ratio above 0, where other runs told how much runs vary."""
    square = relative_std**2 * sum(1 / count for count in counts)
    return _chance(math.log(ratio), square, degrees)


def difference_interval(
    old: Sample, new: Sample, *, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """In which new - old, of their means, lies with this probability, by Welch's t.

    None where a side has one run.
    """
    if old.std is None or new.std is None:
        return None
    change = new.mean - old.mean
    errors = [one.std**2 / one.count for one in (old, new) if one.std is not None]
    if sum(errors) == 0:
        return change, change
    half = _t_between(confidence, _degrees(errors, (old.count, new.count)))
    half *= math.sqrt(sum(errors))
    return _finite(change - half), _finite(change + half)


def ratio_interval_from_noise(
    ratio: float,
    *,
    relative_std: float,
    degrees: int,
    counts: tuple[int, int],
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """The interval of a ratio of means of so many runs, where other runs told how much they vary.

    `relative_std` is the standard deviation of a run as a share of its mean, found with so many
    degrees of freedom.
    """
    error = relative_std * math.sqrt(sum(1 / count for count in counts))
    half = t_value(confidence, degrees) * error
    return _around(ratio, -half, half)


@lru_cache(maxsize=4096)
def t_value(confidence: float, degrees: int) -> float:
    """What Student's t stays below, on either side of 0, with this probability.

    Abramowitz and Stegun, 26.7.3 and 26.7.4 for few degrees of freedom, 26.7.5 for many.
    """
    if degrees >= _SERIES_FROM:
        return _t_by_series(_z_value(confidence), degrees)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _probability_within(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def _probability_within(angle: float, degrees: int) -> float:
    """Of |t| < tan(angle) * sqrt(degrees)."""
    is_odd = degrees % 2
    square = math.cos(angle) ** 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for number in range(1, degrees // 2 + 1):
        total += term
        last = 2 * number if is_odd else 2 * number - 1
        term *= square * last / (last + 1)
    if is_odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _t_by_series(z: float, degrees: int) -> float:
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    result: float = z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
    return result


def _z_value(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _t_between(confidence: float, degrees: float) -> float:
    """For degrees that are no whole number: interpolated over 1 / degrees, which is never less."""
    first = int(degrees)
    low, high = t_value(confidence, first + 1), t_value(confidence, first)
    share = (1 / degrees - 1 / (first + 1)) / (1 / first - 1 / (first + 1))
    return low + share * (high - low)


def _errors_of_ratio(old: Sample, new: Sample) -> list[float]:
    """The squared errors of both means, as shares."""
    return [one.relative_variance / one.count for one in (old, new)]


def _chance(change: float, square: float, degrees: float) -> float:
    """Of a change at least as large as this one, by a squared error with so many degrees."""
    if change == 0:
        return 1.0
    if square == 0:
        return 0.0
    t = abs(change) / math.sqrt(square)
    if degrees > _NORMAL_FROM:
        return math.erfc(t / math.sqrt(2))
    first = int(degrees)
    # Between whole numbers over 1 / degrees, as the intervals.
    share = (1 / degrees - 1 / (first + 1)) / (1 / first - 1 / (first + 1))
    more, fewer = (
        max(0.0, 1 - _probability_within(math.atan(t / math.sqrt(number)), number))
        for number in (first + 1, first)
    )
    return more + share * (fewer - more)


def _degrees(errors: Sequence[float], counts: Sequence[int]) -> float:
    """Of a sum of two squared errors, by Welch and Satterthwaite.

    No more than two sides as short as the shorter one would have: two runs that happen to be alike
    beside thirty others would pass for thirty, and the interval would hold 88 of 100.
    """
    parts = sum(error**2 / (count - 1) for error, count in zip(errors, counts, strict=True))
    # Squares of very small errors vanish.
    degrees = sum(errors) ** 2 / parts if parts > 0 else min(counts) - 1
    return max(1.0, min(degrees, 2 * (min(counts) - 1)))


def _deviations(rows: Array, *, num_resamples: int, seed: int) -> Array:
    """Of resampled means from each row's own, as wide as those of independent runs would be."""
    count = rows.shape[1]
    centred = rows - rows.mean(axis=1, keepdims=True)
    # Where all are equal, the mean may be off by a rounding.
    centred[rows.max(axis=1) == rows.min(axis=1)] = 0.0
    shares = _shares(count, num_resamples, seed)
    deviations: Array = centred @ shares * math.sqrt(count / (count - 1))
    return deviations


@lru_cache(maxsize=8)
def _shares(count: int, num_resamples: int, seed: int) -> Array:
    """Of each of `count` runs in each resampled mean: (count, num_resamples)."""
    drawn = np.random.default_rng((seed, count)).integers(0, count, (num_resamples, count))
    places = drawn + np.arange(num_resamples)[:, None] * count
    numbers = np.bincount(places.ravel(), minlength=num_resamples * count)
    return np.ascontiguousarray(numbers.reshape(num_resamples, count).T / count)


def _percentiles(rows: Array, confidence: float) -> tuple[Array, Array]:
    """Of each row, those that leave out the same share at both ends; 0 lies between them."""
    num = rows.shape[1]
    first = max(0, round((num + 1) * (1 - confidence) / 2) - 1)
    ordered = np.partition(rows, (first, num - 1 - first), axis=1)
    return np.minimum(ordered[:, first], 0.0), np.maximum(ordered[:, num - 1 - first], 0.0)


def _log_means(sample: Sample, seed: int) -> Array:
    """The logarithms of resampled means, as shares of the mean."""
    assert sample.values is not None
    shares = (sample.values / sample.mean).reshape(1, -1)
    changes = _deviations(shares, num_resamples=NUM_RESAMPLES, seed=seed)[0]
    logs: Array = np.log(np.maximum(1 + changes, _LEAST_SHARE))
    return logs


def _around(ratio: float, below: float, above: float) -> tuple[float, float]:
    # exp() raises where a float ends.
    return ratio * math.exp(max(below, -700.0)), _finite(ratio * math.exp(min(above, 700.0)))


def _finite(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST)
