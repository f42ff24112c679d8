"""Names of series: what sets configurations apart, and what they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexbench.report.formats.cells import format_figure, printable
from flexbench.report.runs import GATE_COLUMNS

Key = Mapping[str, Any]
"""Columns of a configuration and their values; "setup" is an object of its own."""

_SETUP = "setup."
_LONGEST_NAME = 60
_LONGEST_TEXT = 300
_LOG_FROM = 30.0  # an axis that reaches from 1 to more is logarithmic
_CLIENT_SYSTEMS = ("petals", "serving")


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the configurations of a chart are called."""

    names: tuple[str, ...]
    """One each, no two the same, short enough for a legend."""
    common: str
    """What is known of all of them, "" for nothing."""
    notes: tuple[str, ...]
    """What the names do not say."""


def name_configurations(keys: Sequence[Key]) -> Names:
    """Names from what sets `keys` apart; they have the same columns, but for those in setup.

    All that must not be compared unnoticed is in a name, of the rest as little as tells it from the
    others.
    """
    if not keys:
        return Names(names=(), common="", notes=())
    flat = [_flat(key) for key in keys]
    fields = list(dict.fromkeys(name for one in flat for name in one))
    differing = [name for name in fields if _differ([one.get(name) for one in flat])]
    gates = [name for name in differing if name in GATE_COLUMNS]
    chosen = _fewest(flat, gates, [name for name in differing if name not in gates])
    full = _named(flat, [*gates, *chosen])
    short = _distinct([_cut(name, _LONGEST_NAME) for name in full])
    common = [
        _words(name, flat[0][name], flat[0])
        for name in flat[0]
        if name not in differing and flat[0][name] is not None and not name.startswith(_SETUP)
    ]
    return Names(
        names=tuple(short),
        common=_cut(printable(", ".join(common)), _LONGEST_TEXT),
        notes=(
            *(f"“{one}” is {long}." for one, long in zip(short, full, strict=True) if one != long),
            *_unsaid(flat, [*gates, *chosen], differing),
        ),
    )


def _flat(key: Key) -> dict[str, Any]:
    """With the names of setup behind a prefix, since they may be those of columns."""
    columns = {name: value for name, value in key.items() if name != "setup"}
    return columns | {f"{_SETUP}{name}": value for name, value in (key.get("setup") or {}).items()}


def _fewest(flat: Sequence[Key], gates: Sequence[str], others: Sequence[str]) -> list[str]:
    """The fewest of `others`, but for chance, that tell apart what all together do."""

    def num_told(names: Sequence[str]) -> int:
        return len({tuple(repr(one.get(name)) for name in names) for one in flat})

    chosen: list[str] = []
    most = num_told([*gates, *others])
    while num_told([*gates, *chosen]) < most:
        left = [name for name in others if name not in chosen]
        chosen.append(max(left, key=lambda name: num_told([*gates, *chosen, name])))
    return [name for name in others if name in chosen]


def _named(flat: Sequence[Key], fields: Sequence[str]) -> list[str]:
    """Without what is not known, unless a name is needed for that."""
    known = [_joined(one, [name for name in fields if one.get(name) is not None]) for one in flat]
    if all(known) and len(set(known)) == len(known):
        return known
    return [_joined(one, fields) or _subject(one) for one in flat]


def _joined(one: Key, fields: Sequence[str]) -> str:
    words = ", ".join(_words(name, one.get(name), one) for name in fields)
    return _cut(printable(words), _LONGEST_TEXT)


def _unsaid(flat: Sequence[Key], said: Sequence[str], differing: Sequence[str]) -> list[str]:
    """A note on what the configurations differ in beside what their names say."""

    def values(name: str) -> list[str]:
        # "2 stages" says what 2 says.
        return [str(one.get(name)).partition(" ")[0] for one in flat]

    known = [values(name) for name in said]
    names = [
        printable(name.removeprefix(_SETUP))
        for name in differing
        if name not in said and values(name) not in known
    ]
    if not names:
        return []
    text = _cut(", ".join(names), _LONGEST_TEXT)
    return [f"Beside what their names say, the configurations differ in {text}."]


def counted(count: float, word: str) -> str:
    """'1 client', '8 clients', '3 processes'."""
    if count == 1:
        return f"1 {word}"
    ending = "es" if word.endswith(("s", "ch")) else "s"
    return f"{format_figure(count)} {word}{ending}"


def interval_text(low: float, high: float, unit: str) -> str:
    """'1.2 s', or '1.1 to 1.3 s'."""
    first, last = format_figure(low), format_figure(high)
    values = first if first == last else f"{first} to {last}"
    return f"{values} {unit}".rstrip()


def left_out(names: Sequence[str], num_left_out: int, what: str = "configuration") -> list[str]:
    """A note on what is not drawn: at most five of them by name; none when nothing is left out."""
    if num_left_out <= 0:
        return []
    named = list(names[:5])
    others = num_left_out - len(named)
    listed = "; ".join(named) if others <= 0 else "; ".join([*named, f"{others:,} more"])
    return [f"Not drawn: {counted(num_left_out, what)}: {listed}."]


def all_have(common: str) -> list[str]:
    """A note on what all series have in common; none for nothing."""
    return [f"All: {common}."] if common else []


def is_wide(values: Sequence[float]) -> bool:
    """Whether an axis for these values has to be logarithmic to show the small ones."""
    return min(values, default=0) > 0 and max(values) > _LOG_FROM * min(values)


def process_word(system: str | None) -> str:
    """What a system calls its processes: clients, ranks."""
    if system in _CLIENT_SYSTEMS:
        return "client"
    return "rank" if system == "dist" else "process"


def _words(name: str, value: Any, key: Key) -> str:
    plain = name.removeprefix(_SETUP)
    if value is None:
        return f"{plain.replace('_', ' ')} not known"
    match name:
        case "weights":
            return f"{value} weights"
        case "batch_size":
            return f"batch {value}"
        case "num_micro_batches":
            return counted(value, "micro-batch")
        case "num_processes":
            return counted(value, process_word(key.get("system")))
        case "sequence_length":
            return f"prompt {value}"
        case "max_tokens":
            return f"{value} new"
    return str(value) if name in GATE_COLUMNS else f"{plain} {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_figure(value) if isinstance(value, float) else str(value)


def _subject(key: Key) -> str:
    """The name of a series that is the only one."""
    found = (printable(str(key.get(name) or "")) for name in ("model", "system"))
    return next(filter(None, found), "runs")


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def _distinct(names: Sequence[str]) -> list[str]:
    """With a number where cutting has made two the same."""
    counts = Counter(names)
    seen: Counter[str] = Counter()
    taken = set(names)
    result = []
    for name in names:
        if counts[name] > 1:
            seen[name] += 1
            numbered = f"{name} ({seen[name]})"
            while numbered in taken:
                seen[name] += 1
                numbered = f"{name} ({seen[name]})"
            taken.add(numbered)
            name = numbered
        result.append(name)
    return result
