"""Models from where people have them: a published name, a model folder, a config.json."""

from __future__ import annotations

import difflib
import json
import re
import stat
from pathlib import Path
from typing import Any

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.core.folders import local_path
from flexbench.core.units import format_bytes
from flexbench.models.families import DecoderSpec, SpecError, decoder_spec
from flexbench.models.published import PUBLISHED_NAMES, published_spec

_LARGEST_CONFIG_BYTES = 10 * 2**20
# '24', '8GiB:192GiB', 'GiB': not '7b', which is how people call models.
_SIZE = re.compile(r"\d+(\.\d+)?(\s*[kmgtp]i?b?)?|[kmgtp]i?b", re.IGNORECASE | re.ASCII)


def find_model(model: str, *, option: str = "MODEL") -> DecoderSpec:
    """The model that `model` names: a folder, a config.json, or a published name, in this order.

    A model read from a folder is named by its path. Raises ConfigError, naming `option`, for what
    is none of them, and InputFileError for a configuration that cannot be used.
    """
    path = local_path(model) if model else None
    if path is not None and path.is_dir():
        return _read(path / "config.json", name=str(path))
    if path is not None:
        return _read(path, name=str(path.parent if path.name == "config.json" else path))
    try:
        return published_spec(model)
    except KeyError:
        raise ConfigError(option, _not_found(model)) from None


def _not_found(model: str) -> str:
    near = difflib.get_close_matches(model, PUBLISHED_NAMES, n=3, cutoff=0.5)
    short = {name.rpartition("/")[2]: name for name in PUBLISHED_NAMES}
    near = near or [short[n] for n in difflib.get_close_matches(model, short, n=3, cutoff=0.5)]
    problem = f"{model!r} is neither a folder, nor a config.json, nor a built-in name"
    if near:
        return f"{problem}; did you mean {' or '.join(near)}?"
    if all(_SIZE.fullmatch(part.strip()) for part in model.split(":")):
        return (
            f"{problem}; it looks like a value of --gpu-memory, which is written in one word after "
            "that option: 24GiB, or 8GiB:192GiB"
        )
    return f"{problem}\nBuilt-in: {', '.join(PUBLISHED_NAMES)}"


def _read(path: Path, *, name: str) -> DecoderSpec:
    values = _read_json(path)
    if not isinstance(values, dict):
        raise InputFileError(path, "must be a JSON object, as in Hugging Face's config.json")
    try:
        return decoder_spec(name, values)
    except SpecError as error:
        raise InputFileError(path, str(error)) from error


def _read_json(path: Path) -> Any:
    try:
        # Opening a pipe would wait for ever, and a device may have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputFileError(path, "is not a regular file")
        with path.open("rb") as file:
            content = file.read(_LARGEST_CONFIG_BYTES + 1)
    except FileNotFoundError as error:
        # A file that somebody named is there: see find_model.
        raise InputFileError(path.parent, f"is a folder without a {path.name}") from error
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error
    if len(content) > _LARGEST_CONFIG_BYTES:
        limit = format_bytes(_LARGEST_CONFIG_BYTES)
        raise InputFileError(path, f"is larger than {limit}: no model's configuration is")
    try:
        return json.loads(content.decode("utf-8-sig"))  # some editors write a byte order mark
    except (ValueError, RecursionError) as error:
        raise InputFileError(path, f"is not JSON: {error}") from error
