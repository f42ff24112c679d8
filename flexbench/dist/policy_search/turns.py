"""Measurements on a machine that others use, too: in turns, until they agree.

What else runs makes a measurement longer, never shorter, for moments or for seconds. So each is
repeated until its two fastest runs are close, and these count. Turns go around all of them, three
times at least: runs of one are so far from each other that what disturbs for a second or two does
not meet all of them, nor one batch size alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

from flexbench.dist.policy_search.probe import Times

_CLOSE = 1.1
_LEAST_TURNS, _MOST_TURNS = 3, 6
_LONGEST_S = 20.0  # from then on, two turns are enough

Key = TypeVar("Key", bound=Hashable)


def take_turns(keys: Sequence[Key], measure: Callable[[Key], Times]) -> dict[Key, Times]:
    """Of each, the median of the two fastest prefills, and of the two fastest decodings."""
    runs: dict[Key, list[Times]] = {key: [] for key in keys}
    began_at = time.monotonic()
    for turn in range(_MOST_TURNS):
        left = [key for key in keys if turn < _LEAST_TURNS or not _agree(runs[key])]
        is_late = time.monotonic() - began_at > _LONGEST_S
        if not left or (is_late and turn >= 2):
            break
        for key in left:
            runs[key].append(measure(key))
    return {key: _fastest(found) for key, found in runs.items()}


def _fastest(runs: Sequence[Times]) -> Times:
    prefill, decode = (Times.median(sorted(runs, key=part)[:2]) for part in _PARTS)
    return replace(prefill, decode_s=decode.decode_s, decode_compute_s=decode.decode_compute_s)


def _agree(runs: Sequence[Times]) -> bool:
    for part in _PARTS:
        first, second = sorted(map(part, runs))[:2]
        if second > _CLOSE * first:
            return False
    return True


def _prefill_s(run: Times) -> float:
    return sum(run.prefill_s.values())


def _decode_s(run: Times) -> float:
    return sum(run.decode_s.values())


_PARTS = (_prefill_s, _decode_s)
