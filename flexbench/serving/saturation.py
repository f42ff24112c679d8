"""Where a service saturates: which load to try next, and what the tries together say.

A search is asked for the next level, given what was observed there, and asked again, until it has
no more questions. It decides from its observations alone, in whatever order they came, so points
that were measured before may be given to it first.

Terms: the *highest throughput* is that of the best level, pooled with those that cannot be told
from it. The *knee* is the smallest level that reaches it but for 3 %. Where throughput grows in
proportion to concurrency until it stops (a service with a fixed number of slots), that is the
number of slots, N* = X_max / X_1 (Denning and Buzen, The Operational Analysis of Queueing Network
Models, 1978): the search asks for that level and the one below it, instead of halving intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flexbench.core.checks import check_count
from flexbench.serving.observations import (
    DEFAULT_MAX_ERROR_RATE,
    DEFAULT_MAX_POINTS,
    MAX_TRIES,
    TOLERANCE,
    WITHOUT_KNEE,
    Z_95,
    Estimate,
    Observation,
    Saturation,
    Search,
    Step,
    StopReason,
    pool,
)
from flexbench.serving.rate_search import RateSearch

__all__ = ["Observation", "RateSearch", "Saturation", "SaturationSearch", "StopReason"]

DEFAULT_MAX_CONCURRENCY = 1024
_LEAST_GROWTH = 0.05  # a doubling that brings less is the plateau
_LINEARITY = 0.02
_Z_LINEARITY = 3.0  # many levels are compared: one of them is often 2 errors off
_Z_GUESS = 3.0  # errors from a few slices are uncertain themselves, and the best level was chosen
_MAX_GUESSES = 4  # of the linear model, before intervals are halved
_PEAK_RATIO = 1.15  # how close levels around a peak come
_KNEE_RESOLUTION = 0.05  # of a knee in a curve that bends slowly


class SaturationSearch(Search):
    """The search over the concurrency of a closed loop.

    It doubles the concurrency until throughput no longer grows, or a level is not allowed: too many
    errors, or conditions that are not met. Then it looks for the highest level that is allowed, if
    one was not; for the peak, if throughput fell; and, without conditions, for the knee. A level
    that is not clear is asked for again, up to three times.
    """

    def __init__(
        self,
        *,
        max_level: int = DEFAULT_MAX_CONCURRENCY,
        start_level: int = 1,
        has_slo: bool = False,
        max_error_rate: float = DEFAULT_MAX_ERROR_RATE,
        max_points: int = DEFAULT_MAX_POINTS,
    ) -> None:
        super().__init__(has_slo=has_slo, max_error_rate=max_error_rate, max_points=max_points)
        check_count("--max-clients", max_level, minimum=1)
        check_count("--start-clients", start_level, minimum=1, maximum=max_level)
        self._max_level = max_level
        self._start_level = start_level

    def add(self, level: int, observation: Observation) -> None:
        """Take in what a point with `level` clients showed."""
        self._add(level, observation)

    def next_level(self) -> int | None:
        """How many clients to try next; None: the search is at its end."""
        level = self._step().level
        return None if level is None else round(level)

    def result(self) -> Saturation:
        """What is known by now; also before the search is at its end."""
        reason = self._step().reason or StopReason.UNFINISHED
        usable = self._usable()
        is_known = bool(usable) and self._has_knee(usable, reason)
        if is_known and reason is StopReason.LIMIT:
            reason = StopReason.PLATEAU
        knee: dict[str, Any] = dict.fromkeys(("knee_level", "knee_low", "knee_high"))
        confidence = WITHOUT_KNEE[reason]
        if is_known:
            low, high = self._knee_bracket(usable)
            knee = self._knee(usable, low, high)
            confidence = self._confidence(usable, knee)
        if self._has_slo and reason is StopReason.PLATEAU:
            confidence += "; more clients may also meet the conditions: that was not tried"
        return Saturation(
            is_open_loop=False,
            confidence=confidence,
            **knee,
            **self._found(
                reason,
                is_lower_bound=not is_known,
                highest=self._plateau(usable) if is_known else None,
            ),
        )

    def _step(self) -> Step:
        if self.num_points >= self._max_points:
            return Step(reason=StopReason.UNFINISHED)
        doubtful = self._doubtful()
        if doubtful is not None:
            return Step(level=doubtful)
        if self._is_mute:
            return Step(reason=StopReason.UNFINISHED)
        grown = self._grow()
        if grown.level is not None:
            return grown
        assert grown.reason is not None
        next_level = None
        if grown.reason in (StopReason.SLO, StopReason.ERRORS):
            next_level = self._between_allowed()
        usable = self._usable()
        if next_level is None and not self._has_slo and self._has_knee(usable, grown.reason):
            next_level = self._between_peak(usable)
            if next_level is None:
                next_level = self._next_for_knee(usable)
        if next_level is not None:
            return Step(level=next_level)
        return grown

    # Growth

    def _grow(self) -> Step:
        """Double the level until there is a reason to stop."""
        level, before = self._start_level, None
        while True:
            seen = self._levels.get(level)
            if seen is None:
                return Step(level=level)
            if seen.is_client_limited:
                return Step(reason=StopReason.CLIENT_LIMITED)
            if not seen.is_allowed:
                return Step(reason=self._refusal(level))
            if before is not None and self._may_judge(before):
                step = self._judge_growth(before, level)
                if step is not None:
                    return step
            if level >= self._max_level:
                return Step(reason=StopReason.LIMIT)
            level, before = min(2 * level, self._max_level), level

    def _may_judge(self, before: int) -> bool:
        """With conditions, only a clear plateau counts: the doubling before brought nothing either.

        Just behind the knee they are often violated, and then the level that meets them is known.
        """
        if not self._has_slo:
            return True
        earlier = self._levels.get(before // 2)
        if before % 2 or earlier is None or before // 2 < self._start_level:
            return False
        low = earlier.estimate
        return self._estimate(before).mean < (1 + _LEAST_GROWTH) * low.mean

    def _judge_growth(self, before: int, level: int) -> Step | None:
        """What follows from two levels, the second twice the first: None is to go on."""
        low, high = self._estimate(before), self._estimate(level)
        if low.mean <= 0:
            return None
        gain = high.mean / low.mean - 1
        error = (1 + gain) * math.hypot(low.relative_error, high.relative_error)
        # Towards max_level, the step may be less than a doubling.
        least = _LEAST_GROWTH * (level / before - 1)
        if gain >= least:
            return None
        if gain + Z_95 * error >= least and self._levels[level].tries < 2:
            return Step(level=level)
        # Nothing gained from one to two may be a start with a hitch: look once further.
        if level <= 2 * self._start_level and level < self._max_level and level <= 2:
            return None
        return Step(reason=StopReason.PLATEAU)

    def _between_allowed(self) -> int | None:
        """Halves the way from the highest level that is allowed to the next that is not."""
        refused = min(level for level, seen in self._levels.items() if not seen.is_allowed)
        below = [level for level in self._usable() if level < refused]
        allowed = max(below, default=0)
        if refused - allowed <= 1:
            return None
        middle = int(refused + allowed) // 2
        return middle

    def _between_peak(self, usable: Sequence[float]) -> int | None:
        """Where throughput fell again, the highest may lie on either side of the best level."""
        position = max(range(len(usable)), key=lambda index: self._estimate(usable[index]).mean)
        best = usable[position]
        top = self._estimate(best)
        if not any(self._is_fallen(self._estimate(level), top) for level in usable[position + 1 :]):
            return None
        sides = list(usable[position + 1 : position + 2])
        if position > 0 and not self._is_linear_until(usable, best):
            sides.append(usable[position - 1])
        for side in sides:
            is_close = max(side, best) / min(side, best) <= _PEAK_RATIO or abs(side - best) <= 1
            if not is_close and self._is_fallen(self._estimate(side), top):
                return round((side + best) / 2)
        return None

    @staticmethod
    def _is_fallen(one: Estimate, top: Estimate) -> bool:
        difference = (1 - TOLERANCE) * top.mean - one.mean
        return difference > Z_95 * math.hypot(one.error, top.error)

    # The knee

    def _slope(self, levels: Sequence[float]) -> Estimate | None:
        """Throughput of one client, if it is the same at all `levels`."""
        if not levels:
            return None
        single = [
            Estimate(mean=one.mean / level, error=one.error / level)
            for level, one in ((level, self._estimate(level)) for level in levels)
        ]
        slope = pool(single)
        for one in single:
            allowed = _LINEARITY * slope.mean + _Z_LINEARITY * math.hypot(one.error, slope.error)
            if abs(one.mean - slope.mean) > allowed:
                return None
        return slope

    def _is_linear_until(self, usable: Sequence[float], level: float) -> bool:
        return self._slope([one for one in usable if one <= level]) is not None

    def _guess(self, usable: Sequence[float]) -> Estimate | None:
        """N* = X_max / X_1 with its error, where throughput grows in proportion below the knee."""
        return self._guess_for(usable, self._plateau(usable))

    def _guess_for(self, usable: Sequence[float], highest: Estimate) -> Estimate | None:
        least = (1 - 2 * TOLERANCE) * highest.mean
        slope = self._slope([level for level in usable if self._estimate(level).mean < least])
        if slope is None or slope.mean <= 0:
            return None
        guess = highest.mean / slope.mean
        if guess > usable[-1] * (1 + TOLERANCE):
            return None
        error = guess * math.hypot(slope.relative_error, highest.relative_error)
        return Estimate(mean=guess, error=error)

    def _plateau(self, usable: Sequence[float]) -> Estimate:
        """The highest throughput, without levels that are only just before the knee."""
        highest = self._highest(usable)
        guess = self._guess_for(usable, highest)
        beyond = [level for level in usable if guess and level >= round(guess.mean)]
        return self._highest(beyond, tolerance=1.0) if beyond else highest

    def _shortfall(self, usable: Sequence[float], level: float) -> tuple[float, float]:
        """By how much of the highest throughput `level` misses the target; and the error of that.

        With a fixed number of slots N, N - 1 clients reach (N - 1) / N of the highest, which may be
        more than the tolerance allows: the target then lies half-way between the two.
        """
        highest = self._plateau(usable)
        if highest.mean <= 0:
            return 0.0, 0.0
        guess = self._guess(usable)
        tolerance = TOLERANCE if guess is None else min(TOLERANCE, 0.5 / max(1.0, guess.mean))
        one = self._estimate(level)
        error = math.hypot(one.error, (1 - tolerance) * highest.error) / highest.mean
        return 1 - tolerance - one.mean / highest.mean, error

    def _is_on_plateau(self, usable: Sequence[float], level: float) -> bool:
        """By measurement where that is clear, else by the guess, if there is one.

        Without one, a level that misses the target by less than the error is on the plateau.
        """
        missing, error = self._shortfall(usable, level)
        guess = self._guess(usable)
        if guess is None:
            return missing <= error
        if abs(missing) > Z_95 * error:
            return missing <= 0
        return level >= round(guess.mean)

    def _knee_bracket(self, usable: Sequence[float]) -> tuple[float, float]:
        """The highest level before the knee (0: none), and the smallest one on the plateau."""
        high = next((x for x in usable if self._is_on_plateau(usable, x)), usable[-1])
        low = max((level for level in usable if level < high), default=0)
        return low, high

    def _has_knee(self, usable: Sequence[float], reason: StopReason) -> bool:
        """Whether throughput stopped growing somewhere among what was measured."""
        if not usable or reason is StopReason.CLIENT_LIMITED:
            return False
        if reason in (StopReason.PLATEAU, StopReason.ERRORS):
            return True
        # Where something else ended the growth, only a clear end of the straight line counts.
        guess = self._guess(usable)
        return guess is not None and guess.mean + _Z_GUESS * guess.error < usable[-1]

    def _next_for_knee(self, usable: Sequence[float]) -> int | None:
        low, high = self._knee_bracket(usable)
        guess = self._guess(usable)
        if high - low <= 1:
            return self._unclear(usable, [high, low])
        between = [level for level in self._levels if self._start_between(low, high, level)]
        if guess is not None and len(between) < _MAX_GUESSES:
            return self._next_by_guess(guess, low, high)
        if high - low <= _KNEE_RESOLUTION * high:
            return None
        return self._next_by_secant(usable, low, high)

    def _start_between(self, low: float, high: float, level: float) -> bool:
        """Whether `level` was tried in search of the knee, and not while the load was growing."""
        steps = math.log2(level / self._start_level)
        return low / 2 <= level <= 2 * high and not steps.is_integer() and level < self._max_level

    def _next_by_guess(self, guess: Estimate, low: float, high: float) -> int | None:
        level = round(min(max(round(guess.mean), low + 1), high - 1))
        # One slot more or less is below the noise: the guess says more than further points.
        is_blurred = guess.relative_error > 0.25 / guess.mean
        if is_blurred and level != round(guess.mean):
            return None
        return level

    def _next_by_secant(self, usable: Sequence[float], low: float, high: float) -> int:
        """Where the line between the two would meet the target, but well inside the interval."""
        share = 0.5
        if low > 0:
            missing = self._shortfall(usable, low)[0]
            surplus = -self._shortfall(usable, high)[0]
            if missing + surplus > 0:
                share = min(0.8, max(0.2, missing / (missing + surplus)))
        return round(min(max(low + share * (high - low), low + 1), high - 1))

    def _unclear(self, usable: Sequence[float], levels: Sequence[float]) -> int | None:
        """The first of `levels` that may lie on either side of the target, if any."""
        guess = self._guess(usable)
        if guess is not None and abs(guess.mean - levels[0]) < 0.5 and Z_95 * guess.error < 0.5:
            return None  # no other number of slots fits what was seen
        for level in levels:
            if level < 1 or self._levels[level].tries >= MAX_TRIES:
                continue
            missing, error = self._shortfall(usable, level)
            if abs(missing) < Z_95 * error:
                return round(level)
        return None

    def _knee(self, usable: Sequence[float], low: float | None, high: float) -> dict[str, Any]:
        """The knee, and the levels that cannot be told from it."""
        knee = high
        guess = self._guess(usable)
        if guess is not None and low is not None and low < round(guess.mean) <= high:
            knee = round(guess.mean)
        clear = {level: self._clear_side(usable, level) for level in usable}
        first = max((level for level in usable if clear[level] < 0 and level < knee), default=0) + 1
        last = min((level for level in usable if clear[level] > 0 and level >= knee), default=high)
        if guess is not None:
            first = max(first, math.ceil(guess.mean - _Z_GUESS * guess.error))
            last = min(last, math.floor(guess.mean + _Z_GUESS * guess.error))
        return {
            "knee_level": round(knee),
            "knee_low": round(min(first, knee)),
            "knee_high": round(max(last, knee)),
        }

    def _clear_side(self, usable: Sequence[float], level: float) -> int:
        """-1: certainly before the knee; 1: certainly not; 0: not certain."""
        missing, error = self._shortfall(usable, level)
        if missing > Z_95 * error:
            return -1
        return 1 if -missing >= Z_95 * error else 0

    def _confidence(self, usable: Sequence[float], knee: dict[str, Any]) -> str:
        level, first, last = knee["knee_level"], knee["knee_low"], knee["knee_high"]
        if first == last == 1:
            return "sure: one client reaches it"
        if first == last and self._is_separated(usable, level):
            return f"sure: {level} reach it, {level - 1} do not"
        if first == last:
            return f"fairly sure: {level} by the slope; it was not told from its neighbours"
        if last - first <= max(2, 0.1 * level):
            return f"fairly sure: {first} to {last} cannot be told apart"
        return f"rough: it lies between {first} and {last}"

    def _is_separated(self, usable: Sequence[float], level: float) -> bool:
        """Whether it and the one below were both measured, and differ by more than their errors."""
        if level not in usable or level - 1 not in usable:
            return False
        one, below = self._estimate(level), self._estimate(level - 1)
        return one.mean - below.mean > Z_95 * math.hypot(one.error, below.error)
