"""How a point is doing, in a line, for the person who waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from flexbench.core.progress import Phase
from flexbench.core.units import format_seconds
from flexbench.serving.config import Load
from flexbench.serving.generators import Board

# Before that, a rate says nothing.
_SOON_S = 0.2


def total_of(load: Load) -> int:
    """The steps of a point's progress: seconds where it has a duration, else requests."""
    if load.duration_s is not None:
        return max(1, round(load.duration_s))
    assert load.num_requests is not None
    return load.num_requests


def shows(phase: Phase, load: Load) -> Callable[[Board], None]:
    """What to call with every new status: it shows requests in flight, rate, TTFT and failures."""
    began: list[float] = []

    def show(board: Board) -> None:
        if not began:
            began.append(time.monotonic())
        elapsed_s = time.monotonic() - began[0]
        counts = board.counts
        ended = counts["completed"] + counts["failed"]
        phase.show(describe(board, elapsed_s), elapsed_s if load.duration_s is not None else ended)

    return show


def describe(board: Board, elapsed_s: float) -> str:
    """'8 in flight, 39.1 requests/s, TTFT 50 ms, 0 failed'."""
    counts = board.counts
    words = [f"{counts['in_flight']} in flight"]
    if elapsed_s > _SOON_S:
        words.append(f"{counts['completed'] / elapsed_s:.3g} requests/s")
    if board.recent_ttft_s:
        recent = sorted(board.recent_ttft_s)
        words.append(f"TTFT {format_seconds(recent[len(recent) // 2])}")
    words.append(f"{counts['failed']} failed")
    if board.last_failure is not None:
        words.append(board.last_failure)
    return ", ".join(words)
