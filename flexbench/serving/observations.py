"""What points showed at the levels of a load, and what a search for saturation makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError
from flexbench.serving.figures import PointFigures

Z_95 = 1.96
DEFAULT_MAX_ERROR_RATE = 0.01
DEFAULT_MAX_POINTS = 60
TOLERANCE = 0.03  # a throughput that misses the highest by less is on the plateau
MAX_TRIES = 3  # of one level
_MAX_SHORT_TRIES = 4  # of one level, with ever longer points
_LENGTHENING = 3  # how many times longer a point is than the one before it that was too short
_MIN_LATENCIES = 3  # a steady window of an open loop with fewer is too short
_GROSS_ERROR_RATE = 0.5
_NOISE_FLOOR = 0.001  # no throughput is known better than that, whatever its slices say


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one point showed at a level."""

    requests_per_s: float
    standard_error: float = 0.0
    tokens_per_s: float = 0.0
    meets_slo: bool = True
    is_gross_violation: bool = False
    """Far beyond the limits of the conditions: a second try would show the same."""
    is_client_limited: bool = False
    error_rate: float = 0.0
    is_stopped: bool = False
    """The point was ended early, since too much failed: not allowed, whatever its error_rate."""
    is_too_short: bool = False
    """It lasted too few latencies, or had too few answers, to say anything of the level."""
    offered_per_s: float | None = None
    """What an open loop really asked for in the same time; None: its level."""
    offered_error: float = 0.0
    """By how much that differs by chance from what is answered, as a standard error."""

    @staticmethod
    def from_figures(
        figures: PointFigures,
        *,
        meets_slo: bool,
        is_client_limited: bool,
        is_gross_violation: bool = False,
        is_stopped: bool = False,
    ) -> Observation:
        """The steady window's throughput, or the whole window's of a point too short for one."""
        rate, error = figures.steady_requests_per_s, figures.steady_standard_error
        tokens = figures.steady_output_tokens_per_s
        if not rate:
            rate, tokens = figures.requests_per_s or 0.0, figures.output_tokens_per_s
        if error is None:
            error = rate / math.sqrt(max(1, figures.num_ok))
        return Observation(
            requests_per_s=rate,
            standard_error=error,
            tokens_per_s=tokens or 0.0,
            meets_slo=meets_slo,
            is_gross_violation=is_gross_violation,
            is_client_limited=is_client_limited,
            error_rate=figures.error_rate or 0.0,
            is_stopped=is_stopped,
            is_too_short=not is_stopped and _is_too_short(figures),
            offered_per_s=figures.steady_scheduled_per_s,
            offered_error=figures.steady_scheduled_error or 0.0,
        )


def _is_too_short(figures: PointFigures) -> bool:
    """Whether a longer point would say more; not if most requests failed: they would again."""
    if figures.num_failed > figures.num_ok:
        return False
    start_s, end_s = figures.steady_start_s, figures.steady_end_s
    if figures.steady_scheduled_per_s is None or start_s is None or end_s is None:
        return figures.steady_standard_error is None
    # Few answers say enough of a low rate of an open loop: that all of them came.
    shortest_s = figures.e2e.min if figures.e2e is not None else math.inf
    return end_s - start_s < _MIN_LATENCIES * shortest_s


class StopReason(StrEnum):
    """What ended the growth of the load."""

    PLATEAU = "plateau"  # more load brought no more throughput
    SLO = "slo"  # a condition was violated
    ERRORS = "errors"  # too many requests failed
    CLIENT_LIMITED = "client_limited"  # the load generator was the limit
    LIMIT = "limit"  # the highest level that was allowed
    UNFINISHED = "unfinished"  # the search was ended from outside, or found no end


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """What a search found. Levels are concurrencies, or requests/s of an open loop."""

    reason: StopReason
    is_open_loop: bool
    knee_level: float | None
    """None: not found, or nothing was measured that counts."""
    knee_low: float | None
    """The levels that cannot be told from the knee with 95 % certainty reach from here"""
    knee_high: float | None
    """to here."""
    highest_requests_per_s: float | None
    highest_low: float | None
    """The 95 % interval of highest_requests_per_s."""
    highest_high: float | None
    highest_tokens_per_s: float | None
    highest_level: float | None
    """Where it was seen."""
    slo_level: float | None
    """Highest level that meets the conditions (and the limit of errors); None: none does, or, in a
    search without conditions, none was exceeded."""
    slo_requests_per_s: float | None
    """The highest throughput of levels that meet them."""
    is_lower_bound: bool
    """The service may be able to do more than was seen."""
    confidence: str
    """How sure, in words."""
    num_points: int
    is_slo_lower_bound: bool = False
    """Levels above slo_level, which were not tried, may meet the conditions as well."""

    def as_record(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A throughput, and its standard error."""

    mean: float
    error: float

    @property
    def relative_error(self) -> float:
        """The error as a share of the mean; 1 where nothing came."""
        return self.error / self.mean if self.mean > 0 else 1.0


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """Their mean, each weighted by its certainty.

    Where they differ by more than their errors allow, the error is what their differences say.
    """
    if sum(estimate.mean for estimate in estimates) <= 0:
        return Estimate(mean=0.0, error=0.0)
    weights = [1 / max(e.error, e.mean * _NOISE_FLOOR, 1e-12) ** 2 for e in estimates]
    total = sum(weights)
    mean = sum(w * e.mean for w, e in zip(weights, estimates, strict=True)) / total
    squares = sum(w * (e.mean - mean) ** 2 for w, e in zip(weights, estimates, strict=True))
    spread = max(1.0, squares / (len(estimates) - 1)) if len(estimates) > 1 else 1.0
    return Estimate(mean=mean, error=math.sqrt(spread / total))


class Level:
    """All observations of one level."""

    def __init__(self, max_error_rate: float) -> None:
        self._max_error_rate = max_error_rate
        self.observations: list[Observation] = []
        self._estimate: Estimate | None = None

    def add(self, observation: Observation) -> None:
        """Take in one more try."""
        self.observations.append(observation)
        self._estimate = None

    @property
    def long_enough(self) -> list[Observation]:
        """Those that were not too short."""
        return [one for one in self.observations if not one.is_too_short]

    @property
    def tries(self) -> int:
        """How often it was tried, but for points that were too short; all that there may be, where
        it was given up."""
        is_given_up = self.num_short >= _MAX_SHORT_TRIES
        return len(self.long_enough) or (MAX_TRIES if is_given_up else 0)

    @property
    def num_short(self) -> int:
        """How many points were too short."""
        return sum(one.is_too_short for one in self.observations)

    @property
    def wants_longer(self) -> bool:
        """Whether it is to be tried again, for longer."""
        return self.tries == 0

    @property
    def is_mute(self) -> bool:
        """Whether not even the longest point had an answer."""
        return all(one.is_too_short and one.requests_per_s <= 0 for one in self.observations)

    @property
    def usable(self) -> list[Observation]:
        """Those that were long enough, and not limited by the client; all, if that is none."""
        # The last is the longest: where all are too short, the others would add nothing.
        enough = self.long_enough or self.observations[-1:]
        free = [one for one in enough if not one.is_client_limited]
        return free or enough

    @property
    def is_client_limited(self) -> bool:
        """Whether no try showed the service itself."""
        return all(one.is_client_limited for one in self.usable)

    @property
    def has_errors(self) -> bool:
        """Whether too many requests failed in most tries."""
        return self._is_most(self._fails(one) for one in self.usable)

    @property
    def is_allowed(self) -> bool:
        """Whether most observations had few errors and met the conditions."""
        return not self._is_most(not self._is_good(one) for one in self.usable)

    @property
    def is_doubtful(self) -> bool:
        """Whether one more observation is needed to believe what there is."""
        if self.wants_longer:
            return True
        if not 0 < self.tries < MAX_TRIES:
            return False
        bad = [one for one in self.usable if not self._is_good(one)]
        is_first = self.tries == 1
        return (
            (is_first and self.is_client_limited)
            or (is_first and bool(bad) and not self._is_beyond_doubt(bad[0]))
            or 2 * len(bad) == len(self.usable)
        )

    @property
    def estimate(self) -> Estimate:
        """Kept, because a search compares all levels many times before each step."""
        if self._estimate is None:
            self._estimate = pool(
                [Estimate(mean=o.requests_per_s, error=o.standard_error) for o in self.usable]
            )
        return self._estimate

    @property
    def tokens_per_s(self) -> float:
        """The mean of its tries."""
        return sum(one.tokens_per_s for one in self.usable) / len(self.usable)

    def delivered(self, level: float) -> Estimate:
        """The share of what was offered that was answered; `level` is in requests/s."""
        shares = []
        for one in self.usable:
            offered = one.offered_per_s or level
            error = math.hypot(one.standard_error, one.offered_error)
            shares.append(Estimate(mean=one.requests_per_s / offered, error=error / offered))
        return pool(shares)

    def _fails(self, observation: Observation) -> bool:
        return observation.is_stopped or observation.error_rate > self._max_error_rate

    def _is_good(self, observation: Observation) -> bool:
        return observation.meets_slo and not self._fails(observation)

    def _is_beyond_doubt(self, bad: Observation) -> bool:
        """Whether what is bad in it would be so again: half fails, or a condition is far off."""
        if bad.is_stopped or (self._fails(bad) and bad.error_rate >= _GROSS_ERROR_RATE):
            return True
        return bad.is_gross_violation

    @staticmethod
    def _is_most(votes: Iterable[bool]) -> bool:
        cast = list(votes)
        return 2 * sum(cast) > len(cast)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a search does next: try `level`, or stop for `reason`."""

    level: float | None = None
    reason: StopReason | None = None


class Search:
    """What searches over both kinds of load share: observations, and estimates from them."""

    def __init__(self, *, has_slo: bool, max_error_rate: float, max_points: int) -> None:
        check_count("--max-points", max_points, minimum=1)
        if not 0 <= max_error_rate <= 1:
            raise ConfigError("--max-error-rate", f"must be from 0 to 1, not {max_error_rate:g}")
        self._has_slo = has_slo
        self._max_error_rate = max_error_rate
        self._max_points = max_points
        self._levels: dict[float, Level] = {}

    @property
    def num_points(self) -> int:
        """How many observations there are."""
        return sum(len(level.observations) for level in self._levels.values())

    def length_factor(self, level: float) -> int:
        """How many times longer than usual the next point at `level` should last.

        3 for each point there that was too short. A caller who cannot make it longer may go on all
        the same: a level is given up after four of these, and judged by the last.
        """
        seen = self._levels.get(level)
        return _LENGTHENING**seen.num_short if seen is not None else 1

    def _add(self, level: float, observation: Observation) -> None:
        if level not in self._levels:
            self._levels[level] = Level(self._max_error_rate)
        self._levels[level].add(observation)

    def _usable(self) -> list[float]:
        """Levels whose throughput is the service's own, in order."""
        return sorted(
            level
            for level, seen in self._levels.items()
            if seen.is_allowed and not seen.is_client_limited and not seen.is_mute
        )

    def _estimate(self, level: float) -> Estimate:
        return self._levels[level].estimate

    def _doubtful(self) -> float | None:
        """The lowest level that has to be tried again before anything is made of it."""
        return min(
            (level for level, seen in self._levels.items() if seen.is_doubtful), default=None
        )

    @property
    def _is_mute(self) -> bool:
        """Whether a level never had an answer: nothing that follows would say more."""
        return any(seen.is_mute for seen in self._levels.values())

    def _highest(self, levels: Sequence[float], tolerance: float = TOLERANCE) -> Estimate:
        """The throughput of the best of `levels`, with those that cannot be told from it.

        These are within `tolerance` of it as well: by default it is not known whether they are on
        the plateau. Where it is, 1 keeps the low ones too, as the best is high in part by chance.
        """
        best = max((self._estimate(level) for level in levels), key=lambda one: one.mean)
        alike = [
            one
            for one in map(self._estimate, levels)
            if best.mean - one.mean <= Z_95 * math.hypot(best.error, one.error)
            and one.mean >= (1 - tolerance) * best.mean
        ]
        return pool(alike)

    def _refusal(self, level: float) -> StopReason:
        """Why `level` is not allowed."""
        return StopReason.ERRORS if self._levels[level].has_errors else StopReason.SLO

    def _found(
        self, reason: StopReason, *, is_lower_bound: bool, highest: Estimate | None = None
    ) -> dict[str, Any]:
        """The part of a Saturation that is about throughput and conditions.

        `highest` is what a search knows of the plateau; None: the best levels say it.
        """
        # What a service did while the client was the limit, it can do.
        done = sorted(
            level
            for level, seen in self._levels.items()
            if not seen.has_errors and not seen.is_mute
        )
        allowed = [level for level in done if self._levels[level].is_allowed]
        is_refused = len(allowed) < sum(not seen.is_mute for seen in self._levels.values())
        best = highest or (self._highest(done) if done else None)
        within = self._highest(allowed) if allowed else None
        top = max(done, key=lambda level: self._estimate(level).mean) if done else None
        return {
            "reason": reason,
            "highest_requests_per_s": best.mean if best else None,
            "highest_low": max(0.0, best.mean - Z_95 * best.error) if best else None,
            "highest_high": best.mean + Z_95 * best.error if best else None,
            "highest_tokens_per_s": None if top is None else self._levels[top].tokens_per_s,
            "highest_level": top,
            "slo_level": allowed[-1] if allowed and (self._has_slo or is_refused) else None,
            "slo_requests_per_s": within.mean if within and (self._has_slo or is_refused) else None,
            "is_lower_bound": is_lower_bound,
            "is_slo_lower_bound": self._has_slo
            and reason in (StopReason.PLATEAU, StopReason.LIMIT, StopReason.CLIENT_LIMITED),
            "num_points": self.num_points,
        }


WITHOUT_KNEE = {
    StopReason.PLATEAU: "nothing was measured that counts",
    StopReason.ERRORS: "nothing was measured that counts",
    StopReason.SLO: "the knee is not known: the conditions ended the search before it was clear",
    StopReason.CLIENT_LIMITED: "a lower bound: the load generator saturated, not the service",
    StopReason.LIMIT: "a lower bound: throughput still grew at the highest level",
    StopReason.UNFINISHED: "not known: the search did not come to its end",
}
