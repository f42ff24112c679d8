"""Writes an OPT model with random weights as a Hugging Face folder. Runs where transformers is.

The command line is JSON: `folder`, `dtype`, and OPTConfig's fields in `config`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

_SEED = 0
_SPECIAL = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word for every token, for programs that do not start without a tokenizer."""
    words = ["<s>", "<pad>", "</s>", *(f"t{token}" for token in range(3, vocab_size))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: token for token, word in enumerate(words)},
            "unk_token": "</s>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **_SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    """The weights are OPT's initial ones: normal with its init_std, biases 0."""
    request = json.loads(sys.argv[1])
    folder = Path(request["folder"])
    torch.manual_seed(_SEED)
    config = transformers.OPTConfig(**request["config"])
    # Drawn in float32 for every dtype, so that all folders of a shape have the same weights.
    model = transformers.OPTForCausalLM(config).to(getattr(torch, request["dtype"]))
    model.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)


if __name__ == "__main__":
    main()
