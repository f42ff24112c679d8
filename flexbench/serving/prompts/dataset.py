"""Prompts from a .jsonl dataset: one object a line, with a prompt or a conversation."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from flexbench.core.checks import MAX_COUNT
from flexbench.core.errors import ConfigError, InputFileError
from flexbench.serving.config import PromptConfig
from flexbench.serving.prompts.source import PromptSource
from flexbench.serving.prompts.tokenizers import Tokenizer

_TEXT_KEYS = ("prompt", "text")
_CONVERSATION_KEYS = ("conversations", "messages")
_LIMIT_KEYS = ("max_new_tokens", "output_len")
_PEOPLE = frozenset(("human", "user"))
_TRIMS = 8


class Entry(NamedTuple):
    """A line of a dataset."""

    prompt: str
    max_new_tokens: int | None


class DatasetPrompts(PromptSource):
    """The dataset's prompts as they are, in an order that the seed and the series decide.

    One that is longer than max_prompt_length is cut there. After the last one the first comes
    again: `num_distinct` says after how many that may be.
    """

    def __init__(
        self, config: PromptConfig, tokenizer: Tokenizer, series: int, *, path: Path
    ) -> None:
        super().__init__(config, tokenizer, series)
        if config.shared_prefix:
            raise ConfigError("--shared-prefix", "does not go with a dataset: its prompts are used")
        self._path = path
        self._entries = load_entries(path)
        self.num_distinct = len({entry.prompt for entry in self._entries})
        self._order = list(range(len(self._entries)))
        Random(f"order {config.prompt_generator_seed} {series}").shuffle(self._order)  # noqa: S311

    def _name(self) -> str:
        return str(self._path)

    def _prompt(self, index: int) -> tuple[str, int, int | None]:
        entry = self._entries[self._order[index % len(self._order)]]
        limit = self.config.max_prompt_length
        wanted = limit
        prompt = self.tokenizer.cut(entry.prompt, wanted)
        num_tokens = self.tokenizer.count(prompt)
        for _ in range(_TRIMS):
            # Tokens at the end of a text are others once it is cut, and may be more.
            if num_tokens <= limit or wanted == 1:
                break
            wanted = max(1, wanted - (num_tokens - limit))
            prompt = self.tokenizer.cut(entry.prompt, wanted)
            num_tokens = self.tokenizer.count(prompt)
        if not prompt or num_tokens > limit:
            self.num_inexact += 1
        if not prompt:  # the first character alone is longer than the limit
            prompt = entry.prompt[0]
            num_tokens = self.tokenizer.count(prompt)
        return prompt, num_tokens, entry.max_new_tokens


def load_entries(path: Path) -> tuple[Entry, ...]:
    """All lines of a dataset; empty ones are passed over. Raises InputFileError with the line."""
    try:
        status = path.stat()
        return _load(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error


@lru_cache(maxsize=2)
def _load(path: Path, _modified_ns: int, _size: int) -> tuple[Entry, ...]:
    """Read once, however many points of a run take prompts from it."""
    entries = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            stripped = line.strip().removeprefix(b"\xef\xbb\xbf")
            if stripped:
                entries.append(_entry(path, number, stripped))
    if not entries:
        raise InputFileError(path, "has no prompts")
    return tuple(entries)


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputFileError(path, "is no line of JSON", line=number) from error
    try:
        prompt = _prompt_of(record)
        prompt.encode()
        return Entry(prompt, _limit_of(record))
    except UnicodeEncodeError as error:
        raise InputFileError(path, "has half a character (\\ud800 to \\udfff)", line=number) from (
            error
        )
    except ValueError as error:
        raise InputFileError(path, f"{error}", line=number) from error


def _prompt_of(record: Any) -> str:
    """Raises ValueError that says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("is no object: {...} is wanted")
    for key in _TEXT_KEYS:
        if key in record:
            return _text(key, record[key])
    for key in _CONVERSATION_KEYS:
        if key in record:
            return _first_question(key, record[key])
    raise ValueError(f"has none of {', '.join((*_TEXT_KEYS, *_CONVERSATION_KEYS))}")


def _first_question(key: str, turns: Any) -> str:
    """What a person says first, as ShareGPT or as OpenAI write it down."""
    if not isinstance(turns, list):
        raise ValueError(f"{key} is no list")
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"{key} has something that is no object")
        if turn.get("from", turn.get("role")) in _PEOPLE:
            return _text(key, turn.get("value", turn.get("content")))
    raise ValueError(f"{key} has no turn of a human or user")


def _text(key: str, value: Any) -> str:
    if isinstance(value, list):  # OpenAI's parts; images are left out
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        value = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value


def _limit_of(record: dict[str, Any]) -> int | None:
    for key in _LIMIT_KEYS:
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
            raise ValueError(f"{key} is no whole number of at least 1")
        return value
    return None
