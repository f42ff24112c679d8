"""Text to token ids and back, for the service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from flexbench.core.errors import InputFileError, MissingDependencyError

TOKENIZER_FILE = "tokenizer.json"
# OPT's ids 0 to 3 are special: </s>, padding, the one before it, and the unknown token.
_FIRST_REAL_TOKEN = 4
_FIRST_CHARACTER = 33
_NUM_CHARACTERS = 90


class Codec(Protocol):
    """How prompts become tokens, and tokens text."""

    name: str

    def encode(self, text: str) -> list[int]:
        """Token ids, without special ones: a prompt of N tokens is N tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of new tokens."""


class ByteCodec:
    """A token for every byte of UTF-8; new tokens become one printable character each.

    What a model with random weights says means nothing in any language, so there is none to decode.
    """

    name = "byte"

    def __init__(self, vocab_size: int) -> None:
        self._num_ids = max(1, vocab_size - _FIRST_REAL_TOKEN)
        self._first = min(_FIRST_REAL_TOKEN, vocab_size - 1)

    def encode(self, text: str) -> list[int]:
        """The bytes, moved past OPT's special tokens; a small vocabulary is gone around again."""
        return [self._first + byte % self._num_ids for byte in text.encode(errors="replace")]

    def decode(self, ids: Sequence[int]) -> str:
        """A character for every token."""
        return "".join(chr(_FIRST_CHARACTER + token % _NUM_CHARACTERS) for token in ids)


class FileCodec:
    """A model's own tokenizer."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependencyError(
                f"{path} needs the package tokenizers, which is not installed: "
                "pip install tokenizers"
            ) from error
        self.name = str(path)
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:
            raise InputFileError(path, f"is not a tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        """By the tokenizer."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """By the tokenizer, special tokens left out."""
        return str(self._tokenizer.decode(list(ids)))


def open_codec(folder: Path | None, vocab_size: int) -> Codec:
    """The tokenizer in a model's folder if it has one, else bytes."""
    if folder is not None and (folder / TOKENIZER_FILE).is_file():
        return FileCodec(folder / TOKENIZER_FILE)
    return ByteCodec(vocab_size)


class RunningText:
    """The text of an answer, as its tokens come, up to the first of its stops."""

    def __init__(self, codec: Codec, stops: Sequence[str]) -> None:
        self._codec = codec
        self._stops = stops
        # What may be the beginning of a stop is not told before it is known to be none.
        self._held = max((len(stop) - 1 for stop in stops), default=0)
        self._ids: list[int] = []
        self._num_told = 0
        self.has_stopped = False

    def add(self, token_id: int, *, is_last: bool) -> str:
        """The text that is new with a token; all that is left with the last one."""
        self._ids.append(token_id)
        text = self._codec.decode(self._ids)
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.has_stopped = True
            text = text[: min(ends)]
        elif not is_last:
            text = text[: max(0, len(text) - self._held)]
            # A character that the next token completes.
            text = text.rstrip("\ufffd")
        new = text[self._num_told :]
        self._num_told = max(self._num_told, len(text))
        return new
