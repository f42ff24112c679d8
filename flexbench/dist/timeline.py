"""When a stage computed, and when it stood still, and for what: one lane of a picture."""

from __future__ import annotations

from flexbench.core.timeline import What

Span = tuple[str, float, float]
# A record is to stay readable: 500 waits are some hundred tokens of a pipeline.
_MAX_WAITS = 500
# Shorter ones cannot be seen, and are what looking at the clock costs.
_SHORTEST_S = 20e-6
_DECIMALS = 6


class Timeline:
    """The waits of one call of `generate`, in the order in which they ended."""

    def __init__(self) -> None:
        self._waits: list[tuple[What, float, float]] = []
        self._is_full = False

    def add(self, what: What, begun_at: float, ended_at: float) -> None:
        """Note a wait, between two moments of one clock. After the first 500 none is noted."""
        if ended_at - begun_at < _SHORTEST_S:
            return
        self._is_full = len(self._waits) == _MAX_WAITS
        if not self._is_full:
            self._waits.append((what, begun_at, ended_at))

    def spans(self, started_at: float, ended_at: float) -> tuple[Span, ...]:
        """All of the time, or of the part that was noted, in seconds from `started_at`.

        Between waits the stage computed. A wait within another one is a part of that.
        """
        spans: list[Span] = []
        reached = started_at
        for what, begin, end in sorted(self._waits, key=lambda wait: wait[1]):
            if end <= reached:
                continue
            if begin > reached:
                spans.append(_span(What.COMPUTING, reached, begin, started_at))
            spans.append(_span(what, max(begin, reached), end, started_at))
            reached = end
        if ended_at > reached and not self._is_full:
            spans.append(_span(What.COMPUTING, reached, ended_at, started_at))
        return tuple(spans)


def _span(what: What, begin: float, end: float, started_at: float) -> Span:
    return str(what), round(begin - started_at, _DECIMALS), round(end - started_at, _DECIMALS)
