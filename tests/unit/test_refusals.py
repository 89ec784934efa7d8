"""Twenty combinations of device, format, runtime and budget that cannot be or are doubtful, and what is said to each.

`python tests/unit/test_refusals.py` prints them.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_edge import checks, compose, deployment
from megatron_edge.contracts import InputError

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_1B = SMOLLM2 | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip

# (arguments, model, refused or doubtful, words of the answer)
CASES: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("device=agx_orin_64gb_edgellm quant=nvfp4", LLAMA_8B, "refused", ("nvfp4 needs sm100", "nearest is quant=int4")),
    ("device=orin_nano_8gb_edgellm quant=fp8", LLAMA_1B, "refused", ("fp8 needs sm89", "nearest is quant=int4")),
    ("device=agx_orin_64gb_edgellm quant=int4_awq kv=fp8", LLAMA_8B, "refused", ("kv.format=fp8", "kv=none")),
    ("+scenario=vehicle kv=fp8", SMOLLM2, "refused", ("orin_nano_8gb", "nearest is kv=int8")),
    ("+scenario=gateway kv=nvfp4", SMOLLM2, "refused", ("board_2gb", "nearest is kv=int8")),
    ("+scenario=gateway_thor enable_medusa=true", SMOLLM2, "refused", ("no Medusa heads", "EAGLE-3")),
    ("+scenario=gateway medusa_num_heads=2", SMOLLM2, "refused", ("llama.cpp runs no Medusa heads",)),
    ("+scenario=vehicle paged_kv_cache=true", SMOLLM2, "refused", ("llama.cpp has no pages", "leave it out")),
    ("+scenario=gateway quant=nvfp4", SMOLLM2, "refused", ("activation=nvfp4", "quant=nvfp4_w4a16")),
    ("device=jetson_thor quant=w4a8_awq", LLAMA_8B, "refused", ("does not run it", "nearest is quant=int4_awq")),
    ("device=jetson_thor quant=int4_awq", SMOLLM2, "refused", ("groups of 64", "allowed: [128]")),
    ("device=jetson_thor quant=nvfp4 quant.embedding=int8", LLAMA_1B, "refused", ("quant.embedding='int8'", "bf16")),
    ("+scenario=vehicle_sm89 quant=nvfp4_w4a16", SMOLLM2, "refused", ("rtx_2000_ada_embedded", "quant=int4_awq")),
    ("+scenario=gateway_thor budget.power_w=25", LLAMA_8B, "refused", ("budget.power_w=25.0", "at least 40")),
    ("device=orin_nano_4gb_edgellm quant=int4_awq", LLAMA_1B, "refused", ("exceed its budget", "orin_nano_8gb")),
    ("+scenario=gateway quant=none", LLAMA_8B, "refused", ("exceed its budget", "device=")),
    ("+scenario=drone export.max_seq_len=131072", LLAMA_1B, "refused", ("export.max_seq_len of at most",)),
    ("device=raspberry_pi_5_8gb quant=int4_awq budget.latency_ms_per_token=100", LLAMA_8B, "refused",
     ("only to move the bytes", "device=")),
    ("+scenario=drone", LLAMA_1B, "doubtful", ("memory: 9",)),
    ("+scenario=vehicle budget.latency_ms_per_token=18", LLAMA_1B, "doubtful", ("decode_efficiency", "7 W mode")),
    ("+scenario=gateway export.max_seq_len=32768", SMOLLM2, "doubtful", ("the model's own context is 8192",)),
    ("device=board_2gb quant=int4_awq budget.memory_bytes=2147483648", SMOLLM2, "doubtful", ("left by its system",)),
]  # fmt: skip


def answer(arguments: str, sizes: dict[str, Any]) -> tuple[str, str]:
    """("refused", the refusal) | ("doubtful", what is doubted) | ("fits", "")."""
    try:
        config = compose.compose(["train.precision=bf16", *arguments.split()])
        checks.check_config(config)
        checks.check_model_dims(config, sizes)
        found = deployment.predict(config, sizes)
        deployment.refuse(config, sizes, found)
    except InputError as error:
        return "refused", str(error)
    return ("doubtful", "; ".join(found.doubts)) if found.doubts else ("fits", "")


@pytest.mark.parametrize(("arguments", "sizes", "outcome", "words"), CASES, ids=[case[0] for case in CASES])
def test_what_is_said(arguments: str, sizes: dict[str, Any], outcome: str, words: tuple[str, ...]) -> None:
    got, message = answer(arguments, sizes)
    assert got == outcome, message
    assert "\n" not in message
    for word in words:
        assert word in message, message


if __name__ == "__main__":
    names = {id(SMOLLM2): "SmolLM2-135M", id(LLAMA_1B): "1B", id(LLAMA_8B): "8B"}
    for number, (arguments, sizes, _, _) in enumerate(CASES, start=1):
        print(f"{number}. {arguments} ({names[id(sizes)]})\n   {': '.join(answer(arguments, sizes))}")
