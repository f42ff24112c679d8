"""API keys: read where they are needed, shown nowhere."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from urllib.parse import quote as percent_encode
from urllib.parse import quote_plus

from flexbench.core.errors import ConfigError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# As the names of variables go; longer than that, somebody gave the key itself.
_LONGEST_VARIABLE = 64
_IN_A_HEADER = re.compile(r"[!-~]+")
_HIDDEN = "***"
_MAX_LENGTH = 200
# Of what a server said, more is not looked at.
_MAX_READ = 20_000
# So much of a key is too much.
_TELLING_LENGTH = 8


def check_variable(option: str, name: str) -> None:
    """Raise ConfigError naming `option` unless `name` can be that of an environment variable."""
    if not _VARIABLE.fullmatch(name) or len(name) > _LONGEST_VARIABLE:
        raise ConfigError(option, "must be the name of an environment variable, not a key itself")


def read_key(option: str, variable: str) -> str | None:
    """The key in an environment variable; None where it is not set, or empty.

    Raises ConfigError naming `option` for one that cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if key:
        check_key(option, key, f"the value of {variable}")
    return key or None


def check_key(option: str, key: str, what: str = "it") -> None:
    """Raise ConfigError naming `option` unless `key` can stand in a header."""
    if not _IN_A_HEADER.fullmatch(key):
        raise ConfigError(option, f"{what} has characters that no key has, such as spaces")


def quoting(key: str | None) -> Callable[[object], str]:
    """A function that makes of what a server said one short line without `key`.

    Nor are there eight characters of it in a row, or what it looks like in JSON, in an address, or
    in Python's own notation.
    """
    pieces = _telling_pieces(key) if key else {}

    def quote(said: object) -> str:
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        text = _without(pieces, text[:_MAX_READ])
        printable = "".join(character if character.isprintable() else " " for character in text)
        line = " ".join(printable.split())
        return line if len(line) <= _MAX_LENGTH else f"{line[: _MAX_LENGTH - 3]}..."

    return quote


def _telling_pieces(key: str) -> dict[int, set[str]]:
    """By their length, the strings that nobody is to see."""
    in_json = json.dumps(key)[1:-1]
    in_addresses = [percent_encode(key, safe=""), percent_encode(key), quote_plus(key)]
    forms = {key, repr(key)[1:-1], in_json, in_json.replace("/", r"\/"), *in_addresses}
    forms |= {re.sub("%..", lambda code: code[0].lower(), form) for form in in_addresses}
    pieces: dict[int, set[str]] = {}
    for form in forms:
        length = min(len(form), _TELLING_LENGTH)
        starts = range(len(form) - length + 1)
        pieces.setdefault(length, set()).update(form[start : start + length] for start in starts)
    return pieces


def _without(pieces: dict[int, set[str]], text: str) -> str:
    """The text with each stretch of such strings replaced by ***."""
    spans = sorted(
        (start, start + length)
        for length, strings in pieces.items()
        for start in range(len(text) - length + 1)
        if text[start : start + length] in strings
    )
    kept: list[str] = []
    shown_to = 0
    for start, end in spans:
        if start >= shown_to:
            kept += [text[shown_to:start], _HIDDEN]
        shown_to = max(shown_to, end)
    return "".join([*kept, text[shown_to:]])
