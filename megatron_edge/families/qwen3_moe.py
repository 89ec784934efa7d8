"""Qwen3-MoE: Qwen3's attention, a mixture of experts in every layer."""

from __future__ import annotations

from megatron_edge.families.llama import ATTENTION, EMBEDDING, HEAD, QK_NORM, experts
from megatron_edge.families.table import Family

FAMILY = Family(
    "Qwen3MoeForCausalLM",
    EMBEDDING + ATTENTION + QK_NORM + experts("mlp", "gate", "gate_proj", "up_proj", "down_proj") + HEAD,
    qk_norm=True,
    num_experts="num_experts",
    expert_ffn="moe_intermediate_size",
    renormalises="norm_topk_prob",
    required={
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": (None, []),
    },
    defaults={"num_experts_per_tok": 8},
)
