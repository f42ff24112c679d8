"""A model of half a megabyte that recites the alphabet, for real servers to load.

After a letter comes the next one, after z comes a, and after anything else a: what a server must
answer can be said beforehand. A token is a byte. The letter z ends a text, for servers that are
not asked to ignore that.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase

import numpy
from safetensors.numpy import save_file

HIDDEN_SIZE = 128
NUM_HEADS = 4  # of 32, the smallest that vLLM's attention has for CPUs
MLP_SIZE = 128
NUM_LAYERS = 2
MAX_TOKENS = 1024
SPECIAL_TOKENS = ("<|start|>", "<|end|>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_tiny_model(folder: Path) -> Path:
    """Write the model into `folder`, as Hugging Face does; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    token_ids = _write_tokenizer(folder)
    _write_config(folder, token_ids)
    save_file(_weights(token_ids), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recite(after: str, num_tokens: int) -> str:
    """What the model says after a text that ends with `after`, which is a letter or not."""
    start = ascii_lowercase.find(after[-1]) + 1  # 0 for what is none of them
    return "".join(ascii_lowercase[(start + index) % 26] for index in range(num_tokens))


def _write_tokenizer(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    token_ids = {text: number for number, text in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=token_ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return token_ids


def _write_config(folder: Path, token_ids: dict[str, int]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": MLP_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_TOKENS,
        "vocab_size": len(token_ids),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": token_ids[SPECIAL_TOKENS[0]],
        "eos_token_id": token_ids["z"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _weights(token_ids: dict[str, int]) -> dict[str, numpy.ndarray]:
    """Layers that add nothing; each letter has a direction of its own, all else shares one."""
    directions = numpy.eye(HIDDEN_SIZE, dtype=numpy.float32)
    embedding = numpy.tile(directions[26], (len(token_ids), 1))
    output = numpy.zeros((len(token_ids), HIDDEN_SIZE), dtype=numpy.float32)
    for number, letter in enumerate(ascii_lowercase):
        embedding[token_ids[letter]] = directions[number]
        following = ascii_lowercase[(number + 1) % 26]
        output[token_ids[following]] += directions[number]
    output[token_ids["a"]] += directions[26]
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": numpy.ones(HIDDEN_SIZE, dtype=numpy.float32),
        "lm_head.weight": output,
    }
    for layer in range(NUM_LAYERS):
        weights.update(_layer_weights(f"model.layers.{layer}."))
    return weights


def _layer_weights(prefix: str) -> dict[str, numpy.ndarray]:
    square = numpy.zeros((HIDDEN_SIZE, HIDDEN_SIZE), dtype=numpy.float32)
    names = [f"self_attn.{name}_proj" for name in "qkvo"]
    weights = {f"{prefix}{name}.weight": square.copy() for name in names}
    for name, shape in (
        ("gate", (MLP_SIZE, HIDDEN_SIZE)),
        ("up", (MLP_SIZE, HIDDEN_SIZE)),
        ("down", (HIDDEN_SIZE, MLP_SIZE)),
    ):
        weights[f"{prefix}mlp.{name}_proj.weight"] = numpy.zeros(shape, dtype=numpy.float32)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{prefix}{name}.weight"] = numpy.ones(HIDDEN_SIZE, dtype=numpy.float32)
    return weights
