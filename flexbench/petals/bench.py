"""The benchmark: open a swarm, send clients through it, keep what they measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from flexbench.core import environment
from flexbench.core.errors import FlexbenchError
from flexbench.core.processes import Crew, Deadline, Finished, Item, Ready, Worker
from flexbench.core.progress import Phase, Progress, Silence
from flexbench.core.results import (
    RECORD_SCHEMA_VERSION,
    ResultRow,
    ResultsFile,
    mixed_results_note,
    utc_now,
)
from flexbench.petals.client import run_client
from flexbench.petals.config import PetalsConfig, RunShape
from flexbench.petals.measurement import Load, Measurement
from flexbench.petals.model import SwarmModel
from flexbench.petals.plan import Plan
from flexbench.petals.swarm import look_at_swarm, open_swarm
from flexbench.petals_runtime.crew import open_crew

PACKAGES = ("petals", "hivemind", "torch", "transformers")


class BenchArguments(Protocol):
    """What `run_bench` reads of its first argument, as FlexGen's script parses it."""

    batch_size: int
    num_micro_batches: int
    num_processes: int
    output: str | Path


@dataclass(frozen=True, kw_only=True)
class TimeLimits:
    """How long the phases of a run may take, in seconds."""

    warmup_s: float = 600.0
    run_s: float = 3600.0


def run_bench(
    args: BenchArguments, sequence_length: int, max_tokens: int, config_bloom: Any
) -> ResultRow:
    """Measure one configuration and append it to the results file `args.output`.

    `args` has batch_size, num_micro_batches, num_processes and output. `config_bloom` is Petals'
    DistributedBloomConfig, or a SwarmModel from which it is made. Starts num_processes clients,
    waits for their warm-up, releases them together, and collects their latencies. Returns the row.
    Raises ConfigError for an output that cannot be written or counts that make no run, RunError
    when the swarm is not complete or the run failed; then nothing is appended to the TSV, and the
    record says what happened.
    """
    load = Load(
        num_processes=args.num_processes,
        num_micro_batches=args.num_micro_batches,
        batch_size=args.batch_size,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
    )
    results = ResultsFile(Path(args.output))
    results.check()
    model = SwarmModel.of(config_bloom)
    with open_crew() as crew:
        view = look_at_swarm(crew, model, timeout_s=model.connect_timeout_s)
        return _measure_and_save(
            crew,
            load,
            config_bloom,
            results=results,
            description=_describe(model) | {"swarm": asdict(view)},
            limits=TimeLimits(),
            progress=Silence(),
        )


def run_benchmark(
    plan: Plan, *, log_folder: Path | None = None, progress: Progress
) -> list[ResultRow]:
    """Measure every run of the plan, on the swarm it names, and append each to the results.

    Logs go to `log_folder`; without one, to a temporary folder that is kept only on failure. Raises
    ConfigError before anything starts, RunError when a run failed, Interrupted when told to stop;
    what was measured before is in the results by then.
    """
    config = plan.config
    results = ResultsFile(config.output)
    results.check()
    _warn_of_other_subject(results, plan, progress)
    limits = TimeLimits(warmup_s=config.warmup_timeout_s, run_s=config.run_timeout_s)
    with open_swarm(plan, log_folder=log_folder, progress=progress) as swarm:
        description = _describe(swarm.model) | {
            "configuration": _configuration(plan),
            "swarm": asdict(swarm.view) | {"embedded": config.is_embedded},
            "swarm_startup_s": swarm.startup_s,
        }
        return [
            _measure_and_save(
                swarm.crew,
                _load(config, run),
                swarm.model,
                results=results,
                description=description,
                limits=limits,
                progress=progress,
                title=f"Run {number}/{len(plan.runs)}",
            )
            for number, run in enumerate(plan.runs, start=1)
        ]


def _load(config: PetalsConfig, run: RunShape) -> Load:
    return Load(
        num_processes=config.num_processes,
        num_micro_batches=config.num_micro_batches,
        batch_size=config.batch_size,
        sequence_length=run.sequence_length,
        max_tokens=run.max_tokens,
    )


def _measure_and_save(
    crew: Crew,
    load: Load,
    config_bloom: Any,
    *,
    results: ResultsFile,
    description: dict[str, Any],
    limits: TimeLimits,
    progress: Progress,
    title: str = "Run",
) -> ResultRow:
    measurement = Measurement(load=load)
    record = {
        "schema_version": RECORD_SCHEMA_VERSION,
        "system": "petals",
        "status": "ok",
        "started_at": utc_now(),
        "run": asdict(load),
        **description,
    }
    try:
        measure(crew, measurement, config_bloom, limits=limits, progress=progress, title=title)
    except FlexbenchError as error:
        crew.end_all()  # first of all: what is still to do may have to wait for a lock
        results.append_failure(record | measurement.observations(), error)
        raise
    row = measurement.row()
    results.append(row, record | {"figures": measurement.figures()} | measurement.observations())
    progress.note(
        f"{title}: {load.sequence_length} + {load.max_tokens} tokens, "
        f"{row.throughput:.2f} tokens/s, mean latency {row.mean_latency:.3f} s"
    )
    return row


def measure(
    crew: Crew,
    measurement: Measurement,
    config_bloom: Any,
    *,
    limits: TimeLimits,
    progress: Progress,
    title: str,
) -> None:
    """Do one run with clients in `crew`, and fill in `measurement` as its observations arrive.

    Raises WorkerError, DeadlineError or Interrupted; what was observed before is kept.
    """
    load = measurement.load
    clients = {
        crew.start(
            f"client {index}",
            run_client,
            config_bloom,
            load.num_micro_batches,
            load.batch_size,
            load.sequence_length,
            load.max_tokens,
            index,
        ): index
        for index in range(load.num_processes)
    }
    with progress.phase(f"{title}: warm-up", total=len(clients)) as phase:
        _await_warmup(crew, clients, measurement, limits.warmup_s, phase)
    num_rounds = load.num_processes * load.num_micro_batches
    with progress.phase(f"{title}: rounds", total=num_rounds) as phase:
        measurement.released_at_utc = utc_now()
        measurement.released_at = crew.release(list(clients))
        _collect_rounds(crew, clients, measurement, limits.run_s, phase)
    crew.end(list(clients))


def _await_warmup(
    crew: Crew, clients: dict[Worker, int], measurement: Measurement, limit_s: float, phase: Phase
) -> None:
    waiting = set(clients)
    deadline = Deadline(
        limit_s,
        lambda: (
            f"{', '.join(sorted(client.name for client in waiting))} did not finish the warm-up "
            f"within {limit_s:g} s (--warmup-timeout)"
        ),
    )
    while waiting:
        worker, message = crew.next_message(deadline)
        if worker in waiting and isinstance(message, Ready):
            measurement.warmup_s[clients[worker]] = time.monotonic() - worker.started_at
            waiting.discard(worker)
            phase.advance()


def _collect_rounds(
    crew: Crew, clients: dict[Worker, int], measurement: Measurement, limit_s: float, phase: Phase
) -> None:
    waiting = set(clients)
    num_rounds = measurement.load.num_processes * measurement.load.num_micro_batches
    deadline = Deadline(
        limit_s,
        lambda: (
            f"{len(measurement.all_latencies)} of {num_rounds} requests were finished within "
            f"{limit_s:g} s (--run-timeout)"
        ),
    )
    while waiting:
        worker, message = crew.next_message(deadline)
        if worker not in waiting:
            continue
        if isinstance(message, Item):
            measurement.latencies.setdefault(clients[worker], []).append(message.payload)
            phase.advance()
        elif isinstance(message, Finished):
            waiting.discard(worker)


def _describe(model: SwarmModel) -> dict[str, Any]:
    """The part of a record that is the same for all runs of a command."""
    return {
        "model": asdict(model.shape) | {"dht_prefix": model.dht_prefix, "seed": model.seed},
        "initial_peers": list(model.initial_peers),
        **environment.describe_run(PACKAGES),
    }


def _warn_of_other_subject(results: ResultsFile, plan: Plan, progress: Progress) -> None:
    subject = ("prefix", "initial_peers", "num_servers", "dtype", "device")
    if other := results.other_subject(_configuration(plan), subject):
        progress.note(mixed_results_note(results.path, other))


def _configuration(plan: Plan) -> dict[str, Any]:
    config = asdict(plan.config)
    config["initial_peers"] = list(plan.config.initial_peers)
    config["prefix"] = plan.config.shape.name
    config["output"] = str(plan.config.output)
    config["servers"] = [
        asdict(spec) | {"blocks": [spec.blocks.start, spec.blocks.stop]} for spec in plan.servers
    ]
    return config
