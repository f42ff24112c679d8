"""What one block of a decoder costs, for the model families that a config.json may name.

The parameter counts are those of the block classes that Petals serves (petals/models/*/block.py,
which are transformers' decoder layers); a test compares them with those classes. OPT is not among
them: its block has as many parameters as the BLOOM block of its dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class SpecError(ValueError):
    """A configuration of which no model can be built; says what is missing or wrong."""


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer, as far as its blocks and their attention cache go.

    `values` is the configuration it was read from, with the names of Hugging Face's config.json.
    """

    name: str
    family: str
    values: Values
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    block_parameters: int
    torch_dtype: str | None
    """The type that the configuration names; None: none."""

    @property
    def num_key_value_groups(self) -> int:
        """Attention heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True, kw_only=True)
class _Dimensions:
    """What a family's reader finds; `block_parameters` counts everything in one block."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    block_parameters: int
    num_key_value_heads: int


def decoder_spec(name: str, values: Values) -> DecoderSpec:
    """Read a configuration. Raises SpecError that names what is missing or not supported."""
    family = values.get("model_type")
    if family is None:
        raise SpecError(f"model_type is missing; accepted: {', '.join(FAMILIES)}")
    if not isinstance(family, str) or family not in FAMILIES:
        raise SpecError(
            f"model_type {family!r} is not known here: a count of the parameters of its block is "
            f"missing; accepted: {', '.join(FAMILIES)}"
        )
    found = FAMILIES[family](values)
    _check_divisible(found)
    return DecoderSpec(
        name=name,
        family=family,
        values=dict(values),
        hidden_size=found.hidden_size,
        num_attention_heads=found.num_attention_heads,
        num_key_value_heads=found.num_key_value_heads,
        num_hidden_layers=found.num_hidden_layers,
        block_parameters=found.block_parameters,
        torch_dtype=_dtype(values),
    )


def _bloom(values: Values) -> _Dimensions:
    # Where both names of a value are there, the first one wins, as in BloomConfig.
    h = _count(values, "n_embed", "hidden_size")
    heads = _count(values, "num_attention_heads", "n_head")
    return _Dimensions(
        hidden_size=h,
        num_attention_heads=heads,
        num_hidden_layers=_count(values, "num_hidden_layers", "n_layer"),
        num_key_value_heads=heads,
        block_parameters=12 * h * h + 13 * h,
    )


def _opt(values: Values) -> _Dimensions:
    h = _count(values, "hidden_size")
    f = _count(values, "ffn_dim", default=4 * h)
    heads = _count(values, "num_attention_heads")
    return _Dimensions(
        hidden_size=h,
        num_attention_heads=heads,
        num_hidden_layers=_count(values, "num_hidden_layers"),
        num_key_value_heads=heads,
        # Four projections with bias, two linear layers with bias, two layer norms.
        block_parameters=4 * (h * h + h) + 2 * h * f + f + h + 4 * h,
    )


def _grouped_attention(values: Values) -> tuple[int, int, int, int]:
    """Hidden size, heads, key/value heads, and parameters of the four projections."""
    h = _count(values, "hidden_size")
    heads = _count(values, "num_attention_heads")
    kv_heads = _count(values, "num_key_value_heads", default=heads)
    _check_heads(h, heads)
    head_dim = _count(values, "head_dim", default=h // heads)
    if head_dim * heads != h:
        raise SpecError(
            f"head_dim {head_dim} x num_attention_heads {heads} is not hidden_size {h}: Petals "
            "computes only blocks where it is"
        )
    kv = kv_heads * head_dim
    return h, heads, kv_heads, 2 * h * h + 2 * h * kv


def _llama(values: Values) -> _Dimensions:
    h, heads, kv_heads, parameters = _grouped_attention(values)
    f = _count(values, "intermediate_size")
    if _flag(values, "attention_bias", default=False):
        parameters += 2 * h + 2 * kv_heads * (h // heads)
    if _flag(values, "mlp_bias", default=False):
        parameters += 2 * f + h
    return _Dimensions(
        hidden_size=h,
        num_attention_heads=heads,
        num_hidden_layers=_count(values, "num_hidden_layers"),
        num_key_value_heads=kv_heads,
        block_parameters=parameters + 3 * h * f + 2 * h,
    )


def _mixtral(values: Values) -> _Dimensions:
    h, heads, kv_heads, parameters = _grouped_attention(values)
    f = _count(values, "intermediate_size")
    experts = _count(values, "num_local_experts")
    return _Dimensions(
        hidden_size=h,
        num_attention_heads=heads,
        num_hidden_layers=_count(values, "num_hidden_layers"),
        num_key_value_heads=kv_heads,
        block_parameters=parameters + experts * (3 * h * f + h) + 2 * h,
    )


def _falcon(values: Values) -> _Dimensions:
    h = _count(values, "n_embed", "hidden_size")
    heads = _count(values, "num_attention_heads")
    is_new = _flag(values, "new_decoder_architecture", default=False)
    is_multi_query = _flag(values, "multi_query", default=True)
    has_bias = _flag(values, "bias", default=False)
    if is_new and values.get("num_ln_in_parallel_attn") == 1:
        raise SpecError("num_ln_in_parallel_attn 1 (Falcon 2) is not what Petals' block computes")
    if _count(values, "ffn_hidden_size", default=4 * h) != 4 * h:
        raise SpecError("ffn_hidden_size must be 4 x hidden_size: Petals computes no other blocks")
    kv_heads = heads
    if is_new:
        kv_heads = _count(values, "num_kv_heads", default=heads)
    elif is_multi_query:
        kv_heads = 1
    qkv = h + 2 * kv_heads * (h // heads)
    parameters = h * qkv + h * h + 8 * h * h
    if has_bias:
        parameters += qkv + h + 4 * h + h
    # One layer norm where attention and MLP run side by side on the same input, else two.
    has_one_norm = not is_new and _flag(values, "parallel_attn", default=True)
    return _Dimensions(
        hidden_size=h,
        num_attention_heads=heads,
        num_hidden_layers=_count(values, "num_hidden_layers"),
        num_key_value_heads=kv_heads,
        block_parameters=parameters + (2 * h if has_one_norm else 4 * h),
    )


FAMILIES: dict[str, Callable[[Values], _Dimensions]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "llama": _llama,
    "mixtral": _mixtral,
    "opt": _opt,
}


def _check_heads(hidden_size: int, num_attention_heads: int) -> None:
    if hidden_size % num_attention_heads:
        raise SpecError(
            f"hidden_size must be divisible by num_heads (got hidden_size: {hidden_size} "
            f"and num_heads: {num_attention_heads})"
        )


def _check_divisible(found: _Dimensions) -> None:
    _check_heads(found.hidden_size, found.num_attention_heads)
    if found.num_attention_heads % found.num_key_value_heads:
        raise SpecError(
            f"num_attention_heads {found.num_attention_heads} must be divisible by the number of "
            f"key/value heads {found.num_key_value_heads}"
        )


def _count(values: Values, *names: str, default: int | None = None) -> int:
    """The first of `names` that is there; newer transformers write null for what is unset."""
    for name in names:
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**9:
            raise SpecError(f"{name} must be a whole number of at least 1, not {value!r}")
        return value
    if default is None:
        raise SpecError(f"{' or '.join(names)} is missing")
    return default


def _flag(values: Values, name: str, *, default: bool) -> bool:
    value = values.get(name, default)
    if value is None:
        return False  # as transformers' own classes read it
    if not isinstance(value, bool):
        raise SpecError(f"{name} must be true or false, not {value!r}")
    return value


def _dtype(values: Values) -> str | None:
    # transformers 5 writes it under the shorter name.
    value = values.get("torch_dtype", values.get("dtype"))
    if value is None or value == "auto":
        return None
    if not isinstance(value, str) or value not in DTYPE_BYTES:
        raise SpecError(f"torch_dtype {value!r} is not one of {', '.join(DTYPE_BYTES)}")
    return value
