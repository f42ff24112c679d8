"""API keys: read where they are needed, shown nowhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from flexbench.core.errors import ConfigError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# As the names of variables go; longer than that, somebody gave the key itself.
_LONGEST_VARIABLE = 64
_IN_A_HEADER = re.compile(r"[!-~]+")
_HIDDEN = "***"
_MAX_LENGTH = 200


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
    """A function that makes of what a server said one short line without `key`."""

    def quote(said: object) -> str:
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        if key:
            text = text.replace(key, _HIDDEN)
        printable = "".join(character if character.isprintable() else " " for character in text)
        line = " ".join(printable.split())
        return line if len(line) <= _MAX_LENGTH else f"{line[: _MAX_LENGTH - 3]}..."

    return quote
