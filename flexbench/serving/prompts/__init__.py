"""Prompts of a run: seeded, of exact lengths, without a beginning in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexbench.serving.config import PromptConfig
    from flexbench.serving.prompts.source import PromptSource


def open_prompts(config: PromptConfig, *, series: int = 0) -> PromptSource:
    """The prompts that `config` describes; the same in every process that opens them.

    Prompts of two `series` differ where those of one would be the same, so that a server that has
    answered one point of a run knows no prompt of the next. Raises ConfigError, InputFileError or
    MissingDependencyError.
    """
    from flexbench.serving.prompts.opening import source_of

    return source_of(config, series)
