"""Lengths that are drawn from a normal distribution."""

from __future__ import annotations

from random import Random

_MAX_DRAWS = 100

LENGTHS_RULE = (
    "normal with a standard deviation of var * mean, rounded; drawn again while below the "
    "smallest length, and cut at the largest"
)
"""How lengths come about, for records."""


def draw_length(
    random: Random, mean: int, variation: float, *, minimum: int = 1, maximum: int | None = None
) -> int:
    """A whole number from normal(mean, mean * variation), at least `minimum`, at most `maximum`.

    Drawing again instead of raising to the minimum keeps lengths from heaping up there; it makes
    the mean a little larger where the variation is large. `mean` must be within the bounds. Without
    a variation the length is the mean, and nothing is drawn.
    """
    if not variation:
        return mean
    deviation = mean * variation
    for _ in range(_MAX_DRAWS):
        length = round(random.gauss(mean, deviation))
        if length >= minimum:
            return length if maximum is None else min(length, maximum)
    return mean
