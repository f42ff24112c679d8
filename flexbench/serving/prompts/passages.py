"""Prompts that are passages of a text, cut to the token."""

from __future__ import annotations

from random import Random

from flexbench.core.errors import ConfigError
from flexbench.serving.config import PromptConfig
from flexbench.serving.prompts.lengths import draw_length
from flexbench.serving.prompts.source import PromptSource
from flexbench.serving.prompts.tokenizers import Tokenizer

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_MARK_LENGTH = 8
_NUM_MARKS = len(_DIGITS) ** _MARK_LENGTH
# Without a factor in common with 36, so that it permutes the marks; see `mark`.
_MARK_STEP = 1_234_567_891_013
# Prompts of two series have no mark in common within so many numbers.
_SERIES_STEP = 2**30

_STARTS = 6
"""Places of the text that are tried for a prompt of exactly the length."""
_TRIMS = 4
_FILLERS = (" a", ".", " the", "\n", "!")
_SAMPLE_CHARS = 2000
_WORD_CHARS = 40


def mark(number: int, offset: int) -> str:
    """What a prompt begins with: eight digits and letters that no other number's prompt has.

    The first k of them are different for any 36**k successive numbers (k <= 8), so that short
    prompts differ as early as they can: `number * step + offset` in base 36, lowest digit first,
    with a step that is prime to 36 and so permutes the numbers below every power of 36.
    """
    rest = (number * _MARK_STEP + offset) % _NUM_MARKS
    digits = []
    for _ in range(_MARK_LENGTH):
        rest, digit = divmod(rest, 36)
        digits.append(_DIGITS[digit])
    return "".join(digits)


class Text:
    """A text without end: after its last character it begins again."""

    def __init__(self, text: str) -> None:
        self._text = text if text[-1].isspace() else f"{text} "

    def place(self, random: Random) -> int:
        """The beginning of a word, if there is one soon after a place that is drawn."""
        place = int(random.random() * len(self._text))
        space = self._text.find(" ", place, place + _WORD_CHARS)
        return place if space < 0 else space + 1

    def passage(self, place: int, num_chars: int) -> str:
        """So many characters from `place` on."""
        passage = self._text[place : place + num_chars]
        missing = num_chars - len(passage)
        if missing:
            passage += (self._text * (missing // len(self._text) + 1))[:missing]
        return passage


class TextPrompts(PromptSource):
    """Each prompt is its mark and a passage from a place of its own.

    With a shared prefix: the prefix, then the mark and the passage. Lengths of the prompts are then
    drawn again while they leave no room for a mark. A prompt of less than eight tokens may hold but
    a part of its mark, and the fewer tokens, the sooner prompts repeat.
    """

    def __init__(
        self, config: PromptConfig, tokenizer: Tokenizer, series: int, *, text: str, name: str
    ) -> None:
        super().__init__(config, tokenizer, series)
        if config.shared_prefix >= config.prompt_length:
            raise ConfigError(
                "--shared-prefix",
                f"must be less than --prompt-length {config.prompt_length}: all prompts would be "
                "the same",
            )
        self._text = Text(text)
        self._source_name = name
        sample = text[:_SAMPLE_CHARS]
        self._chars_per_token = len(sample) / max(1, tokenizer.count(sample))
        self._random.seed(f"marks {config.prompt_generator_seed}")
        self._mark_offset = self._random.randrange(_NUM_MARKS) + series * _SERIES_STEP * _MARK_STEP
        self._beginning = ""
        self._beginning_ids: list[int] = []
        if config.shared_prefix:
            self._make_beginning()

    def _name(self) -> str:
        return self._source_name

    def _prompt(self, index: int) -> tuple[str, int, int | None]:
        config = self.config
        length = draw_length(
            self._random,
            config.prompt_length,
            config.prompt_length_var,
            minimum=config.shared_prefix + 1,
            maximum=config.max_prompt_length,
        )
        head = f"{self._beginning}{mark(index, self._mark_offset)} "
        prompt, num_tokens = self._fit(head, length)
        return prompt, num_tokens, None

    def _fit(self, head: str, length: int) -> tuple[str, int]:
        """`head` and a passage, together of exactly `length` tokens; else as near as it gets."""
        nearest: tuple[str, int] | None = None
        for _ in range(_STARTS):
            text, num_tokens = self._cut(head, self._text.place(self._random), length)
            if num_tokens == length and self._begins_right(text):
                return text, num_tokens
            if text and (nearest is None or abs(num_tokens - length) < abs(nearest[1] - length)):
                nearest = text, num_tokens
        self.num_inexact += 1
        return nearest if nearest is not None else (head, self.tokenizer.count(head))

    def _begins_right(self, text: str) -> bool:
        ids = self._beginning_ids
        return not ids or self.tokenizer.encode(text)[: len(ids)] == ids

    def _cut(self, head: str, place: int, length: int) -> tuple[str, int]:
        num_chars = int(self._chars_per_token * length * 1.2) + _WORD_CHARS
        while True:
            text = head + self._text.passage(place, num_chars)
            cut = self.tokenizer.cut(text, length)
            if len(cut) < len(text):
                break
            num_chars *= 2
        num_tokens = self.tokenizer.count(cut)
        if num_tokens == length:
            return cut, num_tokens
        return self._mend(text, cut, length)

    def _mend(self, text: str, cut: str, length: int) -> tuple[str, int]:
        """Tokens at the end of a text are others once it is cut: leave some away, or add some."""
        count = self.tokenizer.count
        wanted = length
        for _ in range(_TRIMS):
            surplus = count(cut) - length
            if surplus <= 0 or wanted == 1:
                break
            wanted = max(1, wanted - surplus)
            cut = self.tokenizer.cut(text, wanted)
        num_tokens = count(cut)
        while num_tokens < length:
            longer = (cut + filler for filler in _FILLERS)
            found = next((one for one in longer if count(one) == num_tokens + 1), None)
            if found is None:
                break
            cut, num_tokens = found, num_tokens + 1
        return cut, num_tokens

    def _make_beginning(self) -> None:
        """The tokens that all prompts share, and what parts them from a mark, if anything must."""
        seed = self.config.prompt_generator_seed
        self._random.seed(f"shared prefix {seed}")
        head = f"{mark(0, self._random.randrange(_NUM_MARKS))} "
        text, _ = self._fit(head, self.config.shared_prefix)
        ids = self.tokenizer.encode(text)
        for separator in ("", " ", "\n"):
            joined = (f"{text}{separator}{digit}" for digit in _DIGITS)
            if all(self.tokenizer.encode(one)[: len(ids)] == ids for one in joined):
                break
        self._beginning = text + separator
        self._beginning_ids = ids
