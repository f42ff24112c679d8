"""Prompts by their number: the same number is the same prompt, in whatever process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import Any

from flexbench.core.endpoint import GenerationRequest
from flexbench.serving.config import PromptConfig
from flexbench.serving.prompts.lengths import LENGTHS_RULE, draw_length
from flexbench.serving.prompts.tokenizers import Tokenizer, count_tokens


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
