"""Which rows of a table are the best of those that they can be compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexbench.report.figures import is_higher_better
from flexbench.report.groups import Group
from flexbench.report.runs import GATE_COLUMNS, PROJECTED
from flexbench.report.statistics import Spread

# More tokens a prompt are more work: only rows with as many of both can be compared.
_LENGTHS = ("sequence_length", "max_tokens")
_STATISTICS: dict[str, Callable[[Spread], float]] = {
    "mean": lambda spread: spread.mean,
    "median": lambda spread: spread.median,
}


def best_columns(
    groups: Sequence[Group], figures: Sequence[str], *, are_lengths_alike: bool = False
) -> list[frozenset[str]]:
    """Of each group, the columns in which it is best, such as throughput_mean; of equals, each.

    Of groups whose keys leave out the lengths none is best, unless all their runs have the same.

    Groups that are mixed, projected or client-limited are never best, nor is one that stands alone,
    or is like all others.
    """
    marks: list[set[str]] = [set() for _ in groups]
    if not are_lengths_alike and any(name not in one.keys for one in groups for name in _LENGTHS):
        return [frozenset() for _ in groups]
    for places in _comparable(groups):
        for figure in figures:
            is_higher = is_higher_better(figure)
            known = [place for place in places if figure in groups[place].spreads]
            if is_higher is None or len(known) < 2:
                continue
            for name, value_of in _STATISTICS.items():
                values = [value_of(groups[place].spreads[figure]) for place in known]
                if min(values) == max(values):
                    continue
                best = max(values) if is_higher else min(values)
                for place, value in zip(known, values, strict=True):
                    if value == best:
                        marks[place].add(f"{figure}_{name}")
    return [frozenset(names) for names in marks]


def _comparable(groups: Sequence[Group]) -> list[list[int]]:
    """The places of groups that can be compared with each other."""
    sets: dict[tuple[object, ...], list[int]] = {}
    for place, group in enumerate(groups):
        if group.mixed or group.num_client_limited or group.gate["basis"] == PROJECTED:
            continue
        gate = (group.gate[name] for name in GATE_COLUMNS)
        lengths = (group.keys.get(name) for name in _LENGTHS)
        sets.setdefault((*gate, *lengths), []).append(place)
    return list(sets.values())
