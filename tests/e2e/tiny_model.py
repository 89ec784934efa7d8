"""A random Llama with a small tokenizer, made on the spot, and text that is long enough to train on."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.unit.tiny_tokenizer import tiny_tokenizer

CONTEXT_TOKENS = 128

# Small, and of sizes that every recipe takes: heads of 32 (q8_0 blocks), inputs that are multiples of 64.
SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
}


def write_tiny_model(directory: Path, seed: int = 0, **sizes: Any) -> Path:
    """`directory`, with config.json, fp32 model.safetensors and a tokenizer with a chat template.

    Weights are drawn wider than transformers does, so that attention and logits are not all but uniform.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{**SIZES, **sizes},
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rope_theta=10000.0,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def write_text(path: Path, num_topics: int = 24) -> Path:
    """Some of CPython's help topics as one text file; two blank lines tell documents apart."""
    chosen = sorted(topics)[10 : 10 + num_topics]
    path.write_text("\n\n\n".join(topics[name] for name in chosen), encoding="utf-8")
    return path
