"""A chart as data: what is drawn, not how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

MOST_SERIES = 8
"""Of a chart: as many can be told apart by colour, shape and dashes."""
MOST_POINTS = 1000
"""Of a chart: what a page draws without delay."""


class PlotKind(StrEnum):
    """What people can ask for."""

    THROUGHPUT_LATENCY = "throughput-latency"
    THROUGHPUT_CLIENTS = "throughput-clients"
    LATENCY = "latency-distribution"
    TIMELINE = "timeline"
    PREDICTED = "predicted-measured"


class ChartKind(StrEnum):
    """What a reader sees."""

    CURVE = "curve"
    """Points of each series, joined in their order."""
    SCATTER = "scatter"
    """Points beside the line y = x, on which a prediction is right."""
    DISTRIBUTION = "distribution"
    """Shares of values up to x: steps from 0 to 1."""
    TIMELINE = "timeline"
    """One lane a series, bars from `start` to `end`, coloured by what they are."""


class PointMark(StrEnum):
    """What sets a point apart from the others."""

    CLIENT_LIMITED = "client-limited"
    """Drawn hollow: the load generator was the limit, not what was measured."""
    PROJECTED = "projected"
    """Drawn hollow with a broken line: computed from a part that was measured."""
    SATURATION = "saturation"
    """Drawn with a ring: more load brings no more throughput."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis shows."""

    title: str
    unit: str = ""
    is_log: bool = False

    @property
    def full_title(self) -> str:
        """With the unit, where there is one."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point, with an interval of y where one is known, and what to say when it is pointed at."""

    x: float
    y: float
    y_low: float | None = None
    y_high: float | None = None
    label: str = ""
    tag: str = ""
    """A word or number to stand beside it where there is room."""
    mark: PointMark | None = None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A part of a lane of a timeline."""

    what: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Series:
    """What has one colour, or of a timeline one lane."""

    name: str
    points: Sequence[Point] = ()
    bars: Sequence[Bar] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture."""

    name: str
    """Of its files: throughput-latency-dist, timeline-opt-125m-2-stages."""
    kind: ChartKind
    title: str
    description: str
    """What is to be seen, in a sentence or two, for people who cannot see it."""
    x: Axis
    y: Axis
    series: Sequence[Series]
    notes: Sequence[str] = field(default_factory=tuple)
    tag_title: str = ""
    """What the tags of the points are: clients."""
