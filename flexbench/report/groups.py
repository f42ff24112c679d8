"""A group of runs: what they have in common, and the spread of each figure over them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from flexbench.report.gate import joined
from flexbench.report.runs import GATE_COLUMNS
from flexbench.report.selection import NOT_KNOWN
from flexbench.report.statistics import Array, Sample, Spread

SETUP = "setup"
LOADS = ("concurrency", "rate_per_s")
"""Options of serving: how much was asked of it at once."""
COLUMNS = ("gid", "num_runs", "num_gpus", "num_limited", "num_late", "ids")
"""What a row of a grouped table begins with; keys, gates and aggregates of figures follow."""

_NONE: Mapping[str, Array] = MappingProxyType({})
MixedValues = Mapping[str, Sequence[tuple[str, int]]]
"""By gate column, the values that the runs of a group have, and how many have each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that have the columns in common by which they were grouped."""

    keys: Mapping[str, Any]
    """Those columns; None: not known. By default all of IDENTITY_COLUMNS."""
    setup: Mapping[str, Any]
    """Where runs were grouped by their whole configuration; empty else."""
    gate: Mapping[str, Any]
    """GATE_COLUMNS, all of them; where runs differ, a text with each value."""
    mixed: tuple[str, ...] = ()
    """The gate columns in which its runs differ."""
    spreads: Mapping[str, Spread]
    """By figure, those that any run has."""
    num_runs: int
    num_client_limited: int = 0
    num_late: int = 0
    """Runs in which the load generator was late at times."""
    num_gpus: int | None = None
    run_ids: tuple[int, ...] = ()
    """The first ones."""
    samples: Mapping[str, Array] = field(default_factory=dict)
    """By figure, the values of each run: where they were asked for, and are not too many."""

    def mean(self, figure: str) -> float | None:
        """Of a figure over the runs that have it."""
        spread = self.spreads.get(figure)
        return None if spread is None else spread.mean

    def sample(self, figure: str) -> Sample | None:
        """A figure's runs, to be compared with others; None where no run has it."""
        spread = self.spreads.get(figure)
        if spread is None:
            return None
        values = self.samples.get(figure)
        if values is None and spread.count == 1:
            return Sample.of([spread.mean])
        return Sample(count=spread.count, mean=spread.mean, std=spread.std, values=values)


@dataclass(frozen=True, kw_only=True)
class GroupMaker:
    """Makes groups of rows that hold COLUMNS, `names`, and the gate unless it is among them."""

    names: Sequence[str]
    options: frozenset[str]
    """Those of `names` whose values are JSON."""
    mixed: Mapping[int, MixedValues]
    samples: Mapping[int, Mapping[str, Array]]

    def group(self, row: Sequence[Any], spreads: Mapping[str, Spread]) -> Group:
        """The group that a row stands for."""
        gid, num_runs, num_gpus, num_limited, num_late, ids = row[: len(COLUMNS)]
        end = len(COLUMNS) + len(self.names)
        keys = keys_of(self.names, self.options, row[len(COLUMNS) : end])
        mixed = self.mixed.get(gid, {})
        setup: Mapping[str, Any] = {}
        gate: Mapping[str, Any] = keys
        if SETUP in keys:
            setup = _setup(keys.pop(SETUP))
        else:
            gate = _gate(row[end:], mixed)
        return Group(
            keys=keys,
            setup=setup,
            gate=gate,
            mixed=tuple(mixed),
            spreads=spreads,
            num_runs=num_runs,
            num_client_limited=num_limited,
            num_late=num_late,
            num_gpus=num_gpus,
            run_ids=tuple(sorted(ids)),
            samples=self.samples.get(gid, _NONE),
        )


def keys_of(
    names: Sequence[str], options: Collection[str], values: Sequence[Any]
) -> dict[str, Any]:
    """What a row was grouped by; the values of `options` are JSON."""
    return {
        name: json.loads(value) if value is not None and name in options else value
        for name, value in zip(names, values, strict=True)
    }


def order_of_group(group: Group) -> tuple[Any, ...]:
    """To sort groups by: as in SQL, but options by their numbers, and loads before the rest."""
    options = (part for pair in sorted(group.setup.items()) for part in pair)
    loads = [group.setup.get(name) for name in LOADS] if group.gate["system"] == "serving" else []
    keys = list(group.keys.values())
    first = [*keys[:2], *loads, *keys[2:]] if group.setup else keys
    return tuple(order_of(value) for value in (*first, *options))


def order_of(value: Any) -> tuple[int, float, str]:
    """To sort values of any type by: numbers first, then texts; what is not known comes last."""
    if value is None:
        return (2, 0.0, "")
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value))


def _gate(values: Sequence[Any], mixed: MixedValues) -> dict[str, Any]:
    found = {
        name: None if value == NOT_KNOWN else value
        for name, value in zip(GATE_COLUMNS, values, strict=True)
    }
    return found | {name: joined([value for value, _ in mixed[name]]) for name in mixed}


@lru_cache(maxsize=4096)
def _setup(text: str | None) -> Mapping[str, Any]:
    values = json.loads(text) if text else None
    return values if isinstance(values, dict) else {}
