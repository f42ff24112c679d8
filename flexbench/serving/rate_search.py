"""The search for the highest rate that a service sustains in an open loop."""

from __future__ import annotations

import math

from flexbench.core.errors import ConfigError
from flexbench.serving.observations import (
    DEFAULT_MAX_ERROR_RATE,
    DEFAULT_MAX_POINTS,
    MAX_TRIES,
    WITHOUT_KNEE,
    Z_95,
    Estimate,
    Observation,
    Saturation,
    Search,
    Step,
    StopReason,
)

_RESOLUTION = 0.05
_Z_CLEAR = 2.6  # many rates are judged, and one of them is often 2 errors off
_Z_NARROW = 4.0
_SUSTAINED = 0.97  # share of the offered rate that a service that keeps up delivers


class RateSearch(Search):
    """The search over the rate of an open loop.

    A rate is sustained when at least 97 % of what was offered is answered in the same time, that
    is, when the queue does not grow; the conditions are met; and few requests fail. It doubles
    until a rate is not; the throughput under too much load is then the guess around which it looks,
    to within 5 %. Where chance may decide between 97 % and less (arrivals vary, and so do answers),
    a rate is tried up to three times; if it still may, a rate that is no higher than the highest
    throughput counts as sustained.
    """

    def __init__(
        self,
        *,
        max_rate: float,
        start_rate: float = 1.0,
        has_slo: bool = False,
        max_error_rate: float = DEFAULT_MAX_ERROR_RATE,
        max_points: int = DEFAULT_MAX_POINTS,
    ) -> None:
        super().__init__(has_slo=has_slo, max_error_rate=max_error_rate, max_points=max_points)
        if not 0 < start_rate <= max_rate < math.inf:
            raise ConfigError("--max-rate", f"must be at least {start_rate:g} requests/s")
        self._max_rate = max_rate
        self._start_rate = start_rate

    def add(self, level: float, observation: Observation) -> None:
        """Take in what a point at `level` requests/s showed."""
        self._add(level, observation)

    def next_level(self) -> float | None:
        """Which rate to try next, in requests/s; None: the search is at its end."""
        return self._step().level

    def result(self) -> Saturation:
        """What is known by now; also before the search is at its end."""
        reason = self._step().reason or StopReason.UNFINISHED
        sustained, refused = self._bracket()
        is_known = sustained is not None and reason in (StopReason.PLATEAU, StopReason.ERRORS)
        confidence = WITHOUT_KNEE[reason]
        low, high = self._clear_bracket(sustained, refused)
        if sustained and refused and reason is not StopReason.CLIENT_LIMITED:
            confidence = self._confidence(reason, (sustained, refused), (low, high))
        return Saturation(
            is_open_loop=True,
            knee_level=sustained if is_known else None,
            knee_low=low if is_known else None,
            knee_high=high if is_known else None,
            confidence=confidence,
            **self._found(reason, is_lower_bound=not is_known),
        )

    def _step(self) -> Step:
        if self.num_points >= self._max_points:
            return Step(reason=StopReason.UNFINISHED)
        doubtful = self._doubtful()
        if doubtful is not None:
            return Step(level=doubtful)
        if self._is_mute:
            return Step(reason=StopReason.UNFINISHED)
        for level in sorted(self._levels):
            if self._is_doubtful_rate(level):
                return Step(level=level)
        sustained, refused = self._bracket()
        if refused is None:
            return self._grow(sustained)
        if self._levels[refused].is_client_limited:
            return Step(reason=StopReason.CLIENT_LIMITED)
        reason = self._why_refused(refused)
        if sustained is None:
            # The first rate was too high already: go down, but not for ever.
            if refused > self._start_rate / 1000 and not self._levels[refused].has_errors:
                return Step(level=_rounded(self._below(refused)))
            return Step(reason=reason)
        if refused / sustained <= 1 + _RESOLUTION:
            return Step(reason=reason)
        return Step(level=_rounded(self._between(sustained, refused)))

    def _grow(self, sustained: float | None) -> Step:
        if sustained is None:
            return Step(level=self._start_rate)
        if sustained >= self._max_rate:
            return Step(reason=StopReason.LIMIT)
        return Step(level=min(2 * sustained, self._max_rate))

    def _clear_side(self, level: float) -> int:
        """1: certainly sustained; -1: certainly not; 0: it may be chance."""
        delivered = self._levels[level].delivered(level)
        surplus = delivered.mean - _SUSTAINED
        if abs(surplus) <= _Z_CLEAR * delivered.error:
            return 0
        return 1 if surplus > 0 else -1

    def _is_doubtful_rate(self, level: float) -> bool:
        """Whether one more try may tell if it is sustained.

        Not while the load grows: a rate that may be sustained is followed by a higher one.
        """
        seen = self._levels[level]
        if seen.is_allowed and seen.tries == 1 and self._is_narrowly_refused(level):
            return True
        if self._clear_side(level) or seen.tries >= MAX_TRIES or not seen.is_allowed:
            return False
        is_near = any(level < other <= 1.5 * level for other in self._levels)
        return not self._is_sustained(level) or is_near

    def _is_narrowly_refused(self, level: float) -> bool:
        """Of many rates, chance refuses one: what is refused by little is tried again."""
        delivered = self._levels[level].delivered(level)
        missing = _SUSTAINED - delivered.mean
        return self._clear_side(level) < 0 and missing < _Z_NARROW * delivered.error

    def _is_sustained(self, level: float) -> bool:
        """By measurement where that is clear, else by the highest throughput that was seen."""
        seen = self._levels[level]
        if not seen.is_allowed or seen.is_client_limited:
            return False
        side = self._clear_side(level)
        highest = self._saturated()
        if side < 0:
            return False
        if highest is None:
            return True  # a higher rate will tell
        top = highest.mean + Z_95 * highest.error
        if self._estimate(level).mean > top:
            # Too much load makes the service slower: this rate speaks for itself.
            return seen.delivered(level).mean >= _SUSTAINED
        return level <= (top if side else highest.mean)

    def _saturated(self) -> Estimate | None:
        """Throughput under clearly too much load, which is all that the service can do."""
        over = [
            level
            for level, seen in self._levels.items()
            if seen.is_allowed and not seen.is_client_limited and self._clear_side(level) < 0
        ]
        return self._highest(over) if over else None

    def _bracket(self) -> tuple[float | None, float | None]:
        """The highest rate that was sustained below the lowest that was not; and that one."""
        refused = min((x for x in self._levels if not self._is_sustained(x)), default=None)
        below = [x for x in self._levels if refused is None or x < refused]
        return max(below, default=None), refused

    def _clear_bracket(
        self, sustained: float | None, refused: float | None
    ) -> tuple[float | None, float | None]:
        """Around both of `_bracket`: the nearest rates that chance cannot have decided.

        Where the highest throughput decided, its interval counts as well.
        """
        if sustained is None or refused is None:
            return sustained, refused
        highest = self._saturated()
        low, high = sustained, refused
        if not self._clear_side(sustained):
            low = max((x for x in self._levels if x < low and self._clear_side(x) > 0), default=0.0)
            if highest is not None:
                low = max(low, min(sustained, highest.mean - Z_95 * highest.error))
        if highest is None or not self._levels[refused].is_allowed:
            return low, high
        if not self._clear_side(refused):
            above = (x for x in self._levels if x > refused and self._clear_side(x) < 0)
            high = min(above, default=max(self._levels))
            high = min(high, max(refused, highest.mean + Z_95 * highest.error))
        # Of arrivals that cluster, a rate below the highest throughput is often refused.
        high = max(high, highest.mean + Z_95 * highest.error)
        return low, high

    @staticmethod
    def _confidence(
        reason: StopReason,
        bracket: tuple[float, float],
        clear: tuple[float | None, float | None],
    ) -> str:
        sustained, refused = bracket
        how = "sustained" if reason is StopReason.PLATEAU else "within the limits"
        if clear == bracket:
            return f"sure: {sustained:.4g} requests/s are {how}, {refused:.4g} are not"
        low, high = clear
        return (
            f"fairly sure: {sustained:.4g} requests/s, by the highest throughput; from {low:.4g} "
            f"to {high:.4g} chance may decide what is {how}"
        )

    def _why_refused(self, level: float) -> StopReason:
        if not self._levels[level].is_allowed:
            return self._refusal(level)
        return StopReason.PLATEAU

    def _below(self, refused: float) -> float:
        guess = self._estimate(refused).mean
        is_guess_good = refused / 100 < guess < refused * _SUSTAINED
        return guess * 0.98 if is_guess_good and self._levels[refused].is_allowed else refused / 4

    def _between(self, sustained: float, refused: float) -> float:
        overloaded = [
            self._estimate(x).mean
            for x, seen in self._levels.items()
            if x >= refused and not seen.is_client_limited and not seen.has_errors
        ]
        is_overload = self._why_refused(refused) is StopReason.PLATEAU
        guess = max(overloaded, default=0.0) if is_overload else 0.0
        for level in (guess * 0.99, guess * 1.035):
            # On both sides of what the service does under too much load.
            if sustained * 1.01 < level < refused / 1.01:
                return level
        return math.sqrt(sustained * refused)


def _rounded(rate: float) -> float:
    """Four digits: enough for a resolution of 5 %, and good to read."""
    return float(f"{rate:.4g}")
