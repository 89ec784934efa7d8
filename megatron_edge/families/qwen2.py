"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from __future__ import annotations

from megatron_edge.families.llama import ATTENTION, EMBEDDING, HEAD, MLP, QKV_BIAS
from megatron_edge.families.table import Family

FAMILY = Family(
    "Qwen2ForCausalLM",
    EMBEDDING + ATTENTION + (QKV_BIAS,) + MLP + HEAD,
    qkv_bias=True,
    required={"use_sliding_window": (False,)},
)
