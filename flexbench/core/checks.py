"""Checks of values that people give, shared by all configurations."""

from __future__ import annotations

from flexbench.core.errors import ConfigError

# Nobody wants more of anything; and it keeps every product of counts a number that can be shown.
MAX_COUNT = 10**9


def check_count(option: str, value: int, *, minimum: int, maximum: int = MAX_COUNT) -> None:
    """Raise ConfigError naming `option` unless `minimum` <= `value` <= `maximum`."""
    if value < minimum:
        raise ConfigError(option, f"must be a whole number of at least {minimum}, not {value}")
    if value > maximum:
        raise ConfigError(option, f"must be a whole number of at most {maximum}")


def check_seed(option: str, value: int) -> None:
    """Raise ConfigError naming `option` unless every random number generator takes `value`."""
    check_count(option, value, minimum=0, maximum=2**32 - 1)


def check_seconds(option: str, value: float) -> None:
    """Raise ConfigError naming `option` unless `value` is a finite time above 0."""
    if not 0 < value < float("inf"):
        raise ConfigError(option, f"must be a number of seconds above 0, not {value:g}")
