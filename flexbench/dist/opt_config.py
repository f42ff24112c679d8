"""What an OPT model is made of: its dimensions, from its published name or its config.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.models.families import DTYPE_BYTES
from flexbench.models.shapes import OPT_SHAPES, ModelShape, opt_shape

# OPT's position embeddings begin with two rows that no position uses.
POSITION_OFFSET = 2
_OPT_350M_PROJECTION = 512
# Instruction-tuned OPT models have the dimensions of the models they were made from.
_INSTRUCTION_TUNED = re.compile(r"opt-iml-(?:max-)?")
_ACTIVATIONS = ("relu", "gelu")


@dataclass(frozen=True, kw_only=True)
class OptConfig:
    """Dimensions of an OPT model, with the names of its config.json, and the type it runs in."""

    name: str
    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    ffn_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    """Width of the token embeddings; None: hidden_size. Only OPT-350m has another."""
    do_layer_norm_before: bool = True
    """Whether the layer norms come before attention and MLP; only in OPT-350m they come after."""
    has_final_layer_norm: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int = 1
    dtype: str = "auto"
    """Type of weights, cache and activations. auto: float16 on a GPU, float32 on a CPU."""

    def __post_init__(self) -> None:
        """Raise ConfigError for dimensions of which no model can be built."""
        if self.dtype != "auto" and self.dtype not in DTYPE_BYTES:
            accepted = ", ".join(("auto", *DTYPE_BYTES))
            raise ConfigError("--dtype", f"unknown type {self.dtype!r}; accepted: {accepted}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "--model",
                f"{self.name}: hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}",
            )
        if self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                "--model",
                f"{self.name}: pad_token_id {self.pad_token_id} is beyond the vocabulary of "
                f"{self.vocab_size}",
            )
        if self.activation_function not in _ACTIVATIONS:
            raise ConfigError(
                "--model",
                f"{self.name}: activation_function {self.activation_function!r} is not one of "
                f"{', '.join(_ACTIVATIONS)}",
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """Width of the token embeddings."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element. An unresolved 'auto' counts as float16, as on a GPU."""
        return DTYPE_BYTES["float16" if self.dtype == "auto" else self.dtype]

    def resolve_dtype(self, *, on_gpu: bool) -> OptConfig:
        """This configuration with 'auto' replaced by what it means on a GPU, or without one."""
        if self.dtype != "auto":
            return self
        return replace(self, dtype="float16" if on_gpu else "float32")

    def layer_parameters(self) -> int:
        """Parameters of one transformer layer: 4 h^2 + 4 h, 2 h f + h + f, and two layer norms."""
        h, f = self.hidden_size, self.ffn_dim
        return 4 * h * h + 4 * h + 2 * h * f + h + f + 4 * h

    def model_bytes(self) -> int:
        """Bytes of all weights, the tied embedding counted once."""
        h, e = self.hidden_size, self.embed_dim
        parameters = self.num_hidden_layers * self.layer_parameters()
        parameters += self.vocab_size * e * (1 if self.tie_word_embeddings else 2)
        parameters += (self.max_position_embeddings + POSITION_OFFSET) * h
        parameters += 2 * h if self.has_final_layer_norm else 0
        parameters += 2 * h * e if e != h else 0
        return parameters * self.dtype_bytes

    def cache_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of keys and values of all layers for `batch_size` prompts of `seq_len` tokens."""
        per_token = 2 * self.num_hidden_layers * self.hidden_size
        return batch_size * seq_len * per_token * self.dtype_bytes

    def hidden_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of the activations between two layers."""
        return batch_size * seq_len * self.hidden_size * self.dtype_bytes


def get_opt_config(name: str, *, dtype: str = "auto") -> OptConfig:
    """The published OPT model of this name: facebook/opt-125m to opt-175b, or opt-iml models.

    Raises ConfigError that lists the names there are.
    """
    try:
        shape = opt_shape(_INSTRUCTION_TUNED.sub("opt-", name.lower()))
    except KeyError:
        raise ConfigError(
            "--model",
            f"unknown model {name!r}; accepted: {', '.join(OPT_SHAPES)}, or a folder with an OPT "
            "model in Hugging Face's format",
        ) from None
    return _from_shape(shape, name if "/" in name else f"facebook/{name}", dtype)


def _from_shape(shape: ModelShape, name: str, dtype: str) -> OptConfig:
    is_350m = shape.name == "facebook/opt-350m"
    return OptConfig(
        name=name.lower(),
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_hidden_layers=shape.num_hidden_layers,
        ffn_dim=4 * shape.hidden_size,
        vocab_size=shape.vocab_size,
        word_embed_proj_dim=_OPT_350M_PROJECTION if is_350m else None,
        do_layer_norm_before=not is_350m,
        has_final_layer_norm=not is_350m,
        dtype=dtype,
    )


def load_opt_config(folder: Path, *, dtype: str = "auto") -> OptConfig:
    """Read the config.json of a Hugging Face OPT folder.

    Raises InputFileError for one that is missing, malformed, of another model family, or has
    features that OptLM does not compute.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(path, f"is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "opt":
        family = values.get("model_type") if isinstance(values, dict) else None
        raise InputFileError(path, f"model_type must be 'opt', not {family!r}")
    for name, needed in (("enable_bias", True), ("layer_norm_elementwise_affine", True)):
        if values.get(name, needed) is not needed:
            raise InputFileError(path, f"{name} = {values[name]} is not supported")
    before = _read_flag(path, values, "do_layer_norm_before", default=True)
    is_final_norm_removed = _read_flag(path, values, "_remove_final_layer_norm", default=False)
    try:
        return OptConfig(
            name=folder.resolve().name,
            **{name: _read_count(path, values, name) for name in _REQUIRED},
            max_position_embeddings=_read_count(path, values, "max_position_embeddings", 2048),
            word_embed_proj_dim=_read_count(
                path, values, "word_embed_proj_dim", values.get("hidden_size")
            ),
            do_layer_norm_before=before,
            has_final_layer_norm=before and not is_final_norm_removed,
            activation_function=values.get("activation_function", "relu"),
            tie_word_embeddings=_read_flag(path, values, "tie_word_embeddings", default=True),
            pad_token_id=_read_count(path, values, "pad_token_id", 1),
            dtype=dtype,
        )
    except ConfigError as error:
        if error.option != "--model":
            raise
        raise InputFileError(path, error.problem) from error


_REQUIRED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim", "vocab_size")


def _read_flag(path: Path, values: dict[str, Any], name: str, *, default: bool) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise InputFileError(path, f"{name} must be true or false, not {value!r}")
    return value


def _read_count(path: Path, values: dict[str, Any], name: str, default: Any = None) -> int:
    value = values.get(name)
    value = default if value is None else value  # newer transformers write null for what is unset
    minimum = 0 if name == "pad_token_id" else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputFileError(path, f"{name} must be a whole number, not {value!r}")
    return value
