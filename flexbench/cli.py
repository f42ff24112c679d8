"""The `flexbench` command: where the commands are registered, and errors become exit codes."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flexbench import __version__
from flexbench.core.errors import FlexbenchError, Interrupted
from flexbench.core.options import MultiValueCommand
from flexbench.petals.command import petals_command
from flexbench.report.command import report_command


class FlexbenchGroup(TyperGroup):
    """Shows a FlexbenchError as a message, not a traceback, and exits with its code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            error: FlexbenchError = Interrupted(signal.SIGINT)
        except FlexbenchError as raised:
            error = raised
        _show(error)
        raise typer.Exit(error.exit_code)


def _show(error: FlexbenchError) -> None:
    # Plain text: a message may hold paths and peers' words, which are not markup.
    prefix = "" if isinstance(error, Interrupted) else "Error: "
    typer.echo(f"{prefix}{error.message}", err=True)
    if error.details:
        typer.echo(f"\n{error.details}", err=True)


app = typer.Typer(
    name="flexbench",
    cls=FlexbenchGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("petals", cls=MultiValueCommand)(petals_command)
app.command("report")(report_command)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"flexbench {__version__}")
        raise typer.Exit


@app.callback()
def flexbench(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Measure, size and compare LLM inference that is spread over machines."""


def main() -> None:
    """Entry point of the `flexbench` script."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Interrupted as error:
        sys.exit(error.exit_code)


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted(signal.SIGTERM)
