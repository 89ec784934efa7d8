"""Qwen3: Llama whose queries and keys are normed per head, before the rotation."""

from __future__ import annotations

from megatron_edge.families.llama import ATTENTION, EMBEDDING, HEAD, MLP, QK_NORM
from megatron_edge.families.table import Family

FAMILY = Family(
    "Qwen3ForCausalLM",
    EMBEDDING + ATTENTION + QK_NORM + MLP + HEAD,
    qk_norm=True,
    required={"attention_bias": (False,), "use_sliding_window": (False,)},
    defaults={"head_dim": 128},
)
