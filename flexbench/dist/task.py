"""What is to be generated: the prompts, how many tokens, and how they are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexbench.core.checks import check_count, check_seed
from flexbench.core.errors import ConfigError
from flexbench.dist.config import DebugMode, check_stop, check_temperature
from flexbench.dist.opt_config import OptConfig

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts and what is asked of them. Made by `make_task`, which checks everything."""

    input_ids: IntArray
    """(num_prompts, prompt_len), int64, padded on the left."""
    num_pad: IntArray
    """(num_prompts,): how many of a prompt's first tokens are padding."""
    gen_len: int
    num_tokens: int
    """Tokens that are really generated: fewer than gen_len where the rest is projected."""
    do_sample: bool
    temperature: float
    seed: int
    stop: int | None
    debug_mode: DebugMode | None

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return int(self.input_ids.shape[0])

    @property
    def prompt_len(self) -> int:
        """Tokens of a prompt, padding included."""
        return int(self.input_ids.shape[1])

    @property
    def max_length(self) -> int:
        """Positions for which keys and values are kept: the last token is never fed back."""
        return self.prompt_len + self.num_tokens - 1


def make_task(
    config: OptConfig,
    inputs: IntArray | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    stop: int | None = None,
    debug_mode: str | None = None,
    cut_gen_len: int | None = None,
    seed: int = 0,
) -> Task:
    """Check what is asked, and pad prompts of different lengths on the left.

    Raises ConfigError naming the option for what cannot work.
    """
    check_count("--gen-len", max_new_tokens, minimum=1)
    check_seed("--seed", seed)
    check_temperature(temperature, do_sample=do_sample)
    if cut_gen_len is not None:
        check_count("--cut-gen-len", cut_gen_len, minimum=1)
    mode = _debug_mode(debug_mode)
    if stop is not None:
        check_count("--stop", stop, minimum=0, maximum=config.vocab_size - 1)
        check_stop(stop, cut_gen_len=cut_gen_len, debug_mode=mode)
    input_ids = _pad(inputs, config.pad_token_id)
    _check_tokens(input_ids, config, max_new_tokens)
    num_tokens = min(max_new_tokens, cut_gen_len or max_new_tokens)
    return Task(
        input_ids=input_ids,
        num_pad=_count_padding(input_ids, config.pad_token_id),
        gen_len=max_new_tokens,
        num_tokens=min(num_tokens, 2) if mode else num_tokens,
        do_sample=do_sample,
        temperature=temperature,
        seed=seed,
        stop=stop,
        debug_mode=mode,
    )


def _debug_mode(name: str | None) -> DebugMode | None:
    try:
        return None if name is None else DebugMode(name)
    except ValueError:
        raise ConfigError(
            "--debug-mode", f"unknown mode {name!r}; accepted: {', '.join(DebugMode)}"
        ) from None


def _pad(inputs: IntArray | Sequence[Sequence[int]], pad_token_id: int) -> IntArray:
    prompts = [np.asarray(prompt) for prompt in inputs]
    longest = max((prompt.size for prompt in prompts), default=0)
    if not longest:
        raise ConfigError("inputs", "there are no prompts, or they are empty")
    padded = np.full((len(prompts), longest), pad_token_id, dtype=np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer) or not prompt.size:
            raise ConfigError("inputs", "each prompt must be a list of at least one token id")
        row[longest - prompt.size :] = prompt
    return padded


def _check_tokens(input_ids: IntArray, config: OptConfig, gen_len: int) -> None:
    if input_ids.min() < 0 or input_ids.max() >= config.vocab_size:
        raise ConfigError("inputs", f"token ids must be between 0 and {config.vocab_size - 1}")
    if (input_ids == config.pad_token_id).all(axis=1).any():
        raise ConfigError("inputs", f"a prompt holds only padding, token {config.pad_token_id}")
    longest = config.max_position_embeddings
    if input_ids.shape[1] + gen_len > longest:
        raise ConfigError(
            "--prompt-len",
            f"{input_ids.shape[1]} + {gen_len} new tokens are more than the {longest} positions of "
            f"{config.name}",
        )


def _count_padding(input_ids: IntArray, pad_token_id: int) -> IntArray:
    """Only what stands in front is padding: the same token within a prompt is meant."""
    return np.asarray((input_ids != pad_token_id).argmax(axis=1))
