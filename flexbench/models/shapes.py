"""Layer shapes of published models."""

from __future__ import annotations

from dataclasses import dataclass

OPT_VOCAB_SIZE = 50272


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The four dimensions that decide what a decoder-only transformer costs to run.

    The field names are those of Hugging Face's OPTConfig, so that either can be mapped onto BLOOM.
    The feed-forward layer of these models is 4 x hidden_size wide.
    """

    name: str
    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int

    @property
    def block_parameters(self) -> int:
        """Parameters of one transformer block; 12 h^2 + 13 h for OPT and for BLOOM alike.

        Query, key, value and output projections are 4 h^2 + 4 h, the feed-forward layer is
        8 h^2 + 5 h, the two layer norms are 4 h.
        """
        return 12 * self.hidden_size**2 + 13 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters outside the blocks of a BLOOM of this shape: what every client holds.

        Token embeddings (tied to the output layer), their layer norm, and the last layer norm.
        """
        return self.vocab_size * self.hidden_size + 4 * self.hidden_size


def _opt(
    size: str, hidden_size: int, num_attention_heads: int, num_hidden_layers: int
) -> ModelShape:
    return ModelShape(
        name=f"facebook/opt-{size}",
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_hidden_layers=num_hidden_layers,
        vocab_size=OPT_VOCAB_SIZE,
    )


# Source: table 1 of the OPT paper (arXiv 2205.01068) and the published configurations.
OPT_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _opt("125m", 768, 12, 12),
        _opt("350m", 1024, 16, 24),
        _opt("1.3b", 2048, 32, 24),
        _opt("2.7b", 2560, 32, 32),
        _opt("6.7b", 4096, 32, 32),
        _opt("13b", 5120, 40, 40),
        _opt("30b", 7168, 56, 48),
        _opt("66b", 9216, 72, 64),
        _opt("175b", 12288, 96, 96),
    )
}


def opt_shape(name: str) -> ModelShape:
    """The shape of a published OPT model: 'facebook/opt-30b', or 'opt-30b' for short.

    Raises KeyError for a name that is not in OPT_SHAPES.
    """
    lowered = name.lower()
    return OPT_SHAPES[lowered if "/" in lowered else f"facebook/{lowered}"]
