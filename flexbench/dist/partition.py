"""Which layers each pipeline stage gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from flexbench.core.errors import ConfigError
from flexbench.dist.opt_config import POSITION_OFFSET, OptConfig


class Balance(StrEnum):
    """What is to be as equal as possible on all stages."""

    LAYERS = "layers"
    MEMORY = "memory"
    TIME = "time"


@dataclass(frozen=True)
class Stage:
    """One pipeline stage and its transformer layers."""

    rank: int
    num_stages: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Whether it has the input embedding."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the output embedding."""
        return self.rank == self.num_stages - 1


def split_layers(
    config: OptConfig,
    num_stages: int,
    balance: Balance = Balance.LAYERS,
    *,
    positions_per_token: float = 1.0,
) -> list[Stage]:
    """Consecutive ranges of transformer layers, one a stage, each of at least one layer.

    `layers` is the rule of FlexGen's DistOptLM: as even as possible, the first stages take the
    remainder. `memory` and `time` count the embeddings, too. For `time`, layers compute
    `positions_per_token` positions for each new token: all of a prompt's, of which the output
    embedding computes the last only, and so does the last layer but for its queries, keys and
    values; every position counts alike, as where products bound it.
    Raises ConfigError for more stages than layers.
    """
    if not 1 <= num_stages <= config.num_hidden_layers:
        raise ConfigError(
            "--world-size",
            f"{num_stages} pipeline stages cannot share the {config.num_hidden_layers} transformer "
            f"layers of {config.name}; accepted: 1 to {config.num_hidden_layers}",
        )
    if balance is Balance.LAYERS:
        whole, remainder = divmod(config.num_hidden_layers, num_stages)
        counts = [whole + (rank < remainder) for rank in range(num_stages)]
    else:
        counts = _level(config, _extra_loads(config, num_stages, balance, positions_per_token))
    starts = [sum(counts[:rank]) for rank in range(num_stages)]
    return [
        Stage(rank, num_stages, range(start, start + count))
        for rank, (start, count) in enumerate(zip(starts, counts, strict=True))
    ]


def _extra_loads(
    config: OptConfig, num_stages: int, balance: Balance, positions_per_token: float
) -> list[float]:
    """What each stage has beside equal layers, in transformer layers.

    That is its embeddings, less what the last layer need not compute.
    """
    layer = config.layer_parameters()
    table = config.vocab_size * config.embed_dim
    positions = (config.max_position_embeddings + POSITION_OFFSET) * config.hidden_size
    loads = [0.0] * num_stages
    if balance is Balance.MEMORY:
        loads[0] += (table + positions) / layer
        loads[-1] += table / layer
    else:
        # A look-up in the input embedding takes no time; the output embedding is a full product.
        loads[-1] += table / layer / positions_per_token
        after_qkv = 1 - 3 * config.hidden_size**2 / layer
        loads[-1] -= after_qkv * (1 - 1 / positions_per_token)
    return loads


def _level(config: OptConfig, loads: Sequence[float]) -> list[int]:
    """Give one layer after the other to the stage that is then the least loaded."""
    counts = [1] * len(loads)
    for _ in range(config.num_hidden_layers - len(loads)):
        rank = min(range(len(loads)), key=lambda r: loads[r] + counts[r])
        counts[rank] += 1
    return counts
