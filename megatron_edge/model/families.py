"""One name table per model family: which Hugging Face tensors each Megatron parameter holds, and how they merge.

The same table serves import (read the slices of a shard), gather (cut a whole parameter back into Hugging Face
tensors), quantizer state (block maxima are cut like the weight that they belong to) and parity checks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_edge.contracts import InputError, ParamRule

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."

LLAMA = (
    ParamRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), 0),
    ParamRule(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), None, "replicate"),
    ParamRule(
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(f"{_HF_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
        0,
        "qkv",
    ),
    ParamRule(_LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), 1),
    ParamRule(_LAYER + "pre_mlp_layernorm.weight", (_HF_LAYER + "post_attention_layernorm.weight",), None, "replicate"),
    ParamRule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        0,
        "gated",
    ),
    ParamRule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), 1),
    ParamRule("decoder.final_layernorm.weight", ("model.norm.weight",), None, "replicate"),
    ParamRule("output_layer.weight", ("lm_head.weight",), 0),
)

FAMILIES: dict[str, tuple[ParamRule, ...]] = {"LlamaForCausalLM": LLAMA}


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a decoder, in elements."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @classmethod
    def from_hf(cls, hf_config: dict) -> ModelDims:
        heads = hf_config["num_attention_heads"]
        return cls(
            num_layers=hf_config["num_hidden_layers"],
            hidden_size=hf_config["hidden_size"],
            ffn_hidden_size=hf_config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=hf_config.get("num_key_value_heads") or heads,
            head_dim=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
            vocab_size=hf_config["vocab_size"],
            tied=bool(hf_config.get("tie_word_embeddings", False)),
        )


@dataclass(frozen=True)
class Piece:
    """Rows and columns `[begin, end)` of a Hugging Face tensor and the rows of the Megatron shard that hold them.

    Columns of the shard are always whole: `cols` cuts the Hugging Face tensor alone. One-dimensional tensors have
    `cols` None.
    """

    target: str
    rows: tuple[int, int]
    cols: tuple[int, int] | None
    shard_rows: tuple[int, int]


def rules_of(hf_config: dict) -> tuple[ParamRule, ...]:
    """The name table of the model's family, without `output_layer` where embeddings are tied.

    Raises:
        InputError: the architecture has no table.
    """
    architecture = (hf_config.get("architectures") or [None])[0]
    if architecture not in FAMILIES:
        raise InputError(f"model.source: architecture {architecture!r} is not supported; allowed: {sorted(FAMILIES)}")
    rules = FAMILIES[architecture]
    if hf_config.get("tie_word_embeddings", False):
        rules = tuple(rule for rule in rules if rule.pattern != "output_layer.weight")
    return rules


def find_rule(name: str, rules: tuple[ParamRule, ...]) -> ParamRule | None:
    """The rule of the Megatron parameter `name` (global layer index), with `{layer}` filled in."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    layer = match.group(1) if match else ""
    for rule in rules:
        if rule.pattern.replace("{layer}", layer) == name:
            targets = tuple(target.replace("{layer}", layer) for target in rule.targets)
            return ParamRule(name, targets, rule.split_axis, rule.merge)
    return None


def all_rules(rules: tuple[ParamRule, ...], dims: ModelDims) -> list[ParamRule]:
    """Every parameter of the whole model, `{layer}` filled in, in the order of the forward pass."""
    before = [r for r in rules if r.pattern.startswith("embedding")]
    after = [r for r in rules if "{layer}" not in r.pattern and r not in before]
    layers = [
        ParamRule(
            rule.pattern.replace("{layer}", str(layer)),
            tuple(target.replace("{layer}", str(layer)) for target in rule.targets),
            rule.split_axis,
            rule.merge,
        )
        for layer in range(dims.num_layers)
        for rule in rules
        if "{layer}" in rule.pattern
    ]
    return before + layers + after


def pieces(rule: ParamRule, dims: ModelDims, *, tp_rank: int = 0, tp: int = 1) -> list[Piece]:
    """Where each part of one rank's shard comes from. With tp=1: how the whole parameter is made up."""
    if rule.merge == "replicate":
        return [Piece(rule.targets[0], (0, dims.hidden_size), None, (0, dims.hidden_size))]
    if rule.merge == "qkv":
        return _qkv_pieces(rule, dims, tp_rank, tp)
    if rule.merge == "gated":
        size = dims.ffn_hidden_size // tp
        begin = tp_rank * size
        return [
            Piece(target, (begin, begin + size), (0, dims.hidden_size), (i * size, (i + 1) * size))
            for i, target in enumerate(rule.targets)
        ]
    rows, cols = _matrix_shape(rule, dims)
    if rule.split_axis == 0:
        size = rows // tp
        return [Piece(rule.targets[0], (tp_rank * size, (tp_rank + 1) * size), (0, cols), (0, size))]
    size = cols // tp
    return [Piece(rule.targets[0], (0, rows), (tp_rank * size, (tp_rank + 1) * size), (0, rows))]


def _qkv_pieces(rule: ParamRule, dims: ModelDims, tp_rank: int, tp: int) -> list[Piece]:
    """Megatron interleaves by KV group: the group's query heads, its key head, its value head."""
    query_rows = dims.num_heads // dims.num_kv_heads * dims.head_dim
    group_rows = query_rows + 2 * dims.head_dim
    groups = dims.num_kv_heads // tp
    out = []
    for local in range(groups):
        group = tp_rank * groups + local
        at = local * group_rows
        for target, rows, size in (
            (rule.targets[0], group * query_rows, query_rows),
            (rule.targets[1], group * dims.head_dim, dims.head_dim),
            (rule.targets[2], group * dims.head_dim, dims.head_dim),
        ):
            out.append(Piece(target, (rows, rows + size), (0, dims.hidden_size), (at, at + size)))
            at += size
    return out


def _matrix_shape(rule: ParamRule, dims: ModelDims) -> tuple[int, int]:
    if rule.pattern.endswith(("word_embeddings.weight", "output_layer.weight")):
        return dims.vocab_size, dims.hidden_size
    if rule.pattern.endswith("linear_fc2.weight"):
        return dims.hidden_size, dims.ffn_hidden_size
    return dims.hidden_size, dims.num_heads * dims.head_dim


def hf_shape(target: str, rule: ParamRule, dims: ModelDims) -> tuple[int, ...]:
    """Shape of the whole Hugging Face tensor `target` of `rule`."""
    parts = [piece for piece in pieces(rule, dims) if piece.target == target]
    rows = max(piece.rows[1] for piece in parts)
    return (rows,) if parts[0].cols is None else (rows, parts[0].cols[1])
