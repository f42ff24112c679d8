"""Sending the load of one point from this machine, and calibrating the generators."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flexbench.core.endpoint import Client, Failure, FailureKind
from flexbench.core.environment import num_cpus
from flexbench.core.errors import ConfigError, RunError
from flexbench.serving.clients import find_client
from flexbench.serving.config import Limits, Load, PromptConfig, ServingConfig
from flexbench.serving.generators import Board, Generators, PointRun, PointSpec, Topology

# One loop keeps so many clients busy with a small part of a core (docs/performance.md).
_CLIENTS_PER_WORKER = 128
# An open loop's requests in flight are not known beforehand.
_RATE_PER_WORKER = 500.0
# Processes of a client that sends one request at a time, for an open loop.
_WORKERS_OF_OPEN_LOOP = 4

_MOST_FAILURES_SHOWN = 3

_CALIBRATION_S = 0.3
_CALIBRATION_TTFT_S = 0.02
_CALIBRATION_ITL_S = 0.005
_CALIBRATION_TOKENS = 8
_CALIBRATION_TRIES = 3
_CALIBRATION_GOOD_S = 0.002
_SPEED_S = 0.1
_SPEED_CLIENTS = 16


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The generators against the dummy client, whose latency is known: their own speed and error.

    Their error is what they measured beyond the latency that the dummy has.
    """

    concurrency: int
    num_loops: int
    is_streaming: bool
    max_requests_per_s: float
    """Of all loops of this machine together, to a dummy that answers at once."""
    error_p50_s: float
    error_p99_s: float


def choose_topology(
    client_class: type[Client], load: Load, *, num_workers: int | None, use_threading: bool
) -> Topology:
    """How many loops send `load`, and in how many processes.

    Raises ConfigError for a number of workers with which the client cannot have that load.
    """
    per_worker = client_class.requests_per_worker
    most: int | None = getattr(client_class, "max_workers", None)
    if per_worker is not None:
        wanted = _WORKERS_OF_OPEN_LOOP
        if load.concurrency is not None:
            wanted = math.ceil(load.concurrency / per_worker)
            if num_workers is not None and num_workers < wanted:
                raise ConfigError(
                    "--num-workers",
                    f"each process of this client has {per_worker} request at a time: "
                    f"{load.concurrency} clients need {wanted}",
                )
        else:
            wanted = num_workers or wanted
        return Topology(num_workers=wanted, num_parts=wanted)
    wanted = num_workers or min(num_cpus(), _enough_loops(load))
    if load.concurrency is not None:
        wanted = min(wanted, load.concurrency)
    if most is not None:
        wanted = min(wanted, most)
    return Topology(num_workers=1 if use_threading else wanted, num_parts=wanted)


def _enough_loops(load: Load) -> int:
    if load.concurrency is not None:
        return math.ceil(load.concurrency / _CLIENTS_PER_WORKER)
    assert load.rate_per_s is not None
    return math.ceil(load.rate_per_s / _RATE_PER_WORKER)


@dataclass(frozen=True, kw_only=True)
class LoadedPoint:
    """What a point gave, and how it was sent."""

    run: PointRun
    topology: Topology
    warmup_failures: list[Failure]
    hosts: dict[str, Any] = field(default_factory=dict)
    """What a record says of the machines that sent, where there are several."""


class LocalLoad:
    """Sends the load of points from this machine alone."""

    num_ranks = 1

    def __init__(
        self, generators: Generators, client_class: type[Client], *, config: ServingConfig
    ) -> None:
        self._generators = generators
        self._client_class = client_class
        self._config = config

    def topology(self, load: Load) -> Topology:
        """How `load` is spread."""
        return choose_topology(
            self._client_class,
            load,
            num_workers=self._config.num_workers,
            use_threading=self._config.use_threading,
        )

    def send(self, spec: PointSpec, on_status: Callable[[Board], None]) -> LoadedPoint:
        """Prepare and send the load of a point.

        Raises RunError when no warm-up request succeeded, and what `Generators.run` raises.
        """
        topology = self.topology(spec.load)
        failures = self._prepare(spec, topology)
        run = self._generators.run(limits=self._config.limits, on_status=on_status)
        return LoadedPoint(run=run, topology=topology, warmup_failures=failures)

    def _prepare(self, spec: PointSpec, topology: Topology) -> list[Failure]:
        prepared = self._generators.prepare(spec, topology)
        if prepared.failures and len(prepared.failures) == prepared.num_warmups:
            raise RunError(
                f"{spec.load.label}: no warm-up request succeeded: {_summarize(prepared.failures)}"
                f"{_about_key(spec.client_config, prepared.failures)}"
            )
        return prepared.failures


def _summarize(failures: Sequence[Failure]) -> str:
    """'8 x http_5xx: the server says: out of memory'."""
    counts = Counter(failures)
    shown = [
        f"{count} x {failure.kind}: {failure.message}"
        for failure, count in counts.most_common(_MOST_FAILURES_SHOWN)
    ]
    return "; ".join(shown)


def _about_key(client_config: Any, failures: Sequence[Failure]) -> str:
    """Where a refused key comes from: some servers tell their models without asking for one."""
    variable = getattr(client_config, "api_key_env", None)
    if variable is None or all(one.kind is not FailureKind.UNAUTHORIZED for one in failures):
        return ""
    state = "set" if os.environ.get(variable) else "not set"
    return f" (the API key is that in {variable}, which is {state})"


def calibrate(
    generators: Generators, topology: Topology, concurrency: int, *, is_streaming: bool
) -> Calibration:
    """Two moments of load on the dummy client, from here: one for the error, one for the speed.

    The error is the best of up to three: a hiccup of the machine in so short a time says nothing of
    a point that was measured at another one.
    """
    topology = replace(topology, first_part=0, total_parts=None)
    load = Load(concurrency=max(concurrency, topology.num_parts), duration_s=_CALIBRATION_S)
    nominal_s = _CALIBRATION_TTFT_S + (_CALIBRATION_TOKENS - 1) * _CALIBRATION_ITL_S
    tries: list[tuple[float, float]] = []
    while len(tries) < _CALIBRATION_TRIES and not (tries and tries[-1][1] <= _CALIBRATION_GOOD_S):
        times = (_CALIBRATION_TTFT_S, _CALIBRATION_ITL_S)
        run = _send_to_dummy(generators, topology, load, times, is_streaming=is_streaming)
        errors = sorted(
            (trace.content_ns[-1] - trace.scheduled_ns) / 1e9 - nominal_s
            for trace in run.traces
            if trace.is_ok and trace.content_ns
        )
        if not errors:
            raise RunError("the load generators answered no request of their own calibration")
        tries.append(
            (errors[len(errors) // 2], errors[min(len(errors) - 1, len(errors) * 99 // 100)])
        )
    error_p50_s, error_p99_s = min(tries, key=lambda errors: errors[1])
    return Calibration(
        concurrency=concurrency,
        num_loops=topology.num_parts,
        is_streaming=is_streaming,
        max_requests_per_s=_measure_speed(generators, topology, is_streaming=is_streaming),
        error_p50_s=error_p50_s,
        error_p99_s=error_p99_s,
    )


def _measure_speed(generators: Generators, topology: Topology, *, is_streaming: bool) -> float:
    """Requests/s to a dummy that answers at once."""
    load = Load(concurrency=_SPEED_CLIENTS * topology.num_parts, duration_s=_SPEED_S)
    run = _send_to_dummy(generators, topology, load, (0.0, 0.0), is_streaming=is_streaming)
    return sum(trace.is_ok for trace in run.traces) / _SPEED_S


def _send_to_dummy(
    generators: Generators,
    topology: Topology,
    load: Load,
    times: tuple[float, float],
    *,
    is_streaming: bool,
) -> PointRun:
    ttft_s, itl_s = times
    config = find_client("dummy").config_class(
        capacity=10**6, ttft_ms=ttft_s * 1e3, itl_ms=itl_s * 1e3
    )
    prompts = PromptConfig(
        model="dummy",
        tokenizer="byte",
        prompt_length=64,
        prompt_length_var=0,
        max_new_tokens=_CALIBRATION_TOKENS,
        max_new_tokens_var=0,
        streaming=is_streaming,
    )
    spec = PointSpec(
        api="dummy",
        client_config=config,
        prompts=prompts,
        series=0,
        load=load,
        warmup_requests=0,
        request_timeout_s=10.0,
    )
    generators.prepare(spec, topology)
    return generators.run(limits=Limits(), on_status=lambda _: None)
