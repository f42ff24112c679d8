"""Round numbers along an axis, for plots whose axes we draw ourselves."""

from __future__ import annotations

import math

_STEPS = (1.0, 2.0, 5.0, 10.0)
_MANTISSAS = ((1, 2, 5), (1, 3), (1,))


def linear_ticks(low: float, high: float, *, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    for factor in (*_STEPS, *(10 * step for step in _STEPS)):
        step = factor * power
        if step <= 0:
            continue
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [number * step for number in range(first, last + 1)]
    return [low, high]


def log_ticks(low: float, high: float, *, most: int) -> list[float]:
    """At most `most` values such as 0.1, 0.2, 0.5, 1 from `low` to `high`, both above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas in _MANTISSAS:
        ticks = _powers(first, last, 1, mantissas, low, high)
        if len(ticks) <= most:
            return ticks
    every = 1 + (last - first) // most
    return _powers(first, last, every, (1,), low, high)[:most]


def _powers(
    first: int, last: int, every: int, mantissas: tuple[int, ...], low: float, high: float
) -> list[float]:
    values = (
        float(f"{mantissa}e{power}")
        for power in range(first, last + 1, every)
        for mantissa in mantissas
    )
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
