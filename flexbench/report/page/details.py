"""All that is known of a run, laid out for reading."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from markupsafe import Markup, escape

from flexbench.report.page.embedding import to_json

MOST_RUNS = 500
"""Details of more runs would make a file that no browser opens quickly."""
MOST_BYTES = 8_000_000
"""Of the details of all runs together."""
MOST_ENTRIES = 1000
MOST_CHARACTERS = 2000
MOST_IN_LIST = 50
"""Longer lists are counted, not shown."""
MOST_JSON = 500_000
"""Characters of a run's details as JSON."""
# What a run kept of every request or moment: charts show it, and it would be most of the page.
_MEASUREMENTS = frozenset({"latencies_s", "timeline"})
# Elements around a value, and around a run.
_MARKUP_OF_ENTRY = 60
_MARKUP_OF_RUN = 600
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
    """None: nested too deeply to be written, or longer than MOST_JSON."""


def to_views(runs: Sequence[RunDetails]) -> list[RunView]:
    """The first runs, as many as a page has room for: MOST_RUNS and MOST_BYTES."""
    views = []
    num_bytes = 0
    for run in runs[:MOST_RUNS]:
        view = to_view(run)
        num_bytes += _size(view)
        if num_bytes > MOST_BYTES:
            break
        views.append(view)
    return views


def to_view(run: RunDetails) -> RunView:
    """Group the details by their outermost names; single values come first.

    Of long lists, and of what was measured at each request or moment, there is the number alone.
    """
    details = _without_long_lists(run.details)
    values = _flattened(details)
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
        json=_json(details),
    )


def _json(details: Mapping[str, Any]) -> Markup | None:
    try:
        text = to_json(details)
    except RecursionError:
        return None
    return text if len(text) <= MOST_JSON else None


def _size(view: RunView) -> int:
    """About how many bytes of the page a run takes."""
    texts = [view.title, view.source]
    for group in view.groups:
        texts.append(group.heading)
        for entry in group.entries:
            texts.extend(entry)
    size = sum(len(escape(text).encode(errors="replace")) for text in texts)
    return size + _MARKUP_OF_RUN + _MARKUP_OF_ENTRY * len(texts) // 2 + len(view.json or "")


def _without_long_lists(details: Mapping[str, Any]) -> Mapping[str, Any]:
    """As they are where they are nested more deeply than functions can be."""
    try:
        return {name: _short(name, value) for name, value in details.items()}
    except RecursionError:
        return details


def _short(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if name in _MEASUREMENTS and value:
            return _counted(value.get("rows", value))
        return {key: _short(key, item) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    is_long = len(value) > MOST_IN_LIST and name != _COMMAND
    if is_long or (name in _MEASUREMENTS and value):
        return _counted(value)
    return [_short("", item) for item in value]


def _counted(values: Any) -> str:
    num = len(values) if isinstance(values, list | tuple | Mapping) else 1
    return f"{num:,} {'entry' if num == 1 else 'entries'}, not on this page"


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
