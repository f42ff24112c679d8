"""Measurements on a machine that others use, too: in turns, until they agree.

What else runs makes a measurement longer, never shorter, for moments or for seconds. So each is
repeated until its two fastest runs are close, and these count. Turns go around all of them, three
times at least: runs of one are so far from each other that what disturbs for a second or two does
not meet all of them, nor one batch size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from flexbench.dist.policy_search.probe import Times

_CLOSE = 1.1
_LEAST_TURNS, _MOST_TURNS = 3, 6

Key = TypeVar("Key", bound=Hashable)


def take_turns(keys: Sequence[Key], measure: Callable[[Key], Times]) -> dict[Key, Times]:
    """The median of each one's two fastest runs, which are close unless six did not do."""
    runs: dict[Key, list[Times]] = {key: [] for key in keys}
    for _ in range(_MOST_TURNS):
        left = [key for key in keys if not _agree(runs[key])]
        if not left:
            break
        for key in left:
            runs[key].append(measure(key))
    return {key: Times.median(_fastest(found)) for key, found in runs.items()}


def _fastest(runs: Sequence[Times]) -> list[Times]:
    return sorted(runs, key=lambda run: run.total_s)[:2]


def _agree(runs: Sequence[Times]) -> bool:
    if len(runs) < _LEAST_TURNS:
        return False
    first, second = _fastest(runs)
    return second.total_s <= _CLOSE * first.total_s
