"""A whole report as one HTML document.

Everything is in the file: styles, scripts, data. A Content-Security-Policy lets it run the scripts
that are written here, which it names by their hashes, and nothing else; it can load nothing. Names
from results files are text wherever they stand: Jinja2 escapes them, and scripts write them as
text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from flexbench.core.printable import printable
from flexbench.report.charts.chart import Chart
from flexbench.report.charts.vega import INTERACTION_HINT
from flexbench.report.page.definitions import about, metrics_used, project_url, terms_used
from flexbench.report.page.details import MOST_RUNS, RunDetails, to_views
from flexbench.report.page.drawings import Drawing, drawings, vega_script
from flexbench.report.page.embedding import content_hash
from flexbench.report.page.grids import Grid, to_grid
from flexbench.report.table import Table

__all__ = ["MOST_RUNS", "PageContent", "RunDetails", "to_page"]

INTRODUCTION = (
    "How fast large language models answered: what flexbench measured, what came of it, and every "
    "run behind the figures."
)


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """What a report says, in the order in which people read it."""

    title: str
    made_at: str
    """When, in words or ISO 8601."""
    introduction: str = INTRODUCTION
    """What this page is, in a sentence for somebody who was sent it."""
    subject: str = ""
    """What was reported on: files and folders, and the baseline."""
    summary: Sequence[str]
    """Sentences, the answer first."""
    verdict: str | None = None
    """Of a comparison, in words."""
    is_verdict_good: bool | None = None
    """Decides the mark beside the verdict; None: it is neither good nor bad."""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    runs: Sequence[RunDetails] = ()
    """Details of the first are shown, as many as a page has room for."""
    num_runs: int | None = None
    """Of which `runs` are the first ones; None: `runs` are all."""
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of flexbench and of what the report was made with."""


def to_page(content: PageContent) -> str:
    """The HTML document. Charts need vl-convert-python, everything else Jinja2 alone."""
    shown_runs = to_views(content.runs)
    num_runs = len(content.runs) if content.num_runs is None else content.num_runs
    drawn = drawings(content.charts)
    scripts = _scripts(drawn)
    style = _own_file("page.css")
    return _template().render(
        content=content,
        made_at=_moment(content.made_at),
        policy=_policy(style, scripts),
        style=Markup(style),  # noqa: S704 - our own file
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        grids=_grids(content.tables, frozenset(run.id for run in shown_runs)),
        drawings=drawn,
        interaction_hint=INTERACTION_HINT,
        runs=shown_runs,
        num_left_out=max(0, num_runs - len(shown_runs)),
        metrics=metrics_used(content.tables, content.charts),
        terms=terms_used(content.tables),
        about=about,
        project_url=project_url(),
    )


def _grids(tables: Sequence[Table], ids_with_details: frozenset[int]) -> list[Grid]:
    return [
        to_grid(table, name=f"table-{number}", ids_with_details=ids_with_details)
        for number, table in enumerate(tables, start=1)
    ]


def _scripts(drawn: Sequence[Drawing]) -> list[str]:
    """Our own script first: tables work before the much larger one has been read."""
    return [_own_file("page.js"), *([vega_script()] if drawn else [])]


def _policy(style: str, scripts: Sequence[str]) -> str:
    """The Content-Security-Policy: what this document may do.

    No 'unsafe-eval': the charts' expressions are interpreted (Vega's `ast` option).
    """
    allowed = " ".join(content_hash(script) for script in scripts)
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {allowed}",
            f"style-src {content_hash(style)}",
            "connect-src 'none'",
            "img-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("flexbench.report.page", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.get_template("page.html.jinja")


def _shown(value: Any) -> Any:
    """What is written for {{ value }}: nothing in a text from a file moves or hides its neighbours.

    Characters that turn the direction of writing are not printable, either.
    """
    if isinstance(value, str) and not isinstance(value, Markup) and not value.isprintable():
        return printable(value)
    return value


@cache
def _own_file(name: str) -> str:
    return files("flexbench.report.page").joinpath(name).read_text(encoding="utf-8")


def _moment(text: str) -> str:
    """A moment in ISO 8601 as people write it, to the minute; other words as they are."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if moment.tzinfo else text
