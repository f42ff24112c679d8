"""The search for the highest rate that a service sustains in an open loop."""

from __future__ import annotations

import math

from flexbench.core.errors import ConfigError
from flexbench.serving.observations import (
    DEFAULT_MAX_ERROR_RATE,
    DEFAULT_MAX_POINTS,
    WITHOUT_KNEE,
    Estimate,
    Observation,
    Saturation,
    Search,
    Step,
    StopReason,
)

_RESOLUTION = 0.05
_SUSTAINED = 0.97  # share of the offered rate that a service that keeps up delivers


class RateSearch(Search):
    """The search over the rate of an open loop.

    A rate is sustained when at least 97 % of what was offered is answered in the same time, the
    conditions are met and few requests fail. It doubles until a rate is not; the throughput under
    too much load is then the guess around which it looks, to within 5 %.
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
        if sustained and refused and reason is not StopReason.CLIENT_LIMITED:
            how = "sustained" if reason is StopReason.PLATEAU else "within the limits"
            confidence = f"sure: {sustained:.4g} requests/s are {how}, {refused:.4g} are not"
        return Saturation(
            is_open_loop=True,
            knee_level=sustained if is_known else None,
            knee_low=sustained if is_known else None,
            knee_high=refused if is_known else None,
            confidence=confidence,
            **self._found(reason, is_lower_bound=not is_known),
        )

    def _step(self) -> Step:
        if self.num_points >= self._max_points:
            return Step(reason=StopReason.UNFINISHED)
        for level, seen in sorted(self._levels.items()):
            if seen.is_doubtful or self._is_doubtful_rate(level):
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

    def _delivered(self, level: float) -> Estimate:
        """The share of what was offered that was answered."""
        offered = self._levels[level].offered_per_s or level
        one = self._estimate(level)
        return Estimate(mean=one.mean / offered, error=one.error / offered)

    def _is_doubtful_rate(self, level: float) -> bool:
        """Whether nobody can say if it is sustained, after a single try."""
        delivered = self._delivered(level)
        is_unclear = abs(delivered.mean - _SUSTAINED) < delivered.error
        return self._levels[level].tries == 1 and is_unclear and self._levels[level].is_allowed

    def _is_sustained(self, level: float) -> bool:
        seen = self._levels[level]
        keeps_up = self._delivered(level).mean >= _SUSTAINED
        return seen.is_allowed and not seen.is_client_limited and keeps_up

    def _bracket(self) -> tuple[float | None, float | None]:
        """The highest rate that was sustained below the lowest that was not; and that one."""
        refused = min((x for x in self._levels if not self._is_sustained(x)), default=None)
        below = [x for x in self._levels if refused is None or x < refused]
        return max(below, default=None), refused

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
