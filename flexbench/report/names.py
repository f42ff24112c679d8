"""The names of columns and figures, as people type them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

from flexbench.core.errors import ConfigError
from flexbench.core.printable import printable

# What stands above a column in a table, and what the column is called everywhere else.
HEADINGS: Mapping[str, str] = {
    "batch": "batch_size",
    "micro": "num_micro_batches",
    "procs": "num_processes",
    "prompt": "sequence_length",
    "new": "max_tokens",
    "clients": "concurrency",
    "offered req/s": "rate_per_s",
    "tok/s": "throughput",
    "lat s": "mean_latency",
    "req/s": "requests_per_s",
    "bubble": "bubble_fraction",
    "errors": "error_rate",
    "GPUs": "num_gpus",
    "runs": "num_runs",
}
"""Accepted instead of names, unless something has such a name itself."""

_MOST_LISTED = 8
_MOST_ALIKE = 3
# Where something is very much alike, nothing else is meant.
_LIKENESSES = (0.8, 0.6)


def name_of(text: str, known: Collection[str]) -> str:
    """The one of `known` that is meant; `text` itself where it is none."""
    meant = HEADINGS.get(text)
    return text if text in known or meant not in known else str(meant)


def unknown_name(option: str, what: str, name: str, known: Collection[str]) -> ConfigError:
    """That there is no such column or figure (`what`), and which ones may be meant."""
    problem = f"there is no {what} {name!r}"
    names = list(dict.fromkeys(known))
    if len(names) <= _MOST_LISTED:
        return ConfigError(option, f"{problem}; there are: {_listed(names)}")
    nearest = _nearest(name, names)
    if nearest:
        rest = len(names) - len(nearest)
        return ConfigError(
            option, f"{problem}; did you mean {' or '.join(map(printable, nearest))}? ({rest} more)"
        )
    rest = len(names) - _MOST_LISTED
    return ConfigError(
        option,
        f"{problem}; there are: {_listed(names[:_MOST_LISTED])} and {rest} more: the columns of "
        "--format csv",
    )


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """The most similar ones, by their names and their headings."""
    words = [*names, *(heading for heading, meant in HEADINGS.items() if meant in names)]
    for cutoff in _LIKENESSES:
        alike = get_close_matches(name, words, n=_MOST_ALIKE, cutoff=cutoff)
        if alike:
            return list(dict.fromkeys(name_of(one, names) for one in alike))
    return []


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(printable, names))
