"""All that is known of a run, laid out for reading."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from markupsafe import Markup

from flexbench.report.page.embedding import to_json

MOST_ENTRIES = 1000
MOST_CHARACTERS = 2000
_MOST_OF_NAME = 200
_REST = "Run"
# Its list of words is written as a shell takes it.
_COMMAND = "command"

# The outer names and the last one: ((None, "load"), "rate"). Files may be nested very deeply, so
# that tuples of all names would take much memory.
_Link = tuple["_Link | None", str]


@dataclass(frozen=True, kw_only=True)
class RunDetails:
    """A run that rows of the tables stand for."""

    id: int
    """As RunStore numbers it, and Row.run_ids names it."""
    title: str
    source: str
    """File and line."""
    details: Mapping[str, Any]
    """Its configuration, environment, figures: everything, nested as it comes."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """What stands under one name of the details: names and values, both for people."""

    heading: str
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run's details as the page shows them."""

    id: int
    title: str
    source: str
    groups: Sequence[Group]
    num_left_out: int
    """Entries beyond MOST_ENTRIES."""
    json: Markup | None
    """None: nested too deeply to be written."""


def to_view(run: RunDetails) -> RunView:
    """Group the details by their outermost names; single values come first."""
    values = _flattened(run.details)
    groups: dict[str, list[tuple[str, str]]] = {_REST: []}
    for link, value in islice(values, MOST_ENTRIES):
        outermost, *inner = _names(link)
        heading = outermost.replace("_", " ").capitalize() if inner else _REST
        name = _shortened(".".join(inner) or outermost, _MOST_OF_NAME)
        is_command = link[1] == _COMMAND and isinstance(value, list)
        text = shlex.join(map(_words, value)) if is_command else _words(value)
        groups.setdefault(heading, []).append((name, _cut(text)))
    return RunView(
        id=run.id,
        title=run.title,
        source=run.source,
        groups=[Group(heading=name, entries=found) for name, found in groups.items() if found],
        num_left_out=sum(1 for _ in values),
        json=_json(run.details),
    )


def _json(details: Mapping[str, Any]) -> Markup | None:
    try:
        return to_json(details)
    except RecursionError:
        return None


def _flattened(details: Mapping[str, Any]) -> Iterator[tuple[_Link, Any]]:
    """Every single value, and every list of them, with what leads to it, in order.

    With a stack of its own: files may be nested more deeply than functions can be.
    """
    stack: list[tuple[_Link | None, Any]] = [(None, details)]
    while stack:
        link, value = stack.pop()
        if isinstance(value, Mapping) and value:
            stack.extend(((link, str(key)), value[key]) for key in reversed(value))
        elif isinstance(value, list | tuple) and any(map(_is_nested, value)):
            last = len(value) - 1
            stack.extend(((link, str(last - n)), item) for n, item in enumerate(reversed(value)))
        elif link is not None:
            yield link, value


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _names(link: _Link | None) -> list[str]:
    names = []
    while link is not None:
        link, name = link
        names.append(name)
    return names[::-1]


def _cut(text: str) -> str:
    shortened = _shortened(text, MOST_CHARACTERS)
    return shortened if shortened == text else f"{shortened} ({len(text)} characters)"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} …"


def _words(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(map(_words, value)) or "none"
        case Mapping() | "":
            return "none"
        case _:
            return str(value)
