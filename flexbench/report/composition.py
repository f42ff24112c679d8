"""Whether groups that are compared average the same configurations.

Where a group has batches of 1 and 2 and its counterpart has those of 2 alone, their means differ
although nothing got slower. An option that has one value before and another one now was changed on
purpose, and is what is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexbench.core.errors import ConfigError
from flexbench.core.results import CONFIGURATION_COLUMNS
from flexbench.report.figures import THROUGHPUT
from flexbench.report.gate import in_words, joined, key_in_words
from flexbench.report.grouping import read_groups
from flexbench.report.matching import Matches, Pair, is_no_address
from flexbench.report.selection import Selection
from flexbench.report.store import RunStore

_Values = dict[str, dict[str, Any]]
"""Of each column, the values that a group's runs have, by their JSON."""


def with_compositions(
    old: RunStore, new: RunStore, matches: Matches, selection: Selection
) -> Matches:
    """The matches, where groups that average other configurations than their counterparts say so.

    Raises ConfigError for such a pair, unless the selection allows it. Runs that were grouped by
    their whole configuration average nothing.
    """
    if selection.group_by is None:
        return matches
    befores, nows = _compositions(old, selection), _compositions(new, selection)
    pairs = []
    for pair in matches.pairs:
        before = befores.get(_name(pair.old.keys), {})
        now = nows.get(_name(pair.new.keys), {})
        differing = dict(_differing(before, now))
        if differing and not selection.allow_mixed:
            raise _error(pair, differing)
        pairs.append(replace(pair, differing={**differing, **pair.differing}))
    return replace(matches, pairs=pairs)


def _compositions(store: RunStore, selection: Selection) -> dict[str, _Values]:
    """By what groups are grouped by."""
    whole = replace(selection, group_by=(*(selection.group_by or ()), *_columns(store, selection)))
    parents = tuple(dict.fromkeys(("system", *(selection.group_by or ()))))
    found: dict[str, _Values] = {}
    for group in read_groups(store, replace(whole, allow_mixed=True), [THROUGHPUT]):
        values = found.setdefault(_name({name: group.keys[name] for name in parents}), {})
        for name, value in group.keys.items():
            if name not in parents:
                values.setdefault(name, {})[json.dumps(value, sort_keys=True)] = value
    return found


def _columns(store: RunStore, selection: Selection) -> list[str]:
    names = dict.fromkeys((*CONFIGURATION_COLUMNS, *filter(is_no_address, store.keys("setup"))))
    return [name for name in names if name not in (selection.group_by or ())]


def _name(keys: Mapping[str, Any]) -> str:
    return json.dumps(keys, sort_keys=True)


def _differing(before: _Values, now: _Values) -> Iterator[tuple[str, tuple[str, str]]]:
    for name in before.keys() & now.keys():
        if max(len(before[name]), len(now[name])) > 1 and before[name].keys() != now[name].keys():
            yield name, (_in_words(before[name]), _in_words(now[name]))


def _in_words(values: Mapping[str, Any]) -> str:
    return joined(sorted(in_words(value) for value in values.values()))


def _error(pair: Pair, differing: Mapping[str, Sequence[str]]) -> ConfigError:
    parts = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in differing.items())
    return ConfigError(
        "--baseline",
        f"averages over other values of {', '.join(differing)} cannot be compared: {parts} (runs "
        f"with {key_in_words(pair.new.keys)}); add {','.join(differing)} to --group-by, --filter "
        "them, or --allow-mixed",
    )
