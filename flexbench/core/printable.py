"""Texts of others, from files and peers, on a terminal of ours."""

from __future__ import annotations

_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    """On one line: nothing in it moves a cursor, changes a colour or begins a line."""
    return "".join(c if c.isprintable() else _UNPRINTABLE for c in " ".join(text.split()))


def printable_lines(text: str) -> str:
    """The same for a text of several lines, which keep their line ends, tabs and spaces."""
    return "".join(c if c.isprintable() or c in "\n\t" else _UNPRINTABLE for c in text)
