"""Whether a figure is better or worse than before, or chance may have made the difference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from flexbench.report.figures import is_higher_better, is_speed
from flexbench.report.statistics import Sample, ratio_interval, ratio_interval_from_noise

# Means of the same values may differ by their roundings.
_NOTHING = 1e-9


class Verdict(StrEnum):
    """In words for people."""

    EQUAL = "equal"
    FASTER = "faster"
    SLOWER = "slower"
    BETTER = "better"
    WORSE = "worse"
    HIGHER = "higher"
    LOWER = "lower"
    NOT_SURE = "not sure"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How much runs of one configuration differ, where a configuration has too few to tell."""

    relative_std: float
    """Of one run, as a share of the mean."""
    degrees: int
    """How many runs told it, less one for each configuration."""

    @classmethod
    def pooled(cls, samples: Iterable[Sample]) -> Noise | None:
        """From all configurations with repeats; None where there are none."""
        squares, degrees = 0.0, 0
        for one in samples:
            if one.std is not None and one.count > 1 and one.mean > 0:
                squares += (one.count - 1) * one.relative_variance
                degrees += one.count - 1
        return cls(relative_std=(squares / degrees) ** 0.5, degrees=degrees) if degrees else None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What came of a figure of one configuration."""

    ratio: float | None
    """new / old; None where there is none."""
    low: float | None
    """Of the ratio's 95 % interval from these very runs; None where a side has one run."""
    high: float | None
    verdict: str
    """A Verdict, and where it is small, that it is."""
    reason: str = ""
    is_regression: bool = False


def judge(
    figure: str,
    old: Sample | None,
    new: Sample | None,
    *,
    max_regression: float,
    noise: Noise | None,
    seed: int = 0,
) -> Judgement:
    """Compare a figure's runs before and now.

    A change for the worse beyond `max_regression`, a share, is a regression if it is also beyond
    the noise: with repeats on both sides the interval of the ratio does not hold 1; else the
    interval made from `noise` does not. Where nobody knows the noise, any change beyond that share
    counts.
    """
    if old is None or new is None:
        return _without_ratio(f"{'not in the baseline' if old is None else 'not in the new runs'}")
    if old.mean <= 0 or new.mean < 0:
        return _from_zero(figure, old, new)
    ratio = new.mean / old.mean
    own = ratio_interval(old, new, seed=seed)
    if new.mean == 0:
        own = (0.0, 0.0) if min(old.count, new.count) > 1 else None
    interval, reason = own, ""
    if own is None and noise is not None:
        counts = (old.count, new.count)
        interval = ratio_interval_from_noise(
            ratio, relative_std=noise.relative_std, degrees=noise.degrees, counts=counts
        )
        reason = "noise from repeats of others"
    elif own is None:
        reason = (
            "one run each: noise not known" if old.count == new.count == 1 else "noise not known"
        )
    verdict, more, is_regression = _decide(
        figure, ratio, interval, max_regression=max_regression, has_own=own is not None
    )
    return Judgement(
        ratio=min(ratio, 1e300),
        low=own[0] if own else None,
        high=own[1] if own else None,
        verdict=verdict,
        reason=more or ("" if verdict == Verdict.EQUAL else reason),
        is_regression=is_regression,
    )


def _decide(
    figure: str,
    ratio: float,
    interval: tuple[float, float] | None,
    *,
    max_regression: float,
    has_own: bool,
) -> tuple[str, str, bool]:
    """The verdict, its reason, and whether it is a regression."""
    is_higher = is_higher_better(figure)
    word = _word(figure, is_up=ratio > 1)
    is_worse = is_higher is not None and (ratio < 1) == is_higher
    is_small = abs(ratio - 1) <= max_regression + _NOTHING
    is_beyond_noise = interval is None or not interval[0] <= 1 <= interval[1]
    limit = f"{max_regression:.3g}" if max_regression >= 1 else f"{100 * max_regression:.3g}%"
    if abs(ratio - 1) <= _NOTHING:
        return Verdict.EQUAL, "", False
    if is_small:
        if has_own and is_beyond_noise:
            return f"{word}, within {limit}", "", False
        reaches = interval is not None and _reaches(interval, max_regression, is_higher)
        return Verdict.EQUAL, f"noise may hide more than {limit}" if reaches else "", False
    if not is_beyond_noise:
        own = "" if has_own else ", as of others' repeats"
        return Verdict.NOT_SURE, f"within the noise{own}", False
    return word, "", is_worse


def _reaches(interval: tuple[float, float], share: float, is_higher: bool | None) -> bool:
    """Whether the interval holds changes for the worse beyond this share."""
    is_below, is_above = interval[0] < 1 - share, interval[1] > 1 + share
    if is_higher is None:
        return is_below or is_above
    return is_below if is_higher else is_above


def _word(figure: str, *, is_up: bool) -> Verdict:
    is_higher = is_higher_better(figure)
    if is_higher is None:
        return Verdict.HIGHER if is_up else Verdict.LOWER
    if is_speed(figure):
        return Verdict.FASTER if is_up == is_higher else Verdict.SLOWER
    return Verdict.BETTER if is_up == is_higher else Verdict.WORSE


def _from_zero(figure: str, old: Sample, new: Sample) -> Judgement:
    """Where there is nothing to divide by."""
    if old.mean == new.mean:
        return Judgement(ratio=None, low=None, high=None, verdict=Verdict.EQUAL)
    if old.mean < 0 or new.mean < 0:
        return _without_ratio("a figure below 0 has no ratio")
    is_higher = is_higher_better(figure)
    # Every run had 0 before; one that is not is enough to doubt, all are enough to know.
    if new.values is not None and float(new.values.min()) <= 0:
        return _without_ratio("from 0, and not in all runs")
    return Judgement(
        ratio=None,
        low=None,
        high=None,
        verdict=_word(figure, is_up=True),
        reason="from 0, which has no ratio",
        is_regression=is_higher is False,
    )


def _without_ratio(reason: str) -> Judgement:
    return Judgement(ratio=None, low=None, high=None, verdict=Verdict.NOT_SURE, reason=reason)
