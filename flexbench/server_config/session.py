"""One call of `flexbench server-config`, from the request to what is printed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from flexbench.core.errors import ConfigError
from flexbench.core.results import RecordsFile
from flexbench.server_config.addresses import resolve_entrance
from flexbench.server_config.arguments import Request
from flexbench.server_config.caveats import warnings_for
from flexbench.server_config.config import Machine, ServerConfig, resolve_machine
from flexbench.server_config.estimate import Estimate, estimate
from flexbench.server_config.formats import Answer
from flexbench.server_config.printing import FindingPrinter, print_answers
from flexbench.server_config.run_server import run_server_command
from flexbench.server_config.speeds import ComputeSpeed, Network

if TYPE_CHECKING:
    from flexbench.core.progress import Progress


def answer(request: Request, progress: Progress) -> list[Answer]:
    """Estimate all that is asked for; measures first if that is asked for, too."""
    machine, estimates = estimates_of(request, progress)
    return [
        Answer(
            estimate=one,
            warnings=warnings_for(request.config, machine, one),
            command=run_server_command(request.config, one, request.entrance),
        )
        for one in estimates
    ]


def estimates_of(request: Request, progress: Progress) -> tuple[Machine, tuple[Estimate, ...]]:
    """The machine that the request is about, and an estimate for each size of its GPU."""
    is_this_machine = request.measure or not request.dry_run
    machine = resolve_machine(request.config, is_this_machine=is_this_machine)
    compute, network = _speeds(request, machine, progress)
    return machine, estimate(request.config, machine, compute=compute, network=network)


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
            needs_compute=None in (config.forward_rps, config.inference_rps),
            force=request.force,
            timeout_s=request.measure_timeout_s,
            progress=progress,
            log_folder=request.log_folder,
        )
        measured, network = measurement.compute, measurement.network
        if measurement.is_cached:
            note = f"{measured.source}; --force measures again"
            measured = replace(measured, source=note)
    elif _is_here(machine):
        measured, network_before = _measured_before(request, machine)
        network = config.network or network_before or network
    return _with_given(config, measured), network


def _with_given(config: ServerConfig, measured: ComputeSpeed) -> ComputeSpeed:
    """What the person says, in place of what was measured."""
    given = {
        name: value
        for name, value in (
            ("forward", config.forward_rps),
            ("inference", config.inference_rps),
        )
        if value is not None
    }
    sources = [f"{' and '.join(given)} given"] if given else []
    if measured.source and len(given) < 2:
        sources.append(measured.source)
    return ComputeSpeed(
        forward_rps=given.get("forward", measured.forward_rps),
        inference_rps=given.get("inference", measured.inference_rps),
        source="; ".join(sources) or None,
    )


def _is_here(machine: Machine) -> bool:
    """Whether the server's device is one of this machine, and not one somebody thinks of."""
    if machine.setup.device_type == "cpu":
        return True
    return any(gpus.source == "detected" for gpus in machine.gpu_sets)


def _measured_before(request: Request, machine: Machine) -> tuple[ComputeSpeed, Network | None]:
    from flexbench.server_config.speed_cache import SpeedCache, device_name

    name = device_name(machine.setup)
    cache = SpeedCache()
    speed = cache.lookup(request.config.model, machine.setup, name)
    network = cache.lookup_network()
    return (
        ComputeSpeed() if speed is None else speed.compute,
        None if network is None else network.network,
    )


def run(request: Request) -> None:
    """Answer the request, and print the answer to standard output."""
    from flexbench.core.progress import progress_console, show_progress

    # What run_server would refuse is not to be in a command that is printed, either.
    resolve_entrance(request.entrance, listens=not request.dry_run)
    with show_progress(progress_console(), quiet=request.quiet) as progress:
        if request.dry_run:
            answers = answer(request, progress)
        else:
            _look_at_swarm(request, progress)
            return
    print_answers(request.output_format, answers)


def _look_at_swarm(request: Request, progress: Progress) -> None:
    from flexbench.petals_runtime.requirement import ensure_petals_installed
    from flexbench.server_config.addresses import check_ports
    from flexbench.server_config.launch import check_launch
    from flexbench.server_config.live import run_live

    ensure_petals_installed()
    records = RecordsFile(request.output)
    if request.launch:
        records.check()
        check_launch(request.config)
    # Before anything is measured: wrong input is to be told at once.
    check_ports(resolve_entrance(request.entrance, listens=True))
    machine, estimates = estimates_of(request, progress)
    if len(estimates) > 1:
        raise ConfigError("--gpu-memory", "a sweep needs --dry-run: one server joins a swarm")
    run_live(
        request.config,
        machine,
        estimates[0],
        request.entrance,
        connect_timeout_s=request.connect_timeout_s,
        server_timeout_s=request.server_timeout_s,
        launches=request.launch,
        progress=progress,
        log_folder=request.log_folder,
        show=FindingPrinter(request.output_format).show,
        save=records.append,
    )
