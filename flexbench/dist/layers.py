"""The layers of OPT: which weights each has, and what it computes from them.

Letters in comments and names of shapes: B batch, S positions, h hidden size, H heads, D head size,
f width of the MLP, V vocabulary, E width of the token embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from flexbench.dist.kernels import decode_layer
from flexbench.dist.kernels.decode_layer import (
    Affine,
    AttentionHalf,
    DecodeHalf,
    MlpHalf,
    Norm,
)
from flexbench.dist.kernels.panels import InPanels
from flexbench.dist.opt_config import POSITION_OFFSET, OptConfig
from flexbench.dist.partition import Stage

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class WeightSpec:
    """A weight of a layer: its name there, its shape, and the model's tensors it is made of.

    Several `sources` are put below each other: query, key and value are one product. Of a table,
    rows are looked up; any other matrix is multiplied with. Of its outputs, the first
    `num_of_last` are wanted of each prompt's last position only.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    is_table: bool = False
    num_of_last: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions; only those are compressed."""
        return len(self.shape) == 2

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of each of its sources."""
        return (self.shape[0] // len(self.sources), *self.shape[1:])


class Weights(Protocol):
    """A layer's weights while it is computed."""

    def get(self, name: str) -> torch.Tensor:
        """A whole weight."""

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Some rows of a table: `index` of shape (...) gives (..., width)."""

    def in_panels(self, name: str) -> InPanels | None:
        """A matrix as kernels read it that do more than multiply, if it lies so."""

    def linear(
        self,
        name: str,
        x: torch.Tensor,
        *,
        bias: str | None = None,
        is_relu: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """relu(x W^T + bias) + residual: x of shape (..., K) gives (..., N)."""


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention over queries, keys and values of the new positions, each (B, S, H, D), and the past."""


class InputEmbed:
    """Token ids (B, S) to hidden states (B, S, h)."""

    gives_last_only = False

    def __init__(self, config: OptConfig) -> None:
        self.name = "input embedding"
        self.num_caches = 0
        h, e = config.hidden_size, config.embed_dim
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.specs: tuple[WeightSpec, ...] = (
            _table("tokens", (config.vocab_size, e), "decoder.embed_tokens.weight"),
            _table("positions", (rows, h), "decoder.embed_positions.weight"),
        )
        if e != h:
            self.specs += (_spec("project", (h, e), "decoder.project_in.weight"),)
        self._is_projected = e != h

    def forward(
        self, weights: Weights, ids_BS: torch.Tensor, positions_BS: torch.Tensor
    ) -> torch.Tensor:
        """Token plus position embeddings. Positions count from 0 at a prompt's first real token."""
        x = weights.rows("tokens", ids_BS)
        if self._is_projected:
            x = weights.linear("project", x)
        return x + weights.rows("positions", positions_BS + POSITION_OFFSET)


class SelfAttention:
    """Attention with its projections, layer norm and residual.

    The last one of a model gives each prompt's last position only, (B, 1, h): the next token
    follows from that, and of all others nothing but keys and values is ever looked at.
    """

    def __init__(self, config: OptConfig, index: int) -> None:
        self.gives_last_only = _is_last(config, index)
        self.name = f"{'last ' if self.gives_last_only else ''}attention {index}"
        self.num_caches = 1
        self._config = config
        h = config.hidden_size
        of_last = h if self.gives_last_only else 0
        prefix = f"decoder.layers.{index}"
        qkv = [f"{prefix}.self_attn.{letter}_proj" for letter in "qkv"]
        self.specs = (
            _spec("attn_norm.weight", (h,), f"{prefix}.self_attn_layer_norm.weight"),
            _spec("attn_norm.bias", (h,), f"{prefix}.self_attn_layer_norm.bias"),
            _matrix("qkv.weight", (3 * h, h), *(f"{name}.weight" for name in qkv), of_last=of_last),
            _spec("qkv.bias", (3 * h,), *(f"{name}.bias" for name in qkv)),
            _matrix("out.weight", (h, h), f"{prefix}.self_attn.out_proj.weight", of_last=of_last),
            _spec("out.bias", (h,), f"{prefix}.self_attn.out_proj.bias"),
        )

    def forward(self, weights: Weights, hidden_BSh: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states after attention, of the same shape, or of the last position."""
        config = self._config
        batch, positions, _ = hidden_BSh.shape
        x = hidden_BSh
        if config.do_layer_norm_before:
            x = _layer_norm(weights, "attn_norm", x)
        qkv = weights.linear("qkv.weight", x, bias="qkv.bias")
        q, k, v = qkv.view(batch, positions, 3, config.num_attention_heads, -1).unbind(2)
        if self.gives_last_only:
            q, hidden_BSh = q[:, -1:], hidden_BSh[:, -1:]
        x = attend(q, k, v).reshape(hidden_BSh.shape)
        x = weights.linear("out.weight", x, bias="out.bias", residual=hidden_BSh)
        return x if config.do_layer_norm_before else _layer_norm(weights, "attn_norm", x)

    def compiled(self, weights: Weights) -> list[DecodeHalf] | None:
        """Its half for one new position, if there is a kernel and the weights lie as it reads them.

        These have to stay where they are for as long as it is used.
        """
        config = self._config
        norm = _norm_of(weights, "attn_norm", is_first=config.do_layer_norm_before)
        qkv, out = (_affine(weights, name) for name in ("qkv", "out"))
        if norm is None or qkv is None or out is None:
            return None
        return [AttentionHalf(norm, qkv, out, config.num_attention_heads)]


class MLP:
    """The feed-forward part with its layer norm and residual."""

    def __init__(self, config: OptConfig, index: int) -> None:
        is_last = _is_last(config, index)
        self.name = f"{'last ' if is_last else ''}MLP {index}"
        self.gives_last_only = is_last
        self.num_caches = 0
        self._is_norm_first = config.do_layer_norm_before
        self._is_relu = config.activation_function == "relu"  # else gelu
        h, f = config.hidden_size, config.ffn_dim
        h_of_last, f_of_last = (h, f) if is_last else (0, 0)
        prefix = f"decoder.layers.{index}"
        self.specs = (
            _spec("mlp_norm.weight", (h,), f"{prefix}.final_layer_norm.weight"),
            _spec("mlp_norm.bias", (h,), f"{prefix}.final_layer_norm.bias"),
            _matrix("fc1.weight", (f, h), f"{prefix}.fc1.weight", of_last=f_of_last),
            _spec("fc1.bias", (f,), f"{prefix}.fc1.bias"),
            _matrix("fc2.weight", (h, f), f"{prefix}.fc2.weight", of_last=h_of_last),
            _spec("fc2.bias", (h,), f"{prefix}.fc2.bias"),
        )

    def forward(self, weights: Weights, hidden_BSh: torch.Tensor) -> torch.Tensor:
        """Hidden states after the MLP, of the same shape."""
        x = hidden_BSh
        if self._is_norm_first:
            x = _layer_norm(weights, "mlp_norm", x)
        x = weights.linear("fc1.weight", x, bias="fc1.bias", is_relu=self._is_relu)
        if not self._is_relu:
            x = functional.gelu(x)
        x = weights.linear("fc2.weight", x, bias="fc2.bias", residual=hidden_BSh)
        return x if self._is_norm_first else _layer_norm(weights, "mlp_norm", x)

    def compiled(self, weights: Weights) -> list[DecodeHalf] | None:
        """As in `SelfAttention`; there is a kernel for relu only."""
        if not self._is_relu:
            return None
        norm = _norm_of(weights, "mlp_norm", is_first=self._is_norm_first)
        fc1, fc2 = (_affine(weights, name) for name in ("fc1", "fc2"))
        if norm is None or fc1 is None or fc2 is None:
            return None
        return [MlpHalf(norm, fc1, fc2)]


class TransformerLayer:
    """Attention and MLP, loaded as one."""

    def __init__(self, config: OptConfig, index: int) -> None:
        self._attention = SelfAttention(config, index)
        self._mlp = MLP(config, index)
        self.gives_last_only = self._attention.gives_last_only
        self.name = f"{'last ' if self.gives_last_only else ''}layer {index}"
        self.num_caches = 1
        self.specs = self._attention.specs + self._mlp.specs

    def forward(self, weights: Weights, hidden_BSh: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states after the layer, of the same shape, or of the last position."""
        return self._mlp.forward(weights, self._attention.forward(weights, hidden_BSh, attend))

    def compiled(self, weights: Weights) -> list[DecodeHalf] | None:
        """As in `SelfAttention`; both halves, or neither."""
        mlp = self._mlp.compiled(weights)
        attention = None if mlp is None else self._attention.compiled(weights)
        return None if mlp is None or attention is None else attention + mlp


class OutputEmbed:
    """Hidden states (B, S, h) to the logits of each prompt's next token (B, V)."""

    gives_last_only = True

    def __init__(self, config: OptConfig) -> None:
        self.name = "output embedding"
        self.num_caches = 0
        h, e = config.hidden_size, config.embed_dim
        table = "decoder.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self.specs: tuple[WeightSpec, ...] = ()
        if config.has_final_layer_norm:
            self.specs += (
                _spec("norm.weight", (h,), "decoder.final_layer_norm.weight"),
                _spec("norm.bias", (h,), "decoder.final_layer_norm.bias"),
            )
        if e != h:
            self.specs += (_matrix("project", (e, h), "decoder.project_out.weight", of_last=e),)
        shape = (config.vocab_size, e)
        self.specs += (_matrix("tokens", shape, table, of_last=config.vocab_size),)
        self._has_norm = config.has_final_layer_norm
        self._is_projected = e != h

    def forward(self, weights: Weights, hidden_BSh: torch.Tensor) -> torch.Tensor:
        """Logits of the last position, in the model's type."""
        x = hidden_BSh[:, -1]
        if self._has_norm:
            x = _layer_norm(weights, "norm", x)
        if self._is_projected:
            x = weights.linear("project", x)
        return weights.linear("tokens", x)


DecoderPart = SelfAttention | MLP | TransformerLayer
Layer = InputEmbed | DecoderPart | OutputEmbed


def layers_of(config: OptConfig, stage: Stage, *, sep_layer: bool) -> list[Layer]:
    """A stage's layers in order, with the embeddings where it is the first or the last."""
    layers: list[Layer] = [InputEmbed(config)] if stage.is_first else []
    for index in stage.layers:
        if sep_layer:
            layers += [SelfAttention(config, index), MLP(config, index)]
        else:
            layers.append(TransformerLayer(config, index))
    if stage.is_last:
        layers.append(OutputEmbed(config))
    return layers


def num_whole_stored(layers: Sequence[Layer]) -> int:
    """How many layers, from the first on, have all positions of a prompt stored behind them.

    Behind others it is the last position, and behind the last one, nothing. Layers may be a part of
    a model's, with a gap.
    """
    stored = layers[:-1]
    return next((n for n, layer in enumerate(stored) if layer.gives_last_only), len(stored))


def _is_last(config: OptConfig, index: int) -> bool:
    return index == config.num_hidden_layers - 1


def _table(name: str, shape: Sequence[int], source: str) -> WeightSpec:
    return WeightSpec(name, tuple(shape), (source,), is_table=True)


def _spec(name: str, shape: Sequence[int], *sources: str) -> WeightSpec:
    return WeightSpec(name, tuple(shape), sources)


def _matrix(name: str, shape: tuple[int, int], *sources: str, of_last: int) -> WeightSpec:
    return WeightSpec(name, shape, sources, num_of_last=of_last)


def _norm_of(weights: Weights, name: str, *, is_first: bool) -> Norm | None:
    weight, bias = (weights.get(f"{name}.{part}") for part in ("weight", "bias"))
    if weight.device.type != "cpu" or not decode_layer.fits(weight.dtype, len(weight)):
        return None
    return Norm(weight, bias, LAYER_NORM_EPS, is_first)


def _affine(weights: Weights, name: str) -> Affine | None:
    matrix = weights.in_panels(f"{name}.weight")
    return None if matrix is None else Affine(matrix, weights.get(f"{name}.bias"))


def _layer_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(
        x,
        (x.shape[-1],),
        weights.get(f"{name}.weight"),
        weights.get(f"{name}.bias"),
        LAYER_NORM_EPS,
    )
