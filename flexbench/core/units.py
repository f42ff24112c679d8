"""Quantities with units, as people read them."""

from __future__ import annotations

_BINARY_PREFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


def format_bytes(count: int | float) -> str:
    """A number of bytes with a binary prefix and three digits: 494926848 -> '472 MiB'."""
    value = float(count)
    for prefix in _BINARY_PREFIXES:
        # 999.5 would be shown as "1e+03": let it move on to the next prefix.
        if abs(value) < 999.5 or prefix == _BINARY_PREFIXES[-1]:
            return f"{value:.3g} {prefix}B"
        value /= 1024
    raise AssertionError("the last prefix takes every value")


def format_seconds(seconds: float) -> str:
    """A duration in the unit that suits it: 0.0123 -> '12.3 ms', 75 -> '1 min 15 s'."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
