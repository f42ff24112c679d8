"""Prompts by their number: the same number is the same prompt, in whatever process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from flexbench.core.endpoint import GenerationRequest
from flexbench.core.errors import ConfigError, InputFileError
from flexbench.serving.config import PromptConfig
from flexbench.serving.prompts.lengths import LENGTHS_RULE, draw_length
from flexbench.serving.prompts.text import BUILT_IN_TEXT
from flexbench.serving.prompts.tokenizers import Tokenizer, count_tokens, load_tokenizer

MAX_TEXT_BYTES = 4 * 2**20
"""More of a text file is not read: places to take prompts from are plenty by then."""
_MAX_PATH_LENGTH = 4096
_OPTION = "--prompt-text-source"


class PromptSource(ABC):
    """Makes the request of any number, a negative one too, without those before it.

    Not to be shared between threads.
    """

    num_distinct: int | None = None
    """How many prompts there are before one comes again; None: as many as are asked for."""

    def __init__(self, config: PromptConfig, tokenizer: Tokenizer, series: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.num_inexact = 0
        """Prompts so far that could not be made as long as drawn; what they say is still true."""
        self._series = series
        self._random = Random()  # noqa: S311 - nothing to keep secret

    @property
    def is_slow(self) -> bool:
        """Whether a prompt takes far more than microseconds."""
        return not self.tokenizer.is_quick

    def request(self, index: int) -> GenerationRequest:
        """The request of this number. `prompt_tokens` is what its prompt really has."""
        config = self.config
        # Whole numbers from 0, for the generator takes the absolute value of a seed.
        number = 2 * index if index >= 0 else -2 * index - 1
        self._random.seed(number << 64 | self._series << 32 | config.prompt_generator_seed)
        # Drawn first: the same for any tokenizer and text.
        max_new_tokens = draw_length(self._random, config.max_new_tokens, config.max_new_tokens_var)
        prompt, prompt_tokens, own_limit = self._prompt(index)
        return GenerationRequest(
            index=index,
            prompt=prompt,
            prompt_tokens=prompt_tokens,
            max_new_tokens=own_limit or max_new_tokens,
            is_streaming=config.streaming,
        )

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of an answer's pieces, joined: for servers that do not say.

        A tokenizer that only stands in for the model's counts bytes: a piece of a stream is nearer
        to a token than that, and counts as one.
        """
        if self.tokenizer.is_stand_in and self.config.streaming:
            return len(texts)
        return count_tokens(self.tokenizer, texts)

    def describe(self) -> dict[str, Any]:
        """What a record says of the prompts."""
        return {
            "source": self._name(),
            "tokenizer": self.tokenizer.name,
            "tokenizer_is_stand_in": self.tokenizer.is_stand_in,
            "num_distinct": self.num_distinct,
            "lengths": LENGTHS_RULE,
        }

    @abstractmethod
    def _prompt(self, index: int) -> tuple[str, int, int | None]:
        """The prompt, its length, and the new tokens that it asks for itself, if it does."""

    @abstractmethod
    def _name(self) -> str:
        """Where prompts come from, for records."""


def source_of(config: PromptConfig, series: int) -> PromptSource:
    """What `open_prompts` opens."""
    from flexbench.serving.prompts.passages import TextPrompts

    if not 0 <= series < 2**32:
        raise ValueError(f"a series is a number from 0 to 2**32 - 1, not {series}")
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    given = config.prompt_text_source
    if given is None:
        return TextPrompts(config, tokenizer, series, text=BUILT_IN_TEXT, name="built-in text")
    path = _path_of(given)
    if path is None:
        return TextPrompts(config, tokenizer, series, text=_checked(given), name="text")
    if path.suffix == ".jsonl":
        from flexbench.serving.prompts.dataset import DatasetPrompts

        return DatasetPrompts(config, tokenizer, series, path=path)
    return TextPrompts(config, tokenizer, series, text=_read_text(path), name=str(path))


def _path_of(source: str) -> Path | None:
    """The file that a --prompt-text-source names; None: it is the text itself."""
    if len(source) > _MAX_PATH_LENGTH or "\n" in source or "\0" in source:
        return None
    path = Path(source)
    try:
        if path.exists():
            return path
    except OSError:  # no name that a file could have
        return None
    # A mistyped name must not become a prompt without a word.
    is_one_word = source == "".join(source.split())
    if path.suffix == ".jsonl" or (is_one_word and (path.suffix == ".txt" or "/" in source)):
        raise InputFileError(path, "there is no such file; a text has several words")
    return None


def _checked(text: str) -> str:
    if not text.strip():
        raise ConfigError(_OPTION, "is empty; give a text, a text file or a .jsonl dataset")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(_OPTION, "is no text in UTF-8") from error
    return text


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES)
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error
    try:
        # The end of what was read may be in the middle of a character.
        text = data.decode(errors="strict" if len(data) < MAX_TEXT_BYTES else "ignore")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputFileError(path, "is no text in UTF-8", line=line) from error
    if not text.strip():
        raise InputFileError(path, "is empty; prompts are taken from it")
    return text
