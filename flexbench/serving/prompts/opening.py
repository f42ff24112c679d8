"""Which prompts a configuration asks for: the built-in text's, a given text's, a file's."""

from __future__ import annotations

from pathlib import Path

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.serving.config import PromptConfig
from flexbench.serving.prompts.passages import TextPrompts
from flexbench.serving.prompts.source import PromptSource
from flexbench.serving.prompts.text import BUILT_IN_TEXT
from flexbench.serving.prompts.tokenizers import load_tokenizer

MAX_TEXT_BYTES = 4 * 2**20
"""More of a text file is not read: places to take prompts from are plenty by then."""
_MAX_PATH_LENGTH = 4096
_OPTION = "--prompt-text-source"


def source_of(config: PromptConfig, series: int) -> PromptSource:
    """What `open_prompts` opens."""
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
