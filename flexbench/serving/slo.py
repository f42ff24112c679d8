"""Conditions that a service has to meet: `ttft:p99<200ms`, `errors<1%`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexbench.core.errors import ConfigError
from flexbench.core.units import parse_seconds
from flexbench.serving.figures import (
    NS_PER_S,
    PointFigures,
    distribution,
    e2e_ns,
    gaps_ns,
    tpot_ns,
    ttft_ns,
)
from flexbench.serving.traces import RequestTrace

ERRORS = "errors"
LATENCY_METRICS = ("ttft", "itl", "tpot", "e2e", "ttft_scheduled", "e2e_scheduled")
STATISTICS = ("p50", "p90", "p95", "p99", "p99.9", "mean", "max")
STREAMING_METRICS = frozenset({"ttft", "itl", "tpot", "ttft_scheduled"})
_OPTION = "--slo"
_CONDITION = re.compile(
    r"(?P<metric>\w+)\s*(?::\s*(?P<statistic>[\w.]+)\s*)?(?P<operator><=?)\s*(?P<limit>[^<>=\s].*)",
    re.ASCII,
)
_SHARE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition. `limit` is in seconds, or a share of the requests where `metric` is errors."""

    metric: str
    statistic: str | None
    """One of STATISTICS; None of errors."""
    limit: float
    is_limit_allowed: bool
    """Whether the limit itself is still good: <= instead of <."""

    def __str__(self) -> str:
        subject = self.metric if self.statistic is None else f"{self.metric}:{self.statistic}"
        return f"{subject}{'<=' if self.is_limit_allowed else '<'}{self._in_words(self.limit, 12)}"

    def is_met_by(self, value: float) -> bool:
        """Whether `value`, in the unit of the limit, is good enough."""
        return value <= self.limit if self.is_limit_allowed else value < self.limit

    def violation(self, figures: PointFigures) -> str | None:
        """What is wrong, in words with both numbers; None when the condition is met."""
        subject = "error rate" if self.statistic is None else f"{self.metric} {self.statistic}"
        value = self._value(figures)
        if value is None:
            return f"{subject} is not known: no request gave it"
        if self.is_met_by(value):
            return None
        wanted = "at most" if self.is_limit_allowed else "below"
        return f"{subject} is {self._in_words(value)}, not {wanted} {self._in_words(self.limit)}"

    def is_met_by_request(self, trace: RequestTrace) -> bool:
        """Whether one answer is good enough by itself.

        A request has one figure of each kind, which the limit holds for whatever the statistic. Of
        ITL it has many: the statistic is taken over its own gaps. A figure that an answer cannot
        have, such as the gaps of a single chunk, is no reason to find fault with it.
        """
        if self.metric == ERRORS:
            return trace.is_ok
        value = self._value_of_request(trace)
        return value is None or self.is_met_by(value)

    def _value(self, figures: PointFigures) -> float | None:
        if self.statistic is None:
            return figures.error_rate
        latencies = figures.latency(self.metric)
        return None if latencies is None else latencies.statistic(self.statistic)

    def _value_of_request(self, trace: RequestTrace) -> float | None:
        if self.metric == "itl":
            assert self.statistic is not None
            gaps = distribution(gaps_ns(trace))
            return None if gaps is None else gaps.statistic(self.statistic)
        kind, _, is_scheduled = self.metric.partition("_")
        value = {"ttft": ttft_ns, "e2e": e2e_ns, "tpot": tpot_ns}[kind](trace)
        if value is None or trace.sent_ns is None:
            return None
        late = trace.sent_ns - trace.scheduled_ns if is_scheduled else 0
        return (value + late) / NS_PER_S

    def _in_words(self, value: float, digits: int = 4) -> str:
        """By default with so many that 200.4 ms is not told to be above 200 ms as '200 ms'."""
        if self.statistic is None:
            return f"{value * 100:.{digits}g}%"
        if value < 1e-3:
            return f"{value * 1e6:.{digits}g}us"
        return f"{value * 1e3:.{digits}g}ms" if value < 1 else f"{value:.{digits}g}s"


def parse_slo(texts: str | Iterable[str]) -> tuple[Condition, ...]:
    """Conditions from what --slo was given: each text has one, or several between commas.

    Raises ConfigError naming --slo, which says what is accepted.
    """
    given = [texts] if isinstance(texts, str) else texts
    return tuple(_parse(part.strip()) for text in given for part in text.split(","))


def check_measurable(conditions: Iterable[Condition], *, is_streaming: bool) -> None:
    """Raise ConfigError for a condition on a figure that there will not be."""
    for condition in conditions:
        if condition.metric in STREAMING_METRICS and not is_streaming:
            raise ConfigError(
                _OPTION,
                f"{condition}: there is no {condition.metric} without --streaming; e2e is there",
            )


def check(conditions: Iterable[Condition], figures: PointFigures) -> list[str]:
    """What a point violates, in words; empty when it meets all."""
    violations = (condition.violation(figures) for condition in conditions)
    return [violation for violation in violations if violation is not None]


def meets(trace: RequestTrace, conditions: Sequence[Condition]) -> bool:
    """Whether one request counts for goodput: answered, and within every condition."""
    return trace.is_ok and all(condition.is_met_by_request(trace) for condition in conditions)


def _parse(text: str) -> Condition:
    match = _CONDITION.fullmatch(text.lower())
    if match is None:
        raise ConfigError(
            _OPTION,
            f"{text!r} is no condition; write it like ttft:p99<200ms, tpot:mean<=0.05s, errors<1%",
        )
    metric, statistic = match["metric"], match["statistic"]
    is_limit_allowed = match["operator"] == "<="
    if metric == ERRORS and statistic is None:
        limit = _parse_share(text, match["limit"])
    elif metric in LATENCY_METRICS and statistic in STATISTICS:
        limit = _parse_limit(text, match["limit"])
    elif metric in LATENCY_METRICS:
        raise ConfigError(
            _OPTION, f"{text!r} needs one of {', '.join(STATISTICS)}, as in {metric}:p99<200ms"
        )
    else:
        raise ConfigError(
            _OPTION,
            f"{text!r} is about none of {', '.join(LATENCY_METRICS)} with one of "
            f"{', '.join(STATISTICS)}, nor about errors; an example: ttft:p99<200ms,errors<1%",
        )
    return Condition(
        metric=metric, statistic=statistic, limit=limit, is_limit_allowed=is_limit_allowed
    )


def _parse_limit(condition: str, text: str) -> float:
    try:
        limit = parse_seconds(_OPTION, text)
    except ConfigError as error:
        raise ConfigError(_OPTION, f"{condition!r}: the limit {error.problem}") from error
    if limit <= 0:
        raise ConfigError(_OPTION, f"{condition!r}: the limit must be above 0")
    return limit


def _parse_share(condition: str, text: str) -> float:
    match = _SHARE.fullmatch(text)
    share = float(match[1]) / (100 if match[2] else 1) if match is not None else -1.0
    if not 0 <= share <= 1:
        raise ConfigError(
            _OPTION, f"{condition!r}: the limit must be a share such as 1% or 0.01, not {text!r}"
        )
    return share
