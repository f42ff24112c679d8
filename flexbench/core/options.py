"""How options are written on the command line, beyond what Typer does by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

from typer.core import TyperCommand

_NEGATIVE_NUMBER = re.compile(r"-\d")


_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
_DECIMAL = re.compile(r"-?[0-9]{1,18}(\.[0-9]{0,18})?")


class QuickParsing:
    """Of a command or a group: takes plain values as they are, without having Typer convert them.

    Typer makes a validator for every parameter, used or not; importing what it makes them with, and
    making 50 of them, takes longer than the rest of a command's start. Whatever is not plainly of
    its type goes that way all the same, and gets Typer's messages.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual, but for the conversion of plain values."""
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            if "process_value" not in vars(parameter):
                vars(parameter)["process_value"] = partial(_process_value, parameter)
        parsed: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return parsed


class QuickCommand(QuickParsing, TyperCommand):
    """A command that starts quickly."""


def _process_value(parameter: Any, ctx: Any, value: Any) -> Any:
    converted = _plain_value(parameter, value)
    if converted is _NOT_PLAIN:
        return type(parameter).process_value(parameter, ctx, value)
    if parameter.callback is not None:
        return parameter.callback(ctx, parameter, converted)
    return converted


_NOT_PLAIN = object()


def _plain_value(parameter: Any, value: Any) -> Any:
    """`value` as the parameter's type if that is plain to see, else _NOT_PLAIN."""
    descriptor = getattr(parameter, "type_descriptor", None)
    if descriptor is None:
        return _NOT_PLAIN
    if value is None or value == ():
        return _NOT_PLAIN if parameter.required else value
    if value is parameter.default:
        return value
    wanted, info = descriptor.annotation, descriptor.parameter_info
    is_list = get_origin(wanted) is list and isinstance(value, list | tuple)
    if not is_list:
        # Something that several words make, a pair say, is nothing plain.
        return _NOT_PLAIN if parameter.multiple else _plain(wanted, value, info)
    values = [_plain(get_args(wanted)[0], one, info) for one in value]
    return _NOT_PLAIN if _NOT_PLAIN in values else values


def _is_checked(info: Any) -> bool:
    """Whether Typer is to look at a path, or may be given "-" for it."""
    return bool(
        info.exists
        or info.resolve_path
        or info.allow_dash
        or info.writable
        or info.path_type
        or not (info.file_okay and info.dir_okay)
    )


def _plain(wanted: Any, value: Any, info: Any) -> Any:
    if wanted is Path and isinstance(value, str) and not _is_checked(info):
        return Path(value)
    if wanted in (str, int, float, bool) and type(value) is wanted:
        return value
    if wanted is int and isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        return int(value)
    if wanted is float and isinstance(value, str) and _DECIMAL.fullmatch(value):
        return float(value)
    if isinstance(wanted, type) and issubclass(wanted, StrEnum) and value in list(wanted):
        return wanted(value)
    return _NOT_PLAIN


class MultiValueCommand(QuickCommand):
    """A command whose repeatable options also take several values in a row.

    `--initial-peers A B` is `--initial-peers A --initial-peers B`, as with argparse's nargs="+",
    which the original scripts used. A command with positional arguments has to say which further
    arguments can only be values, see `is_further_value`.
    """

    def is_further_value(self, _argument: str) -> bool:
        """Whether an argument that follows a repeatable option's value is one more value."""
        return True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option in front of every further value, then parse as usual."""
        repeatable = {
            name
            for parameter in self.params
            if getattr(parameter, "multiple", False)
            for name in parameter.opts
        }
        repeated = repeat_options(args, repeatable, self.is_further_value)
        return super().parse_args(ctx, repeated)


class SwitchCommand(MultiValueCommand):
    """A command whose switches also take a value: `--overlap false` is `--no-overlap`.

    The original scripts declare them so, with values like true, no and 1.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Turn values of switches into the switch or its opposite, then parse as usual."""
        switches = {
            name: parameter.secondary_opts[0] if parameter.secondary_opts else None
            for parameter in self.params
            if getattr(parameter, "is_flag", False)
            for name in parameter.opts
        }
        return super().parse_args(ctx, replace_switch_values(args, switches))


_TRUE_WORDS = frozenset(("yes", "true", "t", "y", "1"))
_FALSE_WORDS = frozenset(("no", "false", "f", "n", "0"))


def replace_switch_values(args: Sequence[str], switches: Mapping[str, str | None]) -> list[str]:
    """['--overlap', 'false'] -> ['--no-overlap'], for switches {'--overlap': '--no-overlap'}.

    A switch without an opposite is left out when its value is false.
    """
    replaced: list[str] = []
    remaining = list(args)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        word = value if equals else (remaining[0] if remaining else "")
        is_switch = name in switches
        is_value = word.lower() in _TRUE_WORDS | _FALSE_WORDS
        if not (is_switch and is_value):
            replaced.append(f"{name}{equals}{value}")
            continue
        if not equals:
            remaining.pop(0)
        opposite = switches[name]
        if word.lower() in _TRUE_WORDS:
            replaced.append(name)
        elif opposite is not None:
            replaced.append(opposite)
    return replaced


def repeat_options(
    args: Sequence[str],
    repeatable: Iterable[str],
    is_further_value: Callable[[str], bool] = lambda _: True,
) -> list[str]:
    """['--n', '1', '2', '--x'] -> ['--n', '1', '--n', '2', '--x'] for a repeatable '--n'.

    What `is_further_value` denies ends the option's values.
    """
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
            if values and not is_further_value(argument):
                current = None
            elif values:
                repeated.append(current)
            values += 1
        repeated.append(argument)
    return repeated
