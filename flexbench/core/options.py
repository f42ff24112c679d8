"""How options are written on the command line, beyond what Typer does by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from typer.core import TyperCommand

_NEGATIVE_NUMBER = re.compile(r"-\d")


class MultiValueCommand(TyperCommand):
    """A command whose repeatable options also take several values in a row.

    `--initial-peers A B` is `--initial-peers A --initial-peers B`, as with argparse's nargs="+",
    which the original scripts used. Not for commands with positional arguments.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option in front of every further value, then parse as usual."""
        repeatable = {
            name
            for parameter in self.params
            if getattr(parameter, "multiple", False)
            for name in parameter.opts
        }
        return super().parse_args(ctx, repeat_options(args, repeatable))


def repeat_options(args: Sequence[str], repeatable: Iterable[str]) -> list[str]:
    """['--n', '1', '2', '--x'] -> ['--n', '1', '--n', '2', '--x'] for a repeatable '--n'."""
    names = frozenset(repeatable)
    repeated: list[str] = []
    current: str | None = None
    values = 0
    for argument in args:
        if argument.startswith("-") and not _NEGATIVE_NUMBER.match(argument):
            name = argument.partition("=")[0]
            current = name if name in names else None
            values = 1 if "=" in argument else 0
        elif current is not None:
            if values:
                repeated.append(current)
            values += 1
        repeated.append(argument)
    return repeated
