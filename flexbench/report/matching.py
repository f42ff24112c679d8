"""Which configurations of a baseline and of new runs are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexbench.core.errors import ConfigError
from flexbench.core.results import CONFIGURATION_COLUMNS
from flexbench.report.gate import comparing_error, differences, in_words
from flexbench.report.groups import Group
from flexbench.report.runs import GATE_COLUMNS
from flexbench.report.selection import Selection
from flexbench.report.store import RunStore
from flexbench.report.summary import describe

_MOST_LOOKED_AT = 200
_MOST_DIFFERENCES = 6
_MOST_COMPARED = 1000
_MOST_VALUES = 3
# Where a service was reached says nothing of it.
_ADDRESSES = ("url", "port", "address", "host")
HOW_TO_MATCH = "--group-by the columns to match by, for instance --group-by model,num_processes"
"""What to do where configurations differ that are to be compared."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A configuration that both have."""

    old: Group
    new: Group
    differing: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """The gate columns in which they differ, with both values."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What both have, in the order of the new runs, and what only one of them has."""

    pairs: Sequence[Pair]
    only_old: Sequence[Group]
    only_new: Sequence[Group]


def match(old: Sequence[Group], new: Sequence[Group], selection: Selection) -> Matches:
    """Pair groups by what they are grouped by: their whole configuration, unless others were named.

    Of a whole configuration the address of a service counts only where there is a choice.
    What is left is paired without the gate, so that nobody takes other things for the same: raises
    ConfigError for such a pair, unless the selection allows it, and where there is no pair at all.
    Runs of another model or system are paired so only where there is no other pair.
    """
    rest = _Rest(old=list(old), new=list(new))
    pairs = rest.pair(_identity)
    if selection.group_by is None:
        pairs += rest.pair(lambda group: (*group.keys.values(), _setup(group, is_no_address)))
        pairs += rest.pair_others(_is_same_subject)
        # Another model is another configuration, unless there is nothing else to compare.
        if not pairs:
            pairs += rest.pair_others(lambda _old, _new: True)
            # A file without records tells nothing but its columns.
            pairs += rest.pair(_columns, only_if=_is_unknown)
    mixed = next((pair for pair in pairs if pair.differing), None)
    if mixed is not None and not selection.allow_mixed:
        raise comparing_error(_told(mixed.new), mixed.differing)
    if not pairs:
        problem = _nothing_in_common(old, new)
        raise ConfigError("--baseline", f"{problem}; {HOW_TO_MATCH}")
    order = {id(group): place for place, group in enumerate(new)}
    pairs.sort(key=lambda pair: order[id(pair.new)])
    return Matches(pairs=pairs, only_old=rest.old, only_new=rest.new)


def differing_options(old: RunStore, new: RunStore, matches: Matches, selection: Selection) -> str:
    """What the runs of pairs were not grouped by and have other values of, in words; "": nothing.

    Of very many pairs, the first ones are looked at.
    """
    pairs = matches.pairs[:_MOST_COMPARED]
    befores = _values(old, [number for pair in pairs for number in pair.old.run_ids])
    nows = _values(new, [number for pair in pairs for number in pair.new.run_ids])
    known = {*GATE_COLUMNS, *(selection.group_by or ())}
    if selection.group_by is None:
        known |= {*CONFIGURATION_COLUMNS}
    parts = [
        f"{in_words(name)} (was {_any_of(befores.get(name))}, now {_any_of(nows.get(name))})"
        for name in dict.fromkeys((*befores, *nows))
        if name not in known and befores.get(name) != nows.get(name)
    ]
    more = len(parts) - _MOST_DIFFERENCES
    return ", ".join([*parts[:_MOST_DIFFERENCES], *([f"{more} more"] if more > 0 else [])])


def _values(store: RunStore, ids: Sequence[int]) -> dict[str, set[str]]:
    """Of each option, the values that these runs have, in words."""
    names = ", ".join(CONFIGURATION_COLUMNS)
    numbers = ", ".join(map(str, ids))
    found: dict[str, set[str]] = {}
    for row in store.rows(f"SELECT DISTINCT {names}, setup FROM runs WHERE id IN ({numbers})"):  # noqa: S608 - numbers only
        setup = json.loads(row.pop("setup") or "{}")
        for name, value in (*row.items(), *setup.items()):
            found.setdefault(name, set()).add(in_words(value))
    return found


def _any_of(values: set[str] | None) -> str:
    ordered = sorted(values or {in_words(None)})
    more = ["..."] if len(ordered) > _MOST_VALUES else []
    return " or ".join([*ordered[:_MOST_VALUES], *more])


class _Rest:
    """Groups that have no counterpart yet."""

    def __init__(self, *, old: list[Group], new: list[Group]) -> None:
        self.old = old
        self.new = new

    def pair(
        self,
        key_of: Callable[[Group], Hashable],
        *,
        only_if: Callable[[Group, Group], bool] = lambda _old, _new: True,
    ) -> list[Pair]:
        """Take out those that have the same key, each once."""
        waiting: dict[Hashable, list[Group]] = {}
        for group in self.old:
            waiting.setdefault(key_of(group), []).append(group)
        pairs, left = [], []
        for new in self.new:
            candidates = waiting.get(key_of(new), [])
            fitting = [old for old in candidates if only_if(old, new)]
            if not fitting:
                left.append(new)
                continue
            # Of several, the one that differs least.
            old = min(fitting, key=lambda one: len(differences(one.gate, new.gate)))
            candidates.remove(old)
            pairs.append(Pair(old=old, new=new, differing=differences(old.gate, new.gate)))
        taken = {id(pair.old) for pair in pairs}
        self.old = [group for group in self.old if id(group) not in taken]
        self.new = left
        return pairs

    def pair_others(self, only_if: Callable[[Group, Group], bool]) -> list[Pair]:
        """Take out those that have the same columns and options, whatever the gate says."""
        pairs = self.pair(_configuration, only_if=only_if)
        return pairs + self.pair(
            lambda group: (*_columns(group), _setup(group, is_no_address)), only_if=only_if
        )


def _identity(group: Group) -> Hashable:
    return (*group.keys.values(), _setup(group))


def _configuration(group: Group) -> Hashable:
    return (*_columns(group), _setup(group))


def _columns(group: Group) -> tuple[Any, ...]:
    return tuple(group.keys[name] for name in CONFIGURATION_COLUMNS)


def _setup(group: Group, is_of: Callable[[str], bool] = lambda _name: True) -> str:
    options = {name: value for name, value in group.setup.items() if is_of(name)}
    return json.dumps(options, sort_keys=True) if options else ""


def is_no_address(name: str) -> bool:
    """Whether an option is more than where a service was reached."""
    return name.replace(".", "_").rpartition("_")[2] not in _ADDRESSES


def _is_same_subject(old: Group, new: Group) -> bool:
    return all(old.gate[name] == new.gate[name] for name in ("model", "system"))


def _is_unknown(old: Group, new: Group) -> bool:
    return old.gate["system"] is None or new.gate["system"] is None


def _told(group: Group) -> dict[str, Any]:
    """What names a group in an error: without the gate."""
    return {name: value for name, value in group.keys.items() if name not in group.gate}


def _nothing_in_common(old: Sequence[Group], new: Sequence[Group]) -> str:
    """And in what the two that are most alike differ."""
    befores = [describe(group) for group in old[:_MOST_LOOKED_AT]]
    nows = [describe(group) for group in new[:_MOST_LOOKED_AT]]
    nearest = min(
        (_different(before, now) for before in befores for now in nows),
        key=len,
    )
    parts = [
        f"{name} was {in_words(before)}, now {in_words(now)}"
        for name, (before, now) in nearest.items()
    ]
    more = len(parts) - _MOST_DIFFERENCES
    if more > 0:
        parts = [*parts[:_MOST_DIFFERENCES], f"{more} more"]
    return (
        "it has no configuration in common with the new runs; those most alike differ in "
        + "; ".join(parts)
    )


def _different(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (old.get(name), new.get(name))
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    }
