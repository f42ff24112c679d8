"""Measuring a server's speed on this machine: computing in a worker, then the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from flexbench.core.errors import ConfigError, FlexbenchError
from flexbench.core.processes import Crew, Deadline, Item, Ready
from flexbench.core.progress import Progress
from flexbench.core.results import utc_now
from flexbench.models.families import DecoderSpec
from flexbench.petals_runtime.crew import open_crew
from flexbench.server_config.bandwidth import find_speed_tests, is_measured, measure_network
from flexbench.server_config.compute import (
    FORWARD,
    INFERENCE,
    PASSES,
    Rate,
    Refused,
    check_can_measure,
    is_stand_in,
    measure_compute,
    uses_petals,
)
from flexbench.server_config.compute_setup import ComputeSetup
from flexbench.server_config.speed_cache import SpeedCache, device_name
from flexbench.server_config.speeds import ComputeSpeed, Network

# What Petals gives its own speed test.
_MAX_NETWORK_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Speeds that were measured on this machine, now or earlier.

    `is_cached` and `measured_at` (UTC, ISO 8601; None: not at all) are about computing; the network
    may have been given, or measured at another time, which its source tells.
    """

    compute: ComputeSpeed
    network: Network
    is_cached: bool
    measured_at: str | None


def measure(
    spec: DecoderSpec,
    setup: ComputeSetup,
    *,
    network: Network | None,
    force: bool,
    timeout_s: float,
    progress: Progress,
    log_folder: Path | None = None,
    needs_compute: bool = True,
) -> Measurement:
    """Measure a block of `spec`, and the network unless it is given, or take what is known.

    With `force` both are measured again. Without `needs_compute` only the network is, and `compute`
    has no rates. `timeout_s` is for computing, and at most for the network. Raises ConfigError or
    MissingDependencyError for what cannot be measured here, WorkerError and DeadlineError for what
    went wrong, and Interrupted.
    """
    cache = SpeedCache()
    compute, is_cached, measured_at = ComputeSpeed(), False, None
    if needs_compute:
        name = device_name(setup)
        known = None if force else cache.lookup(spec, setup, name)
        is_cached = known is not None
        if known is not None:
            compute, measured_at = known.compute, known.measured_at
        else:
            compute = _measure_compute(
                spec, setup, name, timeout_s=timeout_s, progress=progress, log_folder=log_folder
            )
            measured_at = utc_now()
            # Kept now: somebody may end the speed test, which comes next.
            store = partial(cache.store, spec, setup, name, compute, measured_at=measured_at)
            _keep(store, progress)
    if network is None:
        network = _known_network(cache, force=force, timeout_s=timeout_s, progress=progress)
    return Measurement(
        compute=compute, network=network, is_cached=is_cached, measured_at=measured_at
    )


def _known_network(
    cache: SpeedCache, *, force: bool, timeout_s: float, progress: Progress
) -> Network:
    """What was measured some days ago, or now. What had to be assumed is not kept."""
    known = None if force else cache.lookup_network()
    if known is not None and known.is_recent:
        return known.network
    network = _measure_network(timeout_s, progress)
    if is_measured(network):
        measured_at = utc_now()
        day = measured_at.partition("T")[0]
        network = replace(network, source=f"{network.source}, {day}")
        _keep(partial(cache.store_network, network, measured_at=measured_at), progress)
    return network


def _keep(store: Callable[[], None], progress: Progress) -> None:
    try:
        store()
    except FlexbenchError as error:
        progress.note(f"Note: {error.message}")  # what was measured is worth as much without


def _measure_compute(
    spec: DecoderSpec,
    setup: ComputeSetup,
    name: str,
    *,
    timeout_s: float,
    progress: Progress,
    log_folder: Path | None,
) -> ComputeSpeed:
    check_can_measure(spec, setup)
    if is_stand_in(spec):
        progress.note(
            "Note: Petals has no OPT block; the BLOOM block of the same dimensions is measured, "
            "which has as many parameters."
        )
    rates: dict[str, Rate] = {}
    with _told_if_lost(rates), open_crew(log_folder) as crew:
        with progress.phase("Starting a process to measure in", total=1) as phase:
            expires_at = time.monotonic() + timeout_s
            crew.start("measurement", measure_compute, spec, setup, uses_petals(spec))
            _next(crew, _deadline("starting a process to measure in", expires_at, timeout_s))
            phase.advance()
        for measured in PASSES:
            with progress.phase(measured.title, total=1) as phase:
                waited_for = f"the measurement of {measured.kind} ({measured.steps})"
                rate = _next(crew, _deadline(waited_for, expires_at, timeout_s))
                assert rate is not None
                rates[rate.kind] = rate
                phase.advance()
    stands_for = " in place of OPT's" if is_stand_in(spec) else ""
    minute = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
    return ComputeSpeed(
        forward_rps=rates[FORWARD.kind].value,
        inference_rps=rates[INFERENCE.kind].value,
        source=f"measured {minute} on {name}, {rates[FORWARD.kind].block}{stands_for}",
    )


@contextmanager
def _told_if_lost(rates: Mapping[str, Rate]) -> Iterator[None]:
    """Add what was measured already to an error: one rate alone is not kept."""
    try:
        yield
    except FlexbenchError as error:
        for rate in rates.values():
            error.add_details(
                f"Measured before that, and not kept: {rate.kind} with {rate.value:.6g} tokens/s; "
                f"--{rate.kind}-rps {rate.value:.6g} gives it without a measurement"
            )
        raise


def _deadline(waited_for: str, expires_at: float, timeout_s: float) -> Deadline:
    return Deadline(
        expires_at - time.monotonic(),
        lambda: f"{waited_for} did not end within {timeout_s:g} s (--measure-timeout)",
    )


def _next(crew: Crew, deadline: Deadline) -> Rate | None:
    """What the worker measured; None when it is ready. Raises ConfigError when it cannot."""
    _, message = crew.next_message(deadline)
    if isinstance(message, Item) and isinstance(message.payload, Refused):
        raise ConfigError(message.payload.option, message.payload.problem)
    if isinstance(message, Item):
        rate: Rate = message.payload
        return rate
    assert isinstance(message, Ready)
    return None


def _measure_network(timeout_s: float, progress: Progress) -> Network:
    tools = find_speed_tests()
    timeout_s = min(timeout_s, _MAX_NETWORK_TIMEOUT_S)
    if not tools:
        return measure_network(timeout_s)
    with progress.phase(f"Measuring the network with {tools[0].name}", total=1) as phase:
        network = measure_network(timeout_s)
        phase.advance()
    return network
