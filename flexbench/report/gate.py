"""What must not be averaged or compared unnoticed, and how that is said.

Runs that differ in one of GATE_COLUMNS are different things: a model with dummy weights and one
with real ones, a projection and a measurement, two machines. What is not known is like nothing but
what is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexbench.core.errors import ConfigError
from flexbench.core.printable import printable
from flexbench.report.runs import GATE_COLUMNS
from flexbench.report.selection import NOT_KNOWN

_MOST_VALUES = 4
_MOST_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A gate column in which the runs of one group differ: how many there are of each value."""

    column: str
    counts: Sequence[tuple[str, int]]


def in_words(value: Any) -> str:
    """A value of a configuration on one line, not too long, whatever file it comes from."""
    if value is None:
        return NOT_KNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:g}" if isinstance(value, float) else printable(str(value))
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def key_in_words(keys: Mapping[str, Any]) -> str:
    """'num_processes 4, max_tokens 32'."""
    return ", ".join(f"{in_words(name)} {in_words(value)}" for name, value in keys.items())


def joined(values: Sequence[str]) -> str:
    """All values that a group has of a column: 'dummy + real'."""
    more = len(values) - _MOST_VALUES
    shown = [in_words(value) for value in values[:_MOST_VALUES]]
    return " + ".join([*shown, f"{more} more"] if more > 0 else shown)


def averaging_error(keys: Mapping[str, Any], mixtures: Sequence[Mixture]) -> ConfigError:
    """That a group would average what is not alike, and what can be done."""
    names = [one.column for one in mixtures]
    parts = "; ".join(f"{one.column}: {_counts(one)}" for one in mixtures)
    return ConfigError(
        "--group-by",
        f"runs that differ in {', '.join(names)} would be averaged in the group with "
        f"{key_in_words(keys)} ({parts}); add {','.join(names)} to --group-by, --filter them, or "
        "--allow-mixed",
    )


def comparing_error(
    keys: Mapping[str, Any], differing: Mapping[str, tuple[Any, Any]]
) -> ConfigError:
    """That runs of the baseline and their new ones are not alike, and what can be done."""
    parts = "; ".join(
        f"{name} was {in_words(old)}, now {in_words(new)}" for name, (old, new) in differing.items()
    )
    where = f" (runs with {key_in_words(keys)})" if keys else ""
    return ConfigError(
        "--baseline",
        f"runs that differ in {', '.join(differing)} cannot be compared: {parts}{where}; "
        "--filter them, or --allow-mixed",
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The gate columns in which they differ, with both values."""
    return {name: (old[name], new[name]) for name in GATE_COLUMNS if old[name] != new[name]}


def _counts(mixture: Mixture) -> str:
    parts = [f"{in_words(value)} in {_runs(count)}" for value, count in mixture.counts]
    more = len(parts) - _MOST_VALUES
    return ", ".join([*parts[:_MOST_VALUES], f"{more} more"] if more > 0 else parts)


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
