"""Published models by name, with the values of their configurations that decide sizes.

Sources: the papers of BLOOM (arXiv 2211.05100), OPT (2205.01068), Llama 1 to 3 (2302.13971,
2307.09288, 2407.21783), Falcon (2311.16867) and Mixtral (2401.04088), and the config.json files
published with the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flexbench.models.families import DecoderSpec, decoder_spec
from flexbench.models.shapes import OPT_SHAPES


def _bloom(layers: int, h: int, heads: int, dtype: str | None = None) -> dict[str, Any]:
    return {
        "model_type": "bloom",
        "hidden_size": h,
        "n_layer": layers,
        "n_head": heads,
        "torch_dtype": dtype,
    }


def _llama(
    layers: int,
    h: int,
    heads: int,
    f: int,
    *,
    kv: int | None = None,
    dtype: str = "bfloat16",
    rope: str | None = None,
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "rope_scaling": None if rope is None else {"rope_type": rope},
        "hidden_size": h,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "intermediate_size": f,
        "torch_dtype": dtype,
    }


def _mixtral(layers: int, h: int, heads: int, f: int) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "hidden_size": h,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": f,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "torch_dtype": "bfloat16",
    }


def _falcon(layers: int, h: int, heads: int, kv: int | None = None, **flags: Any) -> dict[str, Any]:
    return {
        "model_type": "falcon",
        "hidden_size": h,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_kv_heads": kv,
        "new_decoder_architecture": kv is not None,
        "torch_dtype": "bfloat16",
        **flags,
    }


def _opt() -> Iterable[tuple[str, dict[str, Any]]]:
    for shape in OPT_SHAPES.values():
        yield (
            shape.name,
            {
                "model_type": "opt",
                "hidden_size": shape.hidden_size,
                "num_hidden_layers": shape.num_hidden_layers,
                "num_attention_heads": shape.num_attention_heads,
                "ffn_dim": 4 * shape.hidden_size,
                "torch_dtype": "float16",
            },
        )


_FALCON_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}

_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bigscience/bloom": _bloom(70, 14336, 112, "bfloat16"),
    "bigscience/bloomz": _bloom(70, 14336, 112, "bfloat16"),
    "bigscience/bloom-560m": _bloom(24, 1024, 16),
    "bigscience/bloom-1b1": _bloom(24, 1536, 16),
    "bigscience/bloom-1b7": _bloom(24, 2048, 16),
    "bigscience/bloom-3b": _bloom(30, 2560, 32),
    "bigscience/bloom-7b1": _bloom(30, 4096, 32),
    "bigscience/bloomz-560m": _bloom(24, 1024, 16),
    "bigscience/bloomz-1b1": _bloom(24, 1536, 16),
    "bigscience/bloomz-1b7": _bloom(24, 2048, 16),
    "bigscience/bloomz-3b": _bloom(30, 2560, 32),
    "bigscience/bloomz-7b1": _bloom(30, 4096, 32),
    **dict(_opt()),
    "huggyllama/llama-7b": _llama(32, 4096, 32, 11008, dtype="float16"),
    "huggyllama/llama-13b": _llama(40, 5120, 40, 13824, dtype="float16"),
    "huggyllama/llama-30b": _llama(60, 6656, 52, 17920, dtype="float16"),
    "huggyllama/llama-65b": _llama(80, 8192, 64, 22016, dtype="float16"),
    "meta-llama/Llama-2-7b-hf": _llama(32, 4096, 32, 11008, dtype="float16"),
    "meta-llama/Llama-2-13b-hf": _llama(40, 5120, 40, 13824, dtype="float16"),
    "meta-llama/Llama-2-70b-hf": _llama(80, 8192, 64, 28672, kv=8, dtype="float16"),
    "meta-llama/Meta-Llama-3-8B": _llama(32, 4096, 32, 14336, kv=8),
    "meta-llama/Meta-Llama-3-70B": _llama(80, 8192, 64, 28672, kv=8),
    "meta-llama/Llama-3.1-8B": _llama(32, 4096, 32, 14336, kv=8, rope="llama3"),
    "meta-llama/Llama-3.1-70B": _llama(80, 8192, 64, 28672, kv=8, rope="llama3"),
    "meta-llama/Llama-3.1-405B": _llama(126, 16384, 128, 53248, kv=8, rope="llama3"),
    "meta-llama/Llama-3.2-1B": _llama(16, 2048, 32, 8192, kv=8, rope="llama3"),
    "meta-llama/Llama-3.2-3B": _llama(28, 3072, 24, 8192, kv=8, rope="llama3"),
    "meta-llama/Llama-3.3-70B-Instruct": _llama(80, 8192, 64, 28672, kv=8, rope="llama3"),
    "petals-team/StableBeluga2": _llama(80, 8192, 64, 28672, kv=8),
    "tiiuae/falcon-rw-1b": _falcon(24, 2048, 32, **_FALCON_RW),
    "tiiuae/falcon-rw-7b": _falcon(36, 4096, 64, **_FALCON_RW),
    "tiiuae/falcon-7b": _falcon(32, 4544, 71, multi_query=True),
    "tiiuae/falcon-40b": _falcon(60, 8192, 128, 8),
    "tiiuae/falcon-180B": _falcon(80, 14848, 232, 8),
    "mistralai/Mixtral-8x7B-v0.1": _mixtral(32, 4096, 32, 14336),
    "mistralai/Mixtral-8x22B-v0.1": _mixtral(56, 6144, 48, 16384),
}

# Tuned variants, and the models whose dimensions they have.
_TUNED = {
    **{
        f"meta-llama/Llama-2-{n}-chat-hf": f"meta-llama/Llama-2-{n}-hf"
        for n in ("7b", "13b", "70b")
    },
    **{
        f"meta-llama/Meta-Llama-3-{n}-Instruct": f"meta-llama/Meta-Llama-3-{n}"
        for n in ("8B", "70B")
    },
    **{
        f"meta-llama/Llama-{n}-Instruct": f"meta-llama/Llama-{n}"
        for n in ("3.1-8B", "3.1-70B", "3.1-405B", "3.2-1B", "3.2-3B")
    },
    **{f"tiiuae/falcon-{n}-instruct": f"tiiuae/falcon-{n}" for n in ("7b", "40b")},
    "tiiuae/falcon-180B-chat": "tiiuae/falcon-180B",
    **{
        f"mistralai/Mixtral-{n}-Instruct-v0.1": f"mistralai/Mixtral-{n}-v0.1"
        for n in ("8x7B", "8x22B")
    },
}
_CONFIGURATIONS |= {tuned: _CONFIGURATIONS[base] for tuned, base in _TUNED.items()}

# What people call a model whose name says less.
_ALIASES = {"bloom-176b": "bigscience/bloom", "bloomz-176b": "bigscience/bloomz"}
_ALIASES["llama-3.3-70b"] = "meta-llama/Llama-3.3-70B-Instruct"

PUBLISHED_NAMES = tuple(_CONFIGURATIONS)


def published_spec(name: str) -> DecoderSpec:
    """The published model of this name, with or without its organization, in any case.

    Parts of names that come and go ('Meta-', '-hf', '-v0.1') may be left out. Raises KeyError for a
    name that is not known.
    """
    organization, slash, short = name.lower().rpartition("/")
    wanted = _ALIASES.get(short, short)
    matches = [known for known in _CONFIGURATIONS if _is_named(known, wanted)]
    if slash:
        matches = [known for known in matches if known.lower().startswith(f"{organization}/")]
    exact = [known for known in matches if _short(known) == short]
    if not matches:
        raise KeyError(name)
    known = (exact or matches)[0]
    return decoder_spec(known, _CONFIGURATIONS[known])


def _short(name: str) -> str:
    return name.rpartition("/")[2].lower()


def _is_named(known: str, wanted: str) -> bool:
    return _core_of(_short(known)) == _core_of(_short(wanted))


def _core_of(short: str) -> str:
    return short.removeprefix("meta-").removesuffix("-hf").removesuffix("-v0.1")
