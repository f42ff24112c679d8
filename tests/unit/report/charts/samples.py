"""One chart of each kind, as the tests of all ways to draw need them."""

from __future__ import annotations

from flexbench.report.charts.chart import Axis, Bar, Chart, ChartKind, Point, PointMark, Series
from tests.unit.report.charts.runs import HOSTILE


def curve(*, names=("first", "second"), is_log=False, tags=True):
    def points(shift):
        return [
            Point(
                x=12.0 * load + shift,
                y=1.0 + load / 4 + shift,
                y_low=1.0 + load / 4 + shift - 0.2 if load == 2 else None,
                y_high=1.0 + load / 4 + shift + 0.3 if load == 2 else None,
                label=f"{load} clients, 1 run",
                tag=str(load) if tags else "",
                mark={4: PointMark.SATURATION, 8: PointMark.CLIENT_LIMITED}.get(load),
            )
            for load in (1, 2, 4, 8)
        ]

    return Chart(
        name="throughput-latency-petals",
        kind=ChartKind.CURVE,
        title="Throughput and mean latency: petals",
        description="Throughput rises from 12 to 96 tokens/s between 1 client and 8 clients.",
        x=Axis(title="Throughput", unit="tokens/s"),
        y=Axis(title="Mean latency", unit="s", is_log=is_log),
        series=[
            Series(name=name, points=points(3.0 * number)) for number, name in enumerate(names)
        ],
        notes=["All: petals, bigscience/bloom-560m.", "Hollow points: the load generator."],
    )


def scatter():
    return Chart(
        name="predicted-measured-1",
        kind=ChartKind.SCATTER,
        title="Predicted and measured: figures in tokens/s",
        description="Network: 2 servers, predicted 5.0 % too high (median).",
        x=Axis(title="Measured", unit="tokens/s", is_log=True),
        y=Axis(title="Predicted", unit="tokens/s", is_log=True),
        series=[
            Series(
                name="Network", points=[Point(x=100.0, y=110.0, label="a"), Point(x=9.0, y=9.0)]
            ),
            Series(name="Forward", points=[Point(x=4000.0, y=3000.0, label="b")]),
        ],
    )


def distribution(*, is_log=False):
    return Chart(
        name="latency-distribution-petals",
        kind=ChartKind.DISTRIBUTION,
        title="Distribution of latency: petals",
        description="Half of the requests took up to 2 s.",
        x=Axis(title="Request latency", unit="s", is_log=is_log),
        y=Axis(title="Share of requests"),
        series=[
            Series(
                name=name,
                points=[Point(x=1.0 * k, y=0.0)]
                + [Point(x=k * (n + 1.0), y=(n + 1) / 10, label=f"{n}") for n in range(10)],
            )
            for k, name in ((1, "1 client"), (5, "4 clients"))
        ],
    )


def timeline():
    return Chart(
        name="timeline-1",
        kind=ChartKind.TIMELINE,
        title="Stages of facebook/opt-125m: what each rank did when",
        description="2 ranks in 10 s.",
        x=Axis(title="Time", unit="s"),
        y=Axis(title=""),
        series=[
            Series(
                name="rank 0",
                bars=[
                    Bar(what="loading", start=0.0, end=2.0),
                    Bar(what="computing", start=2.0, end=8.0),
                    Bar(what="sending", start=8.0, end=10.0),
                ],
            ),
            Series(
                name="rank 1",
                bars=[
                    Bar(what="waiting", start=0.0, end=5.0),
                    Bar(what="computing", start=5.0, end=10.0),
                ],
            ),
        ],
        notes=["Bubble: 25.0 % measured."],
    )


def empty():
    """What no report makes, but nobody forbids."""
    return Chart(
        name="empty",
        kind=ChartKind.CURVE,
        title="Empty",
        description="Nothing.",
        x=Axis(title="x"),
        y=Axis(title="y"),
        series=[],
    )


def hostile():
    return curve(names=(HOSTILE, "{{ expr }}", "__proto__", "datum.x > 1 ? 'a' : 'b'"))


def extreme(*, kind=ChartKind.CURVE, is_log=False):
    """The smallest and the largest numbers there are."""
    axis = Axis(title="x", is_log=is_log)
    points = [Point(x=5e-324, y=1.7e308), Point(x=1.0, y=1.0), Point(x=1.7e308, y=5e-324)]
    return Chart(
        name=f"extreme-{kind}-{is_log}",
        kind=kind,
        title="Extreme",
        description="Everything.",
        x=axis,
        y=axis,
        series=[Series(name="one", points=points)],
    )


EXTREME = (
    extreme(),
    extreme(is_log=True),
    extreme(kind=ChartKind.SCATTER, is_log=True),
    extreme(kind=ChartKind.DISTRIBUTION, is_log=True),
)
ALL = (
    curve(),
    curve(is_log=True),
    scatter(),
    distribution(),
    distribution(is_log=True),
    timeline(),
)
