"""One call of `flexbench server-config`, from the request to what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexbench.server_config.arguments import Request
from flexbench.server_config.config import Machine, resolve_machine
from flexbench.server_config.estimate import estimate
from flexbench.server_config.formats import Answer, Format, to_json, to_markdown
from flexbench.server_config.run_server import run_server_command
from flexbench.server_config.speeds import ComputeSpeed, Network
from flexbench.server_config.warnings import warnings_for

if TYPE_CHECKING:
    from flexbench.core.progress import Progress


def answer(request: Request, progress: Progress) -> list[Answer]:
    """Estimate all that is asked for; measures first if that is asked for, too."""
    is_this_machine = request.measure or not request.dry_run
    machine = resolve_machine(request.config, is_this_machine=is_this_machine)
    compute, network = _speeds(request, machine, progress)
    estimates = estimate(request.config, machine, compute=compute, network=network)
    return [
        Answer(
            estimate=one,
            warnings=warnings_for(request.config, one),
            command=run_server_command(request.config, one, request.entrance),
        )
        for one in estimates
    ]


def _speeds(request: Request, machine: Machine, progress: Progress) -> tuple[ComputeSpeed, Network]:
    """What was given, before what is measured, before what was measured some time ago."""
    config = request.config
    network = config.network or Network()
    measured = ComputeSpeed()
    if request.measure:
        from flexbench.server_config.measure import measure

        measurement = measure(
            config.model,
            machine.setup,
            network=config.network,
            force=request.force,
            timeout_s=request.measure_timeout_s,
            progress=progress,
            log_folder=request.log_folder,
        )
        measured, network = measurement.compute, measurement.network
    elif _is_here(machine):
        measured = _measured_before(request, machine)
    given = (config.forward_rps, config.inference_rps)
    if given == (None, None):
        return measured, network
    sources = ["given", measured.source] if None in given else ["given"]
    return ComputeSpeed(
        forward_rps=config.forward_rps or measured.forward_rps,
        inference_rps=config.inference_rps or measured.inference_rps,
        source=", ".join(source for source in sources if source),
    ), network


def _is_here(machine: Machine) -> bool:
    """Whether the server's device is one of this machine, and not one somebody thinks of."""
    if machine.setup.device_type == "cpu":
        return True
    return any(gpus.source == "detected" for gpus in machine.gpu_sets)


def _measured_before(request: Request, machine: Machine) -> ComputeSpeed:
    from flexbench.server_config.speed_cache import SpeedCache, device_name

    cached = SpeedCache().lookup(request.config.model, machine.setup, device_name(machine.setup))
    return ComputeSpeed() if cached is None else cached.compute


def run(request: Request) -> None:
    """Answer the request, and print the answer to standard output."""
    from rich.console import Console

    from flexbench.core.progress import show_progress

    errors = Console(stderr=True)
    with show_progress(errors, quiet=request.quiet) as progress:
        answers = answer(request, progress)
        if not request.dry_run:
            _look_at_swarm(request, answers[0], progress)
            return
    _print(request, answers)


def _print(request: Request, answers: Sequence[Answer]) -> None:
    import typer
    from rich.console import Console

    if request.output_format is Format.JSON:
        typer.echo(to_json(answers))
    elif request.output_format is Format.MARKDOWN:
        typer.echo(to_markdown(answers))
    else:
        from flexbench.server_config.tables import print_answers

        print_answers(Console(), answers)


def _look_at_swarm(request: Request, answer: Answer, progress: Progress) -> None:
    raise NotImplementedError
