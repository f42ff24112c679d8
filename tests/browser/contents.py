"""Reports to open in a browser."""

from __future__ import annotations

from flexbench.report.charts.chart import Axis, Bar, Chart, ChartKind, Point, Series
from flexbench.report.page.page import PageContent, RunDetails
from flexbench.report.table import Column, Kind, Row, Table

# As texts they would stand in another order: "104" first, and "9.5" before "9.25" where whole numbers
# in texts are compared as such.
THROUGHPUTS = (22.5, 104.0, None, 9.5, 9.25)
SYSTEMS = ("petals", "dist", "serving", "petals", "dist")

COLUMNS = (
    Column(name="system", heading="system", kind=Kind.TEXT),
    Column(name="sequence_length", heading="prompt", kind=Kind.COUNT),
    Column(name="throughput", heading="tok/s\nmean", help="tokens per second"),
    Column(name="change", heading="change", kind=Kind.CHANGE),
)


def report(**changes) -> PageContent:
    """Five rows of three systems, seven runs."""
    rows = [
        Row(
            values={
                "system": system,
                "sequence_length": 2**number,
                "throughput": throughput,
                "change": (number - 2) / 10,
            },
            best=frozenset({"throughput"} if throughput == max(filter(None, THROUGHPUTS)) else ()),
            run_ids=(1, 2) if number == 0 else (number + 2,),
            is_mixed=number == 3,
        )
        for number, (system, throughput) in enumerate(zip(SYSTEMS, THROUGHPUTS, strict=True))
    ]
    table = Table(
        name="runs",
        title="Runs by configuration",
        columns=COLUMNS,
        rows=rows,
        caption="All runs: model bigscience/bloom-560m, 32 new tokens.",
        notes=["The published figures are not measured here."],
    )
    known = {
        "title": "Report on 7 runs",
        "made_at": "2026-01-02 03:04 UTC",
        "summary": ["dist gives the highest throughput: 104 tokens/s.", "7 runs, 3 systems."],
        "verdict": "dist is slower than before: -12.0 % (-14.1 % to -9.8 %)",
        "is_verdict_good": False,
        "tables": [table],
        "runs": [run(number) for number in range(1, 7)],
        "notes": ["2 malformed lines were skipped."],
        "versions": {"flexbench": "1.2.3"},
    }
    return PageContent(**{**known, **changes})


def run(number: int, title: str = "", source: str = "") -> RunDetails:
    """A run whose concurrency is its number."""
    return RunDetails(
        id=number,
        title=title or f"petals, {2**number} prompt tokens",
        source=source or f"results/petals.jsonl:{number}",
        details={
            "schema_version": 1,
            "system": "petals",
            "configuration": {"load": {"concurrency": number}, "model": "bigscience/bloom-560m"},
            "environment": {"python": "3.11.9", "cpu": "x86_64", "num_cpus": 2, "gpus": []},
            "figures": {"throughput": 20.0 + number, "ttft": {"p50": 0.25, "p99": None}},
        },
    )


def charts(name: str = "petals") -> list[Chart]:
    """One of each kind; `name` stands wherever a name from a file does."""
    curve = [Point(x=n, y=10.0 * n, y_low=9.0 * n, y_high=11.0 * n, label=name) for n in (1, 2, 4)]
    other = [Point(x=n, y=6.0 * n) for n in (1, 2, 4)]
    latency = Axis(title="Time to first token", unit="s")
    return [
        Chart(
            name="throughput",
            kind=ChartKind.CURVE,
            title=f"Throughput by clients: {name}",
            description="Throughput grows with the clients.",
            x=Axis(title="clients", is_log=True),
            y=Axis(title=f"Throughput of {name}", unit="tokens/s"),
            series=[Series(name=name, points=curve), Series(name="other", points=other)],
            notes=[f"The bars are 95 % intervals of {name}."],
        ),
        Chart(
            name="predictions",
            kind=ChartKind.SCATTER,
            title="Predicted and measured",
            description="Predictions are near the line.",
            x=Axis(title="predicted", unit="tokens/s"),
            y=Axis(title="measured", unit="tokens/s"),
            series=[Series(name=name, points=curve)],
        ),
        Chart(
            name="latencies",
            kind=ChartKind.DISTRIBUTION,
            title="Latencies",
            description="Half of the requests wait less than 0.2 s.",
            x=latency,
            y=Axis(title="share of requests"),
            series=[
                Series(
                    name=name,
                    points=[Point(x=0.1 * n, y=n / 10, label=f"p{10 * n}") for n in range(1, 11)],
                )
            ],
        ),
        Chart(
            name="timeline-1",
            kind=ChartKind.TIMELINE,
            title="Stages of a run",
            description="The second stage waits for the first.",
            x=Axis(title="time", unit="s"),
            y=Axis(title="rank"),
            series=[
                Series(name=f"0 {name}", bars=[Bar(what="compute", start=0.0, end=1.0)]),
                Series(
                    name="1",
                    bars=[
                        Bar(what="waiting", start=0.0, end=1.0),
                        Bar(what="compute", start=1.0, end=2.0),
                    ],
                ),
            ],
        ),
    ]
