"""Mixtral: Llama's attention, a mixture of experts in every layer."""

from __future__ import annotations

from megatron_edge.families.llama import ATTENTION, EMBEDDING, HEAD, experts
from megatron_edge.families.table import Family

FAMILY = Family(
    "MixtralForCausalLM",
    EMBEDDING + ATTENTION + experts("block_sparse_moe", "gate", "w1", "w3", "w2") + HEAD,
    num_experts="num_local_experts",
    expert_ffn="intermediate_size",
    required={"sliding_window": (None,), "router_jitter_noise": (0.0,)},
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
