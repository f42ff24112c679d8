"""--config-file: YAML files with values, or lists of values, for the options of prompts.

Lists make all combinations within their file, and several files follow each other. The loads of
each combination, num_clients or rate, are a sweep and so not part of the product: it may end early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from flexbench.core.errors import ConfigError, InputFileError, MissingDependencyError
from flexbench.serving.config import Load, PromptConfig

MAX_SETTINGS = 10_000
_MAX_BYTES = 2**20
_NUM_CLIENTS = "num_clients"
_RATE = "rate"
_LOADS = (_NUM_CLIENTS, _RATE)
_MISSPELT = {"prompt_lenght_var": "prompt_length_var"}


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What stands in a file: a key's values in the file's order, a single one too."""

    path: Path
    values: Mapping[str, tuple[Any, ...]]
    lines: Mapping[str, int]


def _say(warning: str) -> None:
    typer.echo(f"Warning: {warning}", err=True)


def expand(
    paths: Sequence[Path], base: Mapping[str, Any], *, warn: Callable[[str], None] = _say
) -> list[dict[str, Any]]:
    """The settings of several files, in order: `base` with what a file says instead.

    A setting has a single value for each field of PromptConfig. Its num_clients and rate are lists,
    or None; if a file has one of them, the other one of `base` is None. `warn` is told of names
    that are accepted in spite of their spelling. Raises InputFileError, with the line where it is
    known, or MissingDependencyError.
    """
    return combine([read_config_file(path, warn=warn) for path in paths], base)


def combine(files: Iterable[ConfigFile], base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All combinations of each file's values, the first field of PromptConfig varying slowest.

    A setting that is there already is left out.
    """
    settings: dict[str, dict[str, Any]] = {}
    num_settings = 0
    for file in files:
        names = [name for name in _prompt_types() if name in file.values]
        choices = [file.values[name] for name in names]
        own = prod(len(values) for values in choices)
        num_settings += own
        if num_settings > MAX_SETTINGS:
            problem = f"has {own:,} combinations; all files together may have {MAX_SETTINGS:,}"
            raise InputFileError(file.path, problem)
        loads: dict[str, Any] = {}
        if not file.values.keys().isdisjoint(_LOADS):
            loads = {name: list(file.values.get(name, ())) or None for name in _LOADS}
        for values in product(*choices):
            setting = {**base, **dict(zip(names, values, strict=True)), **loads}
            _check(file, setting)
            settings.setdefault(repr(setting), setting)
    return list(settings.values())


def _check(file: ConfigFile, setting: Mapping[str, Any]) -> None:
    """Let PromptConfig say what it says, and add the file."""
    values = {name: setting[name] for name in _prompt_types() if name in setting}
    if values.get("max_prompt_length") is None:  # not said: it will follow the length
        values["max_prompt_length"] = values.get("prompt_length", PromptConfig.prompt_length)
    try:
        PromptConfig(**values)
    except ConfigError as error:
        line = file.lines.get(error.option.removeprefix("--").replace("-", "_"))
        raise InputFileError(file.path, f"{error}", line=line) from error


def read_config_file(path: Path, *, warn: Callable[[str], None]) -> ConfigFile:
    """A file's values, checked for their types and names. Raises InputFileError with the line."""
    yaml = _yaml()
    text = _read(path)
    loader = yaml.SafeLoader(text)
    values: dict[str, tuple[Any, ...]] = {}
    lines: dict[str, int] = {}
    try:
        root = loader.get_single_node()
        for key_node, value_node in _pairs(yaml, path, root):
            line = key_node.start_mark.line + 1
            key = _key(yaml, path, key_node, line, warn)
            if key in values:
                problem = f"{key} stands in line {lines[key]} already"
                raise InputFileError(path, problem, line=line)
            nodes = _scalars(yaml, path, key, value_node, line)
            found = [(node.start_mark.line + 1, loader.construct_object(node)) for node in nodes]
            values[key] = tuple(_converted(path, key, value, at) for at, value in found)
            lines[key] = line
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or f"{error}".partition("\n")[0]
        at = mark.line + 1 if mark is not None else None
        raise InputFileError(path, f"is no YAML: {problem}", line=at) from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(path, f"is no YAML: {error}") from error
    finally:
        loader.dispose()
    if _NUM_CLIENTS in values and _RATE in values:
        problem = f"{_RATE} is another kind of load than {_NUM_CLIENTS}; give one"
        raise InputFileError(path, problem, line=max(lines[_RATE], lines[_NUM_CLIENTS]))
    return ConfigFile(path=path, values=values, lines=lines)


def _yaml() -> Any:
    try:
        from importlib import import_module

        return import_module("yaml")
    except ImportError as error:
        raise MissingDependencyError(
            "--config-file needs PyYAML, which is not installed: pip install 'flexbench[serving]'"
        ) from error


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise InputFileError(path, "is too large for a file of options")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputFileError(path, "is no text in UTF-8", line=line) from error


def _pairs(yaml: Any, path: Path, root: Any) -> list[tuple[Any, Any]]:
    if root is None:
        raise InputFileError(path, "is empty; it should have lines like 'prompt_length: 512'")
    if not isinstance(root, yaml.MappingNode):
        problem = "should have lines like 'prompt_length: 512'"
        raise InputFileError(path, problem, line=root.start_mark.line + 1)
    if not root.value:
        raise InputFileError(path, "is empty; it should have lines like 'prompt_length: 512'")
    pairs: list[tuple[Any, Any]] = root.value
    return pairs


def _key(yaml: Any, path: Path, node: Any, line: int, warn: Callable[[str], None]) -> str:
    written = node.value if isinstance(node, yaml.ScalarNode) else "this"
    key = written.replace("-", "_")
    if key in _MISSPELT:
        key = _MISSPELT[key]
        warn(f"{path}:{line}: {written} is taken as {key}.")
    accepted = [*_prompt_types(), *_LOADS]
    if key not in accepted:
        nearest = get_close_matches(key, accepted, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        problem = f"{written} is not one of {', '.join(accepted)}{hint}"
        raise InputFileError(path, problem, line=line)
    return key


def _scalars(yaml: Any, path: Path, key: str, node: Any, line: int) -> list[Any]:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not nodes:
        raise InputFileError(path, f"{key} has an empty list", line=line)
    for one in nodes:
        if not isinstance(one, yaml.ScalarNode):
            problem = f"{key} must be a value or a list of values"
            raise InputFileError(path, problem, line=one.start_mark.line + 1)
    scalars: list[Any] = nodes
    return scalars


def _prompt_types() -> dict[str, Any]:
    hints = get_type_hints(PromptConfig)
    return {one.name: hints[one.name] for one in fields(PromptConfig)}


def _converted(path: Path, key: str, value: Any, line: int) -> Any:
    wanted = {_NUM_CLIENTS: int, _RATE: float}.get(key) or _prompt_types()[key]
    kinds = get_args(wanted) or (wanted,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds:
        value = _as_float(value)
    # bool is an int for isinstance, and not for people.
    if type(value) not in kinds:
        name = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        quote = "; put it in quotes" if str in kinds and value is not None else ""
        problem = f"{key} must be {name[kinds[0]]}, not {value!r}{quote}"
        raise InputFileError(path, problem, line=line)
    try:
        # A load's own checks say what is accepted.
        if key == _NUM_CLIENTS:
            Load(concurrency=value, num_requests=1)
        elif key == _RATE:
            Load(rate_per_s=value, num_requests=1)
    except ConfigError as error:
        raise InputFileError(path, f"{key} {error.problem}", line=line) from error
    return value


def _as_float(value: Any) -> Any:
    """A number of YAML as a float; 1e-1, without a point, is text for YAML 1.1."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
