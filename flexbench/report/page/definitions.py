"""Which definitions a page needs, of figures and of words, and where the whole list is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata

from flexbench.core.metrics import METRICS, Metric
from flexbench.report.charts.chart import Chart
from flexbench.report.table import Table

# How a project names the place of its source, best first.
_LABELS = ("repository", "source", "homepage")
_FIGURE_COLUMN = "figure"
_ROWS_WITH_WORDS = 200
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")

MEASURES = {
    "petals": (
        "A Petals swarm: servers hold parts of the model, and clients generate with it at the "
        "same time."
    ),
    "dist": (
        "OPT models whose weights, cache and activations are spread over GPU, host memory and "
        "disk, in one process or as a pipeline of several."
    ),
    "serving": "A serving endpoint under load: requests over HTTP, as its users send them.",
    "predictions": (
        "What flexbench server-config said of Petals servers before they were started, beside "
        "what they turned out to be."
    ),
    "systems": "The best runs of each system with the same model, prompt and new tokens.",
    "comparison": "Every figure beside that of the same configuration in the baseline.",
}
"""What a table is about, by the system of its runs, or by its name."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """A word that results use, and what it means."""

    name: str
    meaning: str
    sign: str = ""
    """The word it is recognized by, if it is another."""


TERMS = (
    Term(name="petals", meaning=MEASURES["petals"]),
    Term(name="dist", meaning=MEASURES["dist"]),
    Term(name="serving", meaning=MEASURES["serving"]),
    Term(name="server-config", meaning=MEASURES["predictions"]),
    Term(name="batch", meaning="How many prompts are generated together, in one request."),
    Term(
        name="micro",
        meaning="Micro-batches: requests of each client, or batches that go through a pipeline.",
    ),
    Term(name="procs", meaning="Processes at once: clients of a swarm, ranks of a pipeline."),
    Term(name="prompt", meaning="Tokens of a prompt, which the model reads."),
    Term(name="new", meaning="Tokens of an answer, which the model generates."),
    Term(
        name="dummy weights",
        meaning=(
            "Weights of random numbers: they take as long as real ones, and what is generated "
            "means nothing."
        ),
        sign="dummy",
    ),
    Term(name="projected", meaning="Computed from a part that was measured, not measured itself."),
)


def terms_used(tables: Sequence[Table]) -> list[Term]:
    """The words that stand in titles, headings, captions or cells of these tables."""
    words = set(_WORD.findall("\n".join(_texts(tables)).casefold()))
    return [term for term in TERMS if (term.sign or term.name) in words]


def _texts(tables: Sequence[Table]) -> Iterator[str]:
    for table in tables:
        shown = [column for column in table.columns if column.is_shown]
        yield table.title
        yield table.caption
        yield from (column.heading for column in shown)
        for row in table.rows[:_ROWS_WITH_WORDS]:
            values = (row.values.get(column.name) for column in shown)
            yield from (value for value in values if isinstance(value, str))
        if table.name == "predictions":
            yield "server-config"


def about(table: Table) -> str:
    """What a table is about, in a sentence; "" where nobody knows."""
    if table.name in MEASURES:
        return MEASURES[table.name]
    systems = {str(row.values.get("system")) for row in table.rows[:_ROWS_WITH_WORDS]}
    return MEASURES.get(systems.pop(), "") if len(systems) == 1 else ""


def metrics_used(tables: Sequence[Table], charts: Sequence[Chart]) -> list[Metric]:
    """The figures that stand in columns, rows or on axes; all if none can be told."""
    names = {name for text in _names(tables) if (name := _metric_name(text)) is not None}
    titles = {axis.title.casefold() for chart in charts for axis in (chart.x, chart.y)}
    used = [m for m in METRICS if m.name in names or m.label.casefold() in titles]
    return used or list(METRICS)


def _names(tables: Sequence[Table]) -> Iterator[str]:
    for table in tables:
        for column in table.columns:
            yield column.name
            if column.name == _FIGURE_COLUMN:
                yield from {str(row.values.get(column.name)) for row in table.rows}


def _metric_name(text: str) -> str | None:
    """Of "ttft_p99" "ttft"; of "ttft_scheduled_p99" the longer name."""
    found = [m.name for m in METRICS if text == m.name or text.startswith(f"{m.name}_")]
    return max(found, key=len, default=None)


def project_url() -> str | None:
    """Where the project lives, as its package says; None if it does not."""
    try:
        entries = metadata("flexbench").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    urls = {}
    for entry in entries:
        label, _, url = str(entry).partition(",")
        urls[label.strip().casefold()] = url.strip()
    found = (urls[label] for label in _LABELS if urls.get(label, "").startswith("https://"))
    return next(found, None)
