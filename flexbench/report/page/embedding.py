"""What goes into an HTML document that is not HTML: data, and the hashes of scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from flexbench.core.printable import printable

# What could end a script element, or begin a comment in one, as JSON writes it otherwise.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def content_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def to_json(value: Any) -> Markup:
    """JSON that can stand in a script element; ASCII alone. NaN and infinity become null.

    Raises RecursionError for what is nested some hundreds of levels deep.
    """
    text = json.dumps(_without_nan(value), allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))  # noqa: S704 - nothing in it is HTML any more


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def printable_values(value: Any) -> Any:
    """A copy in which every text is printable."""
    if isinstance(value, Mapping):
        return {key: printable_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable_values(item) for item in value]
    if isinstance(value, str) and not value.isprintable():
        return printable(value)
    return value


Path = tuple[str | int, ...]


def differences(one: Any, other: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Where `other` differs from `one`, and what is there: what makes one into the other.

    The parts that have the same keys, or the same length, are gone into; others come whole.
    """
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], (*path, key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, (*path, index))
    else:
        yield path, other
