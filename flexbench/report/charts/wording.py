"""Names of series: what sets configurations apart, and what they have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexbench.core.printable import printable
from flexbench.report.formats.cells import format_figure
from flexbench.report.runs import GATE_COLUMNS, MEASURED

Key = Mapping[str, Any]
"""Columns of a configuration and their values; "setup" is an object of its own."""

_SETUP = "setup."
_LONGEST_NAME = 60
_LONGEST_TEXT = 300
_LOG_FROM = 30.0  # an axis that reaches from 1 to more is logarithmic
_CLIENT_SYSTEMS = ("petals", "serving")
# Figures of dummy weights, and projections, are never to be taken for others.
_ALWAYS_NAMED = ("weights", "basis")
_LONGEST_SLUG = 40
_NOT_IN_SLUG = re.compile(r"[^a-z0-9]+")
_COUNTED = {"num_gpu_batches": "GPU batch", "num_threads": "thread", "num_gpus": "GPU"}
# Their values say what they are of.
_SELF_EVIDENT = ("api_url", "base_url")


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

    What must not be compared unnoticed comes first: weights, and what was projected, in any case,
    of the rest as little as tells a configuration from the others.
    """
    if not keys:
        return Names(names=(), common="", notes=())
    flat = [_flat(key) for key in keys]
    fields = list(dict.fromkeys(name for one in flat for name in one))
    differing = [name for name in fields if _differ([one.get(name) for one in flat])]
    gates = [name for name in differing if name in GATE_COLUMNS]
    always = [name for name in gates if name in _ALWAYS_NAMED]
    others = [name for name in gates if name not in always]
    said = [*_fewest(flat, always, others), *always]
    said += _fewest(flat, said, [name for name in differing if name not in gates])
    full = _named(flat, said)
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
            *_unsaid(flat, said, differing),
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
    known = [_joined(one, [name for name in fields if _is_news(one, name)]) for one in flat]
    if all(known) and len(set(known)) == len(known):
        return known
    return [_joined(one, fields) or _subject(one) for one in flat]


def _is_news(key: Key, name: str) -> bool:
    """Whether it is known, and not what everybody takes for granted."""
    return key.get(name) is not None and (name, key[name]) != ("basis", MEASURED)


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
        printable(name.removeprefix(_SETUP).replace("_", " "))
        for name in differing
        if name not in said and values(name) not in known
    ]
    if not names:
        return []
    text = _cut(", ".join(names), _LONGEST_TEXT)
    return [f"They also differ in: {text}."]


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


def left_out(
    names: Sequence[str], num_left_out: int, what: str = "configuration", because: str = ""
) -> list[str]:
    """A note on what is not drawn: at most five of them by name; none when nothing is left out."""
    because = f" {because}" if because else ""
    if num_left_out <= 0:
        return []
    named = list(names[:5])
    others = num_left_out - len(named)
    listed = "; ".join(named) if others <= 0 else "; ".join([*named, f"{others:,} more"])
    return [f"Not drawn: {counted(num_left_out, what)}{because}: {listed}."]


def all_have(common: str) -> list[str]:
    """A note on what all series have in common; none for nothing."""
    return [f"Same for all: {common}."] if common else []


def to_slug(text: str) -> str:
    """A text as a part of a file's name: small letters, digits and hyphens; "" where none is left.

    Others may have the same.
    """
    return _NOT_IN_SLUG.sub("-", text.casefold())[:_LONGEST_SLUG].strip("-")


def short_model(model: Any) -> str:
    """Without the organization: 'opt-125m'."""
    return printable(str(model or "")).rpartition("/")[2]


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
    words = plain.replace("_", " ")
    if value is None:
        return f"{words} not known"
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if plain in _COUNTED and isinstance(value, int):
        return counted(value, _COUNTED[plain])
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
    text = format_figure(value) if isinstance(value, float) else str(value)
    return text if name in GATE_COLUMNS or plain in _SELF_EVIDENT else f"{words} {text}"


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
