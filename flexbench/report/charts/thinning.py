"""Fewer points where there are more than can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def thin(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` (2 or more) of them, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    last = len(items) - 1
    return [items[round(number * last / (most - 1))] for number in range(most)]
