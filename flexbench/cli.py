"""The `flexbench` command: where the commands are registered, and errors become exit codes."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from flexbench import __version__
from flexbench.core.errors import FlexbenchError, Interrupted, RegressionFoundError
from flexbench.core.options import QuickParsing
from flexbench.core.printable import printable_lines

# Name, the module whose `app` is a Typer app with this one command, and its line in the overview. A
# module is imported when its command is used: `flexbench --help` has to wait for none of them.
COMMANDS = {
    "petals": (
        "flexbench.petals.command",
        "Measure a Petals swarm with many clients at once.",
    ),
    "dist": (
        "flexbench.dist.command",
        "Measure OPT inference with offloading, as a pipeline of processes.",
    ),
    "server-config": (
        "flexbench.server_config.command",
        "Size a Petals server: blocks, memory and throughput before it is started.",
    ),
    "serving": (
        "flexbench.serving.command",
        "Load a serving endpoint: throughput-latency curves, saturation.",
    ),
    "report": (
        "flexbench.report.command",
        "Summarize, compare and draw results: tables, plots, one HTML page, a verdict.",
    ),
}


class LazyCommand(TyperCommand):
    """Stands for a command in the overview, and becomes the real one when it is used."""

    def __init__(self, name: str, module: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self._module = module

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Import the real command and let it parse its arguments."""
        command = get_command(import_module(self._module).app)
        return command.make_context(info_name, args, parent, **extra)


class FlexbenchGroup(QuickParsing, TyperGroup):
    """All commands; a FlexbenchError becomes a message, not a traceback, and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """The names, in the order of the overview."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> LazyCommand | None:  # noqa: ARG002
        """The command of this name, not yet imported."""
        if cmd_name not in COMMANDS:
            return None
        return LazyCommand(cmd_name, *COMMANDS[cmd_name])

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
    if error.is_shown:
        return
    # Plain text: a message may hold paths and peers' words, which are not markup.
    is_error = not isinstance(error, Interrupted | RegressionFoundError)
    prefix = "Error: " if is_error else ""
    typer.echo(f"{prefix}{printable_lines(error.message)}", err=True)
    if error.details:
        typer.echo(f"\n{printable_lines(error.details)}", err=True)


app = typer.Typer(
    name="flexbench",
    cls=FlexbenchGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    # Under nohup, say, SIGHUP is ignored, and is to stay so.
    numbers = [
        number
        for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN
    ]
    for number in numbers:
        signal.signal(number, _on_stop)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Interrupted as error:
        sys.exit(error.exit_code)
    finally:
        # From here on there is nothing to stop in order: a signal just ends the process.
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _on_stop(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)
