"""Models from where people have them: a published name, a model folder, a config.json."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.core.folders import local_path
from flexbench.models.families import DecoderSpec, SpecError, decoder_spec
from flexbench.models.published import PUBLISHED_NAMES, published_spec


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
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return (
        f"{model!r} is neither a folder, nor a config.json, nor a built-in name{hint}\n"
        f"Built-in: {', '.join(PUBLISHED_NAMES)}"
    )


def _read(path: Path, *, name: str) -> DecoderSpec:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(path, f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputFileError(path, "must be a JSON object, as in Hugging Face's config.json")
    try:
        return decoder_spec(name, values)
    except SpecError as error:
        raise InputFileError(path, str(error)) from error
