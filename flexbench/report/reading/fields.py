"""Values of a record, by name, checked: whatever a file holds, what comes out is what it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

MAX_COUNT = 10**9
_MAX_QUOTE_LENGTH = 60


class RecordError(ValueError):
    """What is wrong with a record, for people."""


def value_of(values: Mapping[str, Any], name: str) -> Any:
    """Whatever stands there. Raises RecordError when nothing does."""
    if name not in values:
        raise RecordError(f"{name!r} is missing")
    return values[name]


def as_object(name: str, value: Any) -> Mapping[str, Any]:
    """The value, if it is a JSON object. Raises RecordError, which calls it `name`."""
    if not isinstance(value, dict):
        raise RecordError(f"{name} must be a JSON object, not {quote(value)}")
    return value


def as_list(name: str, value: Any) -> list[Any]:
    """The value, if it is a list. Raises RecordError, which calls it `name`."""
    if not isinstance(value, list):
        raise RecordError(f"{name} must be a list, not {quote(value)}")
    return value


def as_number(name: str, value: Any) -> float:
    """The value, if it is a finite number. Raises RecordError, which calls it `name`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise RecordError(f"{name} must be a finite number, not {quote(value)}")
    return float(value)


def object_of(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The JSON object that has to stand there."""
    return as_object(name, value_of(values, name))


def find_object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The JSON object there, an empty one where there is none."""
    value = values.get(name)
    return {} if value is None else as_object(name, value)


def find_list(values: Mapping[str, Any], name: str) -> list[Any]:
    """The list there, an empty one where there is none."""
    value = values.get(name)
    return [] if value is None else as_list(name, value)


def text_of(values: Mapping[str, Any], name: str) -> str:
    """The text that has to stand there."""
    return as_text(name, value_of(values, name))


def as_text(name: str, value: Any) -> str:
    """The value, if it is a text. Raises RecordError, which calls it `name`."""
    # Half of a surrogate pair, which JSON can write, cannot be printed.
    if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
        raise RecordError(f"{name} must be a text, not {quote(value)}")
    return value


def find_text(values: Mapping[str, Any], name: str) -> str | None:
    """The text there; None where there is none, or an empty one."""
    return None if values.get(name) in (None, "") else text_of(values, name)


def count_of(values: Mapping[str, Any], name: str, *, minimum: int = 1) -> int:
    """The whole number that has to stand there."""
    value = value_of(values, name)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not minimum <= value <= MAX_COUNT:
        raise RecordError(
            f"{name} must be a whole number of at least {minimum}, not {quote(value)}"
        )
    return int(value)


def find_count(values: Mapping[str, Any], name: str, *, minimum: int = 1) -> int | None:
    """The whole number there; None where there is none."""
    return None if values.get(name) is None else count_of(values, name, minimum=minimum)


def number_of(values: Mapping[str, Any], name: str) -> float | None:
    """The number that has to stand there, or null."""
    value = value_of(values, name)
    return None if value is None else as_number(name, value)


def measurement_of(values: Mapping[str, Any], name: str) -> float | None:
    """The number of at least 0, or null, that has to stand there."""
    value = number_of(values, name)
    if value is not None and value < 0:
        raise RecordError(f"{name} must be a number of at least 0, not {quote(value)}")
    return value


def find_measurement(values: Mapping[str, Any], name: str) -> float | None:
    """The number of at least 0 there; None where there is none."""
    return None if values.get(name) is None else measurement_of(values, name)


def find_number(values: Mapping[str, Any], name: str) -> float | None:
    """The number there; None where there is none."""
    return None if values.get(name) is None else number_of(values, name)


def find_flag(values: Mapping[str, Any], name: str) -> bool | None:
    """Whether it is so; None where it does not say."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise RecordError(f"{name} must be true or false, not {quote(value)}")
    return value


def quote(value: Any) -> str:
    """As it stands in the file, unless it is long."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= _MAX_QUOTE_LENGTH else f"{text[:_MAX_QUOTE_LENGTH]}..."
