"""The model families: one file each, with its name table. Adding one is a file here, a line below, and a test.

Callers hand in a config.json as model/hf_config.py checked and completed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_edge.contracts import InputError, ParamRule
from megatron_edge.families import llama, mixtral, qwen2, qwen3, qwen3_moe
from megatron_edge.families.table import (
    Family,
    ModelDims,
    Piece,
    all_rules,
    expected_tensors,
    find_rule,
    hf_shape,
    pieces,
)

FAMILIES: dict[str, Family] = {
    module.FAMILY.architecture: module.FAMILY for module in (llama, qwen2, qwen3, mixtral, qwen3_moe)
}

__all__ = [
    "FAMILIES",
    "Family",
    "ModelDims",
    "Piece",
    "all_rules",
    "dims_of",
    "expected_tensors",
    "family_of",
    "find_rule",
    "hf_shape",
    "pieces",
    "renormalises",
    "rules_of",
]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """Raises InputError where the architecture has no table."""
    architecture = (hf_config.get("architectures") or [None])[0]
    if architecture not in FAMILIES:
        raise InputError(f"model.source: architecture {architecture!r} is not supported; allowed: {sorted(FAMILIES)}")
    return FAMILIES[architecture]


def rules_of(hf_config: Mapping[str, Any]) -> tuple[ParamRule, ...]:
    """The name table of the model's family, without `output_layer` where embeddings are tied."""
    rules = family_of(hf_config).rules
    if hf_config.get("tie_word_embeddings", False):
        rules = tuple(rule for rule in rules if rule.pattern != "output_layer.weight")
    return rules


def dims_of(hf_config: Mapping[str, Any]) -> ModelDims:
    """Sizes of the model that `hf_config` describes."""
    family, heads = family_of(hf_config), hf_config["num_attention_heads"]
    experts = hf_config[family.num_experts] if family.num_experts else 0
    return ModelDims(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        ffn_hidden_size=0 if experts else hf_config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=hf_config.get("num_key_value_heads") or heads,
        head_dim=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        vocab_size=hf_config["vocab_size"],
        tied=bool(hf_config.get("tie_word_embeddings", False)),
        num_experts=experts,
        expert_ffn_size=hf_config[family.expert_ffn] if family.expert_ffn else 0,
        experts_per_token=hf_config["num_experts_per_tok"] if experts else 0,
        qk_norm=family.qk_norm,
    )


def renormalises(hf_config: Mapping[str, Any]) -> bool:
    """Whether the router's weights of the chosen experts are scaled to sum to 1."""
    rule = family_of(hf_config).renormalises
    return bool(hf_config.get(rule, False)) if isinstance(rule, str) else rule
