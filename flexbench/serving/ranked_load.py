"""Sending the load of a point from several machines: every rank sends its part.

Rank 0 decides what is measured and keeps the results. The others follow: they are told the next
point, prepare with the rest, start at the agreed moment, and hand in what they have seen. Times in
traces are since the release, which is the same moment for all but for the error of their clocks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexbench.core.endpoint import Client
from flexbench.core.errors import ConfigError
from flexbench.ranks.group import Group
from flexbench.serving.config import Arrival, Load, PromptConfig, ServingConfig
from flexbench.serving.generator import LoopReport
from flexbench.serving.generators import (
    Board,
    Generators,
    PartialRun,
    PointRun,
    PointSpec,
    Topology,
)
from flexbench.serving.identity import public_fields
from flexbench.serving.load import LoadedPoint, LocalLoad
from flexbench.serving.traces import RequestTrace

_START_DELAY_S = 0.2
_END = {"kind": "end"}


class RankedLoad(LocalLoad):
    """Sends the load of points from all ranks of a group; every rank has one."""

    def __init__(
        self,
        group: Group,
        generators: Generators,
        client_class: type[Client],
        *,
        config: ServingConfig,
    ) -> None:
        super().__init__(generators, client_class, config=config)
        self._group = group
        self.num_ranks = group.size

    def topology(self, load: Load) -> Topology:
        """How rank 0's part of `load` is spread over processes, and so every rank's."""
        own = super().topology(_part_of_one(load, self._group.size))
        return self._place(own.num_workers, own.num_parts)

    def _place(self, num_workers: int, num_parts: int) -> Topology:
        return Topology(
            num_workers=num_workers,
            num_parts=num_parts,
            first_part=self._group.rank * num_parts,
            total_parts=self._group.size * num_parts,
        )

    def send(self, spec: PointSpec, on_status: Callable[[Board], None]) -> LoadedPoint:
        """Let all ranks prepare and send a point; what all of them saw."""
        topology = self.topology(spec.load)
        # All have as many loops as rank 0: with numbers of their own, as of machines with other
        # CPUs, some requests would be sent twice and others never.
        shape = {"num_workers": topology.num_workers, "num_parts": topology.num_parts}
        self._group.broadcast("next", _encode_spec(spec) | {"topology": shape})
        return self._take_part(spec, topology, on_status)

    def follow(self) -> None:
        """On another rank: take part in one point after another, until rank 0 has no more."""
        while (told := self._group.broadcast("next")) != _END:
            topology = self._place(**told["topology"])
            try:
                self._take_part(_decode_spec(told, self._config), topology, lambda _: None)
            except PartialRun as partial:
                raise partial.error from partial

    def end(self) -> None:
        """On rank 0: let the others go."""
        self._group.broadcast("next", _END)

    def _take_part(
        self, spec: PointSpec, topology: Topology, on_status: Callable[[Board], None]
    ) -> LoadedPoint:
        failures = self._prepare(spec, topology)
        start_ns = self._group.start_together(_START_DELAY_S)
        run = self._generators.run(
            limits=self._config.limits, on_status=on_status, start_ns=start_ns
        )
        self._group.synchronize()  # once more, so that drift is known
        self._merge(run)
        clocks = [clock.as_record() for clock in self._group.clocks]
        hosts = {"num_ranks": self._group.size, "clocks": clocks}
        return LoadedPoint(run=run, topology=topology, warmup_failures=failures, hosts=hosts)

    def _merge(self, run: PointRun) -> None:
        """On rank 0: add what the others have seen."""
        own = {
            "traces": [trace.as_record() for trace in run.traces],
            "reports": [dataclasses.asdict(report) for report in run.reports],
            "stopped_by": run.stopped_by,
        }
        gathered = self._group.gather_bytes("traces", json.dumps(own).encode())
        if gathered is None:
            return
        for rank, data in enumerate(gathered[1:], start=1):
            seen = json.loads(data)
            run.traces += map(RequestTrace.from_record, seen["traces"])
            run.reports += (LoopReport(**report) for report in seen["reports"])
            if seen["stopped_by"] is not None and run.stopped_by is None:
                run.stopped_by = f"rank {rank}: {seen['stopped_by']}"
        run.traces.sort(key=lambda trace: trace.scheduled_ns)


def _part_of_one(load: Load, num_ranks: int) -> Load:
    if load.concurrency is not None:
        return dataclasses.replace(load, concurrency=math.ceil(load.concurrency / num_ranks))
    assert load.rate_per_s is not None
    return dataclasses.replace(load, rate_per_s=load.rate_per_s / num_ranks)


def fingerprint(config: ServingConfig) -> str:
    """What has to be the same on all ranks: everything but secrets, which each has by itself."""
    return json.dumps(
        {
            "api": config.api,
            "client": public_fields(config.client_config),
            "sweeps": [dataclasses.asdict(sweep) for sweep in config.sweeps],
            "is_search": config.is_search,
            "warmup_requests": config.warmup_requests,
            "limits": dataclasses.asdict(config.limits),
        },
        sort_keys=True,
        default=str,
    )


def _encode_spec(spec: PointSpec) -> dict[str, Any]:
    client_config = {}
    for field in dataclasses.fields(spec.client_config):
        value = getattr(spec.client_config, field.name)
        if field.metadata.get("secret"):  # each rank has been given its own
            continue
        value = str(value) if isinstance(value, Path) else value
        if not isinstance(value, str | int | float | bool | None):
            raise ConfigError(
                "--api", f"{spec.api} cannot send its load from several machines at once"
            )
        client_config[field.name] = value
    return {
        "client_config": client_config,
        "prompts": dataclasses.asdict(spec.prompts),
        "load": dataclasses.asdict(spec.load),
        "series": spec.series,
    }


def _decode_spec(told: dict[str, Any], config: ServingConfig) -> PointSpec:
    own = config.client_config
    kinds = {field.name: str(field.type) for field in dataclasses.fields(own)}
    client_config = {
        name: Path(value) if value is not None and "Path" in kinds[name] else value
        for name, value in told["client_config"].items()
    }
    return PointSpec(
        api=config.api,
        client_config=dataclasses.replace(own, **client_config),
        prompts=PromptConfig(**told["prompts"]),
        load=Load(**told["load"] | {"arrival": Arrival(told["load"]["arrival"])}),
        series=told["series"],
        warmup_requests=config.warmup_requests,
        request_timeout_s=config.limits.request_timeout_s,
    )
