"""Measuring a server's speed on this machine: computing in a worker, then the network."""

from __future__ import annotations

import time
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
from flexbench.server_config.bandwidth import find_speed_tests, measure_network
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
from flexbench.server_config.setup import ComputeSetup
from flexbench.server_config.speed_cache import CachedSpeed, SpeedCache, device_name
from flexbench.server_config.speeds import ComputeSpeed, Network

# What Petals gives its own speed test.
_MAX_NETWORK_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Speeds that were measured on this machine, now or earlier.

    `is_cached` and `measured_at` (UTC, ISO 8601) are about computing; the network may have been
    given, or measured at another time.
    """

    compute: ComputeSpeed
    network: Network
    is_cached: bool
    measured_at: str


def measure(
    spec: DecoderSpec,
    setup: ComputeSetup,
    *,
    network: Network | None,
    force: bool,
    timeout_s: float,
    progress: Progress,
    log_folder: Path | None = None,
) -> Measurement:
    """Measure a block of `spec`, and the network unless it is given, or take what is known.

    With `force` both are measured again. `timeout_s` is for computing, and at most for the network.
    Raises ConfigError or MissingDependencyError for what cannot be measured here, WorkerError and
    DeadlineError for what went wrong, and Interrupted.
    """
    cache = SpeedCache()
    name = device_name(setup)
    known = cache.lookup(spec, setup, name)
    keep = partial(_store, cache, spec, setup, name, progress=progress)
    speed = known
    if speed is None or force:
        compute = _measure_compute(
            spec, setup, name, timeout_s=timeout_s, progress=progress, log_folder=log_folder
        )
        speed = CachedSpeed(
            compute=compute, measured_at=utc_now(), network=known.network if known else None
        )
        keep(speed)  # now: somebody may end the speed test, which comes next
    used_network = network
    if used_network is None and not force:
        used_network = speed.network
    if used_network is None:
        used_network = _measure_network(timeout_s, progress)
        if find_speed_tests():  # else the next run looks again: that takes no time
            keep(replace(speed, network=used_network))
    return Measurement(
        compute=speed.compute,
        network=used_network,
        is_cached=speed is known,
        measured_at=speed.measured_at,
    )


def _store(
    cache: SpeedCache,
    spec: DecoderSpec,
    setup: ComputeSetup,
    name: str,
    speed: CachedSpeed,
    *,
    progress: Progress,
) -> None:
    try:
        cache.store(spec, setup, name, speed)
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
    with open_crew(log_folder) as crew:
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
