"""Small random models of every family, with a tokenizer, for the programs beside this file.

Everything that TP2, TP3 and two experts' ranks cut is a whole number of quantisation groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_TINY = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 12,
         "num_key_value_heads": 6, "head_dim": 32, "vocab_size": 600, "max_position_embeddings": 256,
         "initializer_range": 0.08, "rms_norm_eps": 1e-5}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
# fmt: off
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "tiny": _TINY | {"model_type": "llama", "tie_word_embeddings": True},
    "untied": _TINY | {"model_type": "llama", "tie_word_embeddings": False},
    "llama3": _TINY
    | {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "small": {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 64,
        "vocab_size": 6144,
        "max_position_embeddings": 2048,
        "initializer_range": 0.04,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    },
    "qwen2": {key: value for key, value in _TINY.items() if key != "head_dim"}
    | {"model_type": "qwen2", "num_attention_heads": 6, "tie_word_embeddings": True},
    "qwen3": _TINY | {"model_type": "qwen3", "tie_word_embeddings": True},
    "mixtral": _TINY | _EXPERTS | {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 192},
    "qwen3_moe": _TINY
    | _EXPERTS
    | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 128, "norm_topk_prob": True},
}
# fmt: on


def make_random_model(sizes: dict[str, Any], directory: Path) -> Path:
    """A model of transformers with random weights, large enough to matter, and a tokenizer with a token per byte."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(20)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):  # ones would hide a norm that is applied to the wrong layer
            weight.data.uniform_(0.5, 1.5)
        elif name.endswith((".bias", "gate.weight")):  # and zeros a bias
            weight.data.normal_(0, 0.3)
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> None:
    """A tokenizer with a token per byte, and two others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
