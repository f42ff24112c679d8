"""Tokenizers: what a token is when prompts are cut and answers are counted.

Special tokens, such as one for the beginning of a text, are never added and so not counted: a
server that adds some, or a chat template, reports a longer prompt than the one that was drawn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from flexbench.core.errors import ConfigError, InputFileError, MissingDependencyError

BYTE = "byte"
AUTO = "auto"
_OPTION = "--tokenizer"
_FAST_FILE = "tokenizer.json"
_OTHER_FILES = (
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
)


class Tokenizer(Protocol):
    """Text to tokens and back."""

    name: str
    """For records: 'byte', or the folder or hub name."""
    is_stand_in: bool
    """The model has another one, which is not known here: its tokens are counted as bytes."""
    is_quick: bool
    """Whether a prompt takes microseconds."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""

    def count(self, text: str) -> int:
        """How many tokens a text has."""

    def cut(self, text: str, num_tokens: int) -> str:
        """The beginning of `text` with its first `num_tokens` tokens, or all of it.

        Ends between two characters. Tokenized again, it may have another number of tokens.
        """


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Tokens of an answer that came in pieces, joined."""
    text = "".join(texts)
    try:
        return tokenizer.count(text)
    except UnicodeError:
        # Halves of a character that a server sent in two pieces, or a half without its other one.
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return tokenizer.count(whole)


class ByteTokenizer:
    """Each byte of UTF-8 is a token. Needs no file and no package."""

    name = BYTE
    is_quick = True

    def __init__(self, *, is_stand_in: bool = False) -> None:
        self.is_stand_in = is_stand_in

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes."""
        return bytes(ids).decode(errors="replace")

    def count(self, text: str) -> int:
        """How many bytes a text has."""
        return len(text.encode())

    def cut(self, text: str, num_tokens: int) -> str:
        """At most so many bytes, and no part of a character."""
        return text.encode()[:num_tokens].decode(errors="ignore")


class FastTokenizer:
    """One of the `tokenizers` library, as in a tokenizer.json."""

    is_stand_in = False
    is_quick = False

    def __init__(self, backend: Any, name: str) -> None:
        # A file may ask for both, and lengths would be wrong without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.name = name

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self._backend.decode(list(ids))
        return text

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self._backend.encode(text, add_special_tokens=False))

    def cut(self, text: str, num_tokens: int) -> str:
        """Up to the last character of the last of these tokens."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if len(encoding) <= num_tokens:
            return text
        end: int = encoding.offsets[num_tokens - 1][1]
        return text[:end]


class SlowTokenizer:
    """One of transformers that is written in Python, such as those of plain SentencePiece files."""

    is_stand_in = False
    is_quick = False

    def __init__(self, backend: Any, name: str) -> None:
        backend.model_max_length = 10**9  # it would warn of longer texts
        self._backend = backend
        self.name = name

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self._backend.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.encode(text))

    def cut(self, text: str, num_tokens: int) -> str:
        """The longest beginning that has no more tokens."""
        if self.count(text) <= num_tokens:
            return text
        # Decoding the first tokens would not give back what an unknown token stands for.
        lengths = range(len(text))
        end = bisect_right(lengths, num_tokens, key=lambda length: self.count(text[:length])) - 1
        return text[: max(0, end)]


@lru_cache(maxsize=4)
def load_tokenizer(name: str, model: str) -> Tokenizer:
    """The tokenizer that --tokenizer names; auto: that of the folder `model`, else bytes.

    Only a hub name that the person gave is looked for on the hub. Raises ConfigError,
    InputFileError or MissingDependencyError.
    """
    if name == BYTE:
        return ByteTokenizer()
    if name == AUTO:
        folder = Path(model)
        is_folder = any((folder / file).is_file() for file in (_FAST_FILE, *_OTHER_FILES))
        return _from_folder(folder) if is_folder else ByteTokenizer(is_stand_in=True)
    folder = Path(name)
    if folder.is_dir():
        return _from_folder(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise ConfigError(_OPTION, f"{name} is no folder with a {_FAST_FILE}")
    return _from_transformers(name)


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / _FAST_FILE
    if not path.is_file():
        if not any((folder / file).is_file() for file in _OTHER_FILES):
            raise ConfigError(_OPTION, f"the folder {folder} has no {_FAST_FILE}")
        return _from_transformers(str(folder))
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is read by the package tokenizers, which is not installed: "
            f"pip install tokenizers, or count bytes with {_OPTION} {BYTE}"
        ) from error
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        reason = f"{error}".partition("\n")[0]
        problem = f"cannot be read as a tokenizer by tokenizers {tokenizers.__version__}: {reason}"
        raise InputFileError(path, problem) from error
    return FastTokenizer(backend, str(folder))


def _from_transformers(name: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"The tokenizer {name} is read by the package transformers, which is not installed: "
            f"pip install transformers, or name a folder with a {_FAST_FILE}, "
            f"or count bytes with {_OPTION} {BYTE}"
        ) from error
    try:
        backend = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ImportError as error:
        reason = f"{error}".strip().partition("\n")[0]
        raise MissingDependencyError(f"The tokenizer {name} needs a package: {reason}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = f"{error}".strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            _OPTION,
            f"{name} cannot be loaded ({reason}). Without a hub, name a folder with a "
            f"{_FAST_FILE}, or count bytes with {_OPTION} {BYTE}",
        ) from error
    if getattr(backend, "is_fast", False):
        return FastTokenizer(backend.backend_tokenizer, name)
    return SlowTokenizer(backend, name)
