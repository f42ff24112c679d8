"""Quantities with units, as people read them."""

from __future__ import annotations

import re

from flexbench.core.errors import ConfigError

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


_FLAGS = re.IGNORECASE | re.ASCII
_NUMBER = r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*"
_BYTES = re.compile(_NUMBER + r"(?P<prefix>[kmgtp]?)(?P<binary>i?)b", _FLAGS)
_BIT_RATE = re.compile(
    _NUMBER + r"(?P<prefix>[kmgt]?)(?:bit/s|bps|bits/s)", re.IGNORECASE | re.ASCII
)
_SECONDS = re.compile(_NUMBER + r"(?P<unit>us|ms|s|min)", _FLAGS)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_UNITS_IN_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_bytes(option: str, text: str) -> int:
    """'24GiB' -> 25769803776, '80 GB' -> 80000000000. Raises ConfigError naming `option`."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            option, f"must be a number with a unit, such as 24GiB, 80GB or 512MiB, not {text!r}"
        )
    base = 1024.0 if match["binary"] else 1000.0
    value = float(match["number"]) * base ** _POWERS[match["prefix"].lower()]
    if value > 2**60:
        raise ConfigError(option, f"{text} is more than any machine has")
    return round(value)


def parse_bit_rate(option: str, text: str) -> float:
    """'100Mbit/s' -> 100000000.0, in bit/s. Raises ConfigError naming `option`."""
    match = _BIT_RATE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            option, f"must be a number with a unit, such as 100Mbit/s or 1Gbit/s, not {text!r}"
        )
    value = float(match["number"]) * 1000.0 ** _POWERS[match["prefix"].lower()]
    if not 0 < value < 1e18:
        raise ConfigError(option, f"must be above 0, and less than 1e18 bit/s, not {text!r}")
    return value


def parse_seconds(option: str, text: str) -> float:
    """'10ms' -> 0.01, in s. Raises ConfigError naming `option`."""
    match = _SECONDS.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            option, f"must be a number with a unit, such as 10ms or 0.5s, not {text!r}"
        )
    value = float(match["number"]) * _UNITS_IN_S[match["unit"].lower()]
    if value > 1e9:
        raise ConfigError(option, f"{text} is more than anybody waits")
    return value


def format_bit_rate(bits_per_s: float) -> str:
    """A bandwidth with three digits: 100000000 -> '100 Mbit/s'."""
    value = bits_per_s
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            return f"{value:.3g} {prefix}bit/s"
        value /= 1000
    raise AssertionError("the last prefix takes every value")
