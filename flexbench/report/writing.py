"""A report where it was asked for: in the terminal, or in a file."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flexbench import __version__
from flexbench.core.errors import ConfigError, FlexbenchError
from flexbench.core.printable import printable
from flexbench.core.progress import Progress, Silence, progress_console, show_progress
from flexbench.core.results import utc_now
from flexbench.core.whole_files import replace_file
from flexbench.report.comparison import Comparison
from flexbench.report.config import Format, ReportConfig
from flexbench.report.formats.flat import to_csv, to_json
from flexbench.report.formats.markdown import to_markdown
from flexbench.report.making import Report

if TYPE_CHECKING:
    from rich.console import Console

_PAGE_TITLE = "flexbench report"
_WIDTH_OF_FILES = 120
_PLOT_HEIGHT = 20
_NO_PLOTS = "There is nothing in these results that a plot asked for could show."


class _Notes(Silence):
    """No word of how far it is, where nobody watches; notes all the same."""

    def note(self, text: str) -> None:
        """Print `text` to standard error."""
        typer.echo(text, err=True)


@contextmanager
def open_progress() -> Iterator[Progress]:
    """Where a report tells how far it is."""
    console = progress_console()
    if not console.is_terminal:
        yield _Notes()
        return
    with show_progress(console, quiet=False) as progress:
        yield progress


def write(made: Report, config: ReportConfig) -> None:
    """Write a report as it was asked for. Raises FlexbenchError when that is impossible."""
    if config.output_format is Format.TABLE:
        _write_tables(made, config)
    else:
        _write_text(_text(made, config.output_format), config.output)
    if config.save_plots is not None:
        _save_plots(made, config.save_plots)
    if config.output_format not in (Format.TABLE, Format.HTML):
        for note in made.notes:
            typer.echo(note, err=True)


def _text(made: Report, output_format: Format) -> str:
    match output_format:
        case Format.CSV:
            return to_csv(made.tables)
        case Format.JSON:
            return to_json(made.tables)
        case Format.MARKDOWN:
            return to_markdown(made.tables)
        case Format.HTML:
            return _page(made)
        case Format.TABLE:
            raise AssertionError("tables are laid out for the width of a terminal")


def _page(made: Report) -> str:
    from flexbench.report.page.page import PageContent, to_page

    content = PageContent(
        title=_PAGE_TITLE,
        made_at=utc_now(),
        subject=f"{made.subject}.",
        summary=made.summary,
        verdict=made.comparison.verdict if made.comparison is not None else None,
        is_verdict_good=_is_good(made.comparison),
        tables=made.tables,
        charts=made.charts,
        runs=made.runs,
        notes=made.notes,
        num_runs=made.num_runs,
        versions={"flexbench": __version__, "Python": platform.python_version()},
    )
    with open_progress() as progress, progress.phase("Making the page", total=1):
        return to_page(content)


def _is_good(comparison: Comparison | None) -> bool | None:
    return None if comparison is None else not comparison.has_regression


def _write_text(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text)
        return
    try:
        replace_file(output, f"{text}\n".encode())
    except OSError as error:
        raise FlexbenchError(f"{output} cannot be written: {error.strerror or error}") from error
    typer.echo(f"Wrote {output}", err=True)


def _write_tables(made: Report, config: ReportConfig) -> None:
    from rich.console import Console

    if config.output is None:
        _print(made, config, Console())
        return
    import io

    text = io.StringIO()
    _print(made, config, Console(file=text, width=_WIDTH_OF_FILES))
    _write_text(text.getvalue().rstrip("\n"), config.output)


def _print(made: Report, config: ReportConfig, console: Console) -> None:
    from rich.text import Text

    from flexbench.report.formats.terminal import show

    show(made.tables, console)
    if config.plots:
        from flexbench.report.charts.text import to_text

        if not made.charts:
            console.print(f"\n{_NO_PLOTS}")
        for chart in made.charts:
            text = to_text(
                chart,
                width=console.width,
                height=_PLOT_HEIGHT,
                has_color=console.is_terminal and not console.no_color,
                is_unicode=console.encoding.lower().startswith("utf"),
            )
            console.print()
            console.print(Text.from_ansi(text))
    verdict = [made.comparison.verdict] if made.comparison is not None else []
    for sentence in (*verdict, *made.notes):
        console.print()
        console.print(Text(printable(sentence)))


def _save_plots(made: Report, folder: Path) -> None:
    from flexbench.report.charts.images import save_images

    if folder.exists() and not folder.is_dir():
        raise ConfigError("--save-plots", f"{folder} is not a folder")
    if not made.charts:
        typer.echo(_NO_PLOTS, err=True)
    with open_progress() as progress, progress.phase("Drawing", total=1):
        paths = save_images(made.charts, folder)
    for path in paths:
        typer.echo(f"Wrote {path}", err=True)
