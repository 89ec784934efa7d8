"""Llama (2, 3, 3.1 RoPE scaling, SmolLM2, ...), and the rules that its descendants share."""

from __future__ import annotations

from megatron_edge.contracts import ParamRule
from megatron_edge.families.table import HF_LAYER, LAYER, Family

EMBEDDING = (
    ParamRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), 0, shape=("vocab", "hidden")),
)
INPUT_NORM = ParamRule(
    LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), None, "replicate", ("hidden",)
)
ATTENTION = (
    INPUT_NORM,
    ParamRule(
        LAYER + "self_attention.linear_qkv.weight",
        tuple(f"{HF_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
        0,
        "qkv",
        ("qkv", "hidden"),
    ),
    ParamRule(
        LAYER + "self_attention.linear_proj.weight",
        (HF_LAYER + "self_attn.o_proj.weight",),
        1,
        shape=("hidden", "heads"),
    ),
)
QKV_BIAS = ParamRule(
    LAYER + "self_attention.linear_qkv.bias",
    tuple(f"{HF_LAYER}self_attn.{name}_proj.bias" for name in "qkv"),
    0,
    "qkv",
    ("qkv",),
)
QK_NORM = tuple(
    ParamRule(
        f"{LAYER}self_attention.{name}_layernorm.weight",
        (f"{HF_LAYER}self_attn.{name}_norm.weight",),
        None,
        "replicate",
        ("head_dim",),
    )
    for name in "qk"
)
POST_NORM = ParamRule(
    LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",), None, "replicate", ("hidden",)
)
MLP = (
    POST_NORM,
    ParamRule(
        LAYER + "mlp.linear_fc1.weight",
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
        0,
        "gated",
        ("ffn", "hidden"),
    ),
    ParamRule(LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",), 1, shape=("hidden", "ffn")),
)
HEAD = (
    ParamRule("decoder.final_layernorm.weight", ("model.norm.weight",), None, "replicate", ("hidden",)),
    ParamRule("output_layer.weight", ("lm_head.weight",), 0, shape=("vocab", "hidden")),
)


def experts(block: str, router: str, gate: str, up: str, down: str) -> tuple[ParamRule, ...]:
    """A mixture of experts in place of the MLP: `block` is its Hugging Face module, the others names inside of it."""
    expert = LAYER + "mlp.experts.local_experts.{expert}."
    hf_expert = HF_LAYER + block + ".experts.{expert}."
    return (
        POST_NORM,
        ParamRule(
            LAYER + "mlp.router.weight",
            (f"{HF_LAYER}{block}.{router}.weight",),
            None,
            "replicate",
            ("experts", "hidden"),
        ),
        ParamRule(
            expert + "linear_fc1.weight",
            (f"{hf_expert}{gate}.weight", f"{hf_expert}{up}.weight"),
            0,
            "gated",
            ("expert_ffn", "hidden"),
        ),
        ParamRule(expert + "linear_fc2.weight", (f"{hf_expert}{down}.weight",), 1, shape=("hidden", "expert_ffn")),
    )


FAMILY = Family(
    "LlamaForCausalLM",
    EMBEDDING + ATTENTION + MLP + HEAD,
    required={"attention_bias": (False,), "mlp_bias": (False,)},
    defaults={"bos_token_id": 1, "eos_token_id": 2},
)
