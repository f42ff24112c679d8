"""Whether a figure is better or worse than before, or chance may have made the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from flexbench.report.figures import (
    is_difference,
    is_higher_better,
    is_share,
    is_speed,
    percentile_of_figure,
)
from flexbench.report.noise import Noise
from flexbench.report.statistics import (
    CONFIDENCE,
    Sample,
    chance_from_noise,
    chance_of_difference,
    chance_of_ratio,
    difference_interval,
    ratio_interval,
    ratio_interval_from_noise,
)

# Means of the same values may differ by their roundings.
_NOTHING = 1e-9
_FIRST_OF_TAIL = 90.0


class Verdict(StrEnum):
    """In words for people."""

    EQUAL = "equal"
    PERHAPS_EQUAL = "equal as far as can be told"
    FASTER = "faster"
    SLOWER = "slower"
    BETTER = "better"
    WORSE = "worse"
    HIGHER = "higher"
    LOWER = "lower"
    NOT_SURE = "not sure"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What came of a figure of one configuration."""

    ratio: float | None
    """new / old; None where there is none."""
    low: float | None
    """Of the ratio's 95 % interval that decided; None where there is none."""
    high: float | None
    verdict: str
    """A Verdict, and where it is small, that it is."""
    reason: str = ""
    is_regression: bool = False
    looks_worse: bool = False
    """Worse beyond what is accepted, but perhaps by chance."""
    chance: float | None = None
    """How probable such a change is where nothing changed; None where the noise is not known."""
    is_one_of_many: bool = False
    """Worse beyond its own interval, but so many were compared that one would be by chance."""


def judge(
    figure: str,
    old: Sample | None,
    new: Sample | None,
    *,
    max_regression: float,
    noise: Noise | None,
    is_asked: bool = False,
    seed: int = 0,
) -> Judgement:
    """Compare a figure's runs before and now.

    A change for the worse beyond `max_regression`, a share, is a regression if it is also beyond
    the noise: with repeats on both sides the interval of the ratio does not hold 1; else the
    interval made from `noise` does not. Where nobody knows the noise, any change beyond that share
    counts, but for one among the other side's runs, and one of a tail of a single run that nobody
    asked for by name (`is_asked`).
    """
    if old is None or new is None:
        return _without_ratio(f"{'not in the baseline' if old is None else 'not in the new runs'}")
    if is_difference(figure):
        return _by_difference(figure, old, new, max_regression)
    if old.mean <= 0 or new.mean < 0:
        return _from_zero(figure, old, new, max_regression)
    ratio = new.mean / old.mean
    counts = (old.count, new.count)
    runs = "one run each" if counts == (1, 1) else f"{old.count} + {new.count} runs"
    interval, source = ratio_interval(old, new, seed=seed), runs
    chance = chance_of_ratio(old, new)
    if new.mean == 0 and min(counts) > 1:
        interval, chance = (0.0, 0.0), 0.0
    has_own = interval is not None
    if interval is None and noise is not None:
        interval = ratio_interval_from_noise(
            ratio, relative_std=noise.relative_std, degrees=noise.degrees, counts=counts
        )
        chance = (
            None
            if ratio == 0
            else chance_from_noise(
                ratio, relative_std=noise.relative_std, degrees=noise.degrees, counts=counts
            )
        )
        source = noise.source
    doubt = _doubt(figure, old, new, is_asked=is_asked) if interval is None else ""
    found = _decide(figure, ratio, interval, max_regression=max_regression, source=source)
    if doubt and found.verdict in _SURE:
        found = replace(
            found,
            verdict=Verdict.NOT_SURE,
            reason=doubt,
            is_regression=False,
            looks_worse=found.is_regression,
        )
    elif not found.reason and not has_own and found.verdict != Verdict.EQUAL:
        reason = f"{runs}: noise not known" if interval is None else f"noise of {source}"
        found = replace(found, reason=reason)
    return replace(found, chance=chance)


_SURE = (
    Verdict.FASTER,
    Verdict.SLOWER,
    Verdict.BETTER,
    Verdict.WORSE,
    Verdict.HIGHER,
    Verdict.LOWER,
)


def _doubt(figure: str, old: Sample, new: Sample, *, is_asked: bool) -> str:
    """Why a change may be chance although nobody knows the noise; "" where nothing says so."""
    for one, others, whose in ((new, old, "the baseline's"), (old, new, "the new")):
        if one.count > 1 or others.count == 1 or others.values is None:
            continue
        if others.values.min() <= one.mean <= others.values.max():
            return f"among {whose} {others.count} runs"
    tail = percentile_of_figure(figure)
    if tail is not None and tail >= _FIRST_OF_TAIL and not is_asked:
        return "one run: the noise of a tail is not known"
    return ""


def _decide(
    figure: str,
    ratio: float,
    interval: tuple[float, float] | None,
    *,
    max_regression: float,
    source: str,
) -> Judgement:
    """The verdict by an interval that `source` told, or by the limit alone."""
    is_higher = is_higher_better(figure)
    word = _word(figure, is_up=ratio > 1)
    is_worse = is_higher is not None and (ratio < 1) == is_higher
    is_small = abs(ratio - 1) <= max_regression + _NOTHING
    is_beyond_noise = interval is None or not interval[0] <= 1 <= interval[1]
    limit = in_percent(max_regression)
    found = Judgement(
        ratio=min(ratio, 1e300),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        verdict=word,
    )
    if abs(ratio - 1) <= _NOTHING:
        return replace(found, verdict=Verdict.EQUAL)
    if is_small and interval is not None and is_beyond_noise:
        return replace(found, verdict=f"{word}, within {limit}")
    if is_small and interval is not None and _reaches(interval, max_regression, is_higher):
        reason = f"noise of {source} could hide {limit}"
        return replace(found, verdict=Verdict.PERHAPS_EQUAL, reason=reason)
    if is_small:
        return replace(found, verdict=Verdict.EQUAL)
    if not is_beyond_noise:
        reason = f"within the noise of {source}"
        return replace(found, verdict=Verdict.NOT_SURE, reason=reason, looks_worse=is_worse)
    return replace(found, is_regression=is_worse)


def allow_for_number(judgements: Sequence[Judgement]) -> list[Judgement]:
    """The judgements of one comparison, with no regression that many comparisons make by chance.

    By Holm's procedure over all whose noise is known: if nothing changed, a regression among them
    is as improbable as it is for one alone.
    """
    chances = [
        (one.chance, place) for place, one in enumerate(judgements) if one.chance is not None
    ]
    num, kept = len(chances), set[int]()
    for rank, (chance, place) in enumerate(sorted(chances)):
        if chance > (1 - CONFIDENCE) / (num - rank):
            break
        kept.add(place)
    return [
        _one_of_many(one, num)
        if one.is_regression and one.chance is not None and num > 1 and place not in kept
        else one
        for place, one in enumerate(judgements)
    ]


def _one_of_many(one: Judgement, num: int) -> Judgement:
    parts = [one.reason, f"may be chance among {num:,} comparisons"]
    reason = "; ".join(part for part in parts if part)
    return replace(one, reason=reason, is_regression=False, is_one_of_many=True)


def in_percent(share: float) -> str:
    """0.05 -> '5%'."""
    return f"{100 * share:.3g}%"


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


def _from_zero(figure: str, old: Sample, new: Sample, max_regression: float) -> Judgement:
    """Where there is nothing to divide by."""
    if old.mean == new.mean:
        return Judgement(ratio=None, low=None, high=None, verdict=Verdict.EQUAL)
    if old.mean < 0 or new.mean < 0:
        return _without_ratio("a figure below 0 has no ratio")
    if is_share(figure):
        return _by_difference(figure, old, new, max_regression)
    is_higher = is_higher_better(figure)
    # Every run had 0 before; one that is not is enough to doubt, all are enough to know.
    if new.values is not None and float(new.values.min()) <= 0:
        found = _without_ratio("from 0, and not in all runs")
        return replace(found, looks_worse=is_higher is False)
    return Judgement(
        ratio=None,
        low=None,
        high=None,
        verdict=_word(figure, is_up=True),
        reason="from 0, which has no ratio",
        is_regression=is_higher is False,
    )


def _by_difference(figure: str, old: Sample, new: Sample, max_regression: float) -> Judgement:
    """Of a share, where 1 in 1,000 instead of none is a ratio that nobody can use."""
    change = new.mean - old.mean
    found = Judgement(ratio=None, low=None, high=None, verdict=Verdict.EQUAL)
    if abs(change) <= _NOTHING:
        return found
    word = _word(figure, is_up=change > 0)
    is_worse = is_higher_better(figure) is (change < 0)
    found = replace(
        found,
        reason=f"{100 * change:+.3g} percentage points",
        chance=chance_of_difference(old, new),
    )
    if abs(change) <= max_regression + _NOTHING:
        return replace(found, verdict=f"{word}, within {in_percent(max_regression)}")
    interval = difference_interval(old, new)
    if interval is not None and interval[0] <= 0 <= interval[1]:
        reason = f"{found.reason}, within the noise of {old.count} + {new.count} runs"
        return replace(found, verdict=Verdict.NOT_SURE, reason=reason, looks_worse=is_worse)
    return replace(found, verdict=word, is_regression=is_worse)


def _without_ratio(reason: str) -> Judgement:
    return Judgement(ratio=None, low=None, high=None, verdict=Verdict.NOT_SURE, reason=reason)
