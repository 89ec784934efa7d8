"""How a Megatron parameter is made of Hugging Face tensors: the machinery behind every family's name table.

The same table serves import (read the slices of a shard), gather (cut a whole parameter back into Hugging Face
tensors), quantizer state (block maxima are cut like the weight that they belong to), byte arithmetic and parity checks.
Pure: no tensors, no process groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_edge.contracts import ParamRule

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Family:
    """One architecture of transformers: its name table and what its config.json means.

    Attributes:
        rules: the name table; `output_layer.weight` is left out where embeddings are tied.
        qkv_bias: q, k and v have a bias. qk_norm: queries and keys are normed per head.
        num_experts, expert_ffn: keys of config.json; None for a dense model.
        renormalises: whether router weights of the chosen experts are scaled to sum to 1: a value, or a key of
            config.json (False where it is absent).
        required: key of config.json -> the only values that this table is right for.
        defaults: what transformers assumes where config.json is silent, other than for Llama.
    """

    architecture: str
    rules: tuple[ParamRule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: str | None = None
    expert_ffn: str | None = None
    renormalises: bool | str = True
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a decoder, in elements; `num_experts` is 0 for a dense model, whose MLPs are `ffn_hidden_size` wide."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    num_experts: int = 0
    expert_ffn_size: int = 0
    experts_per_token: int = 0
    qk_norm: bool = False

    def size(self, name: str) -> int:
        """The size that a ParamRule's `shape` names."""
        return {
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "expert_ffn": self.expert_ffn_size,
            "heads": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "qkv": (self.num_heads + 2 * self.num_kv_heads) * self.head_dim,
            "head_dim": self.head_dim,
            "vocab": self.vocab_size,
            "experts": self.num_experts,
        }[name]


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


def _filled(rule: ParamRule, layer: str, expert: str) -> ParamRule:
    def fill(text: str) -> str:
        return text.replace("{layer}", layer).replace("{expert}", expert)

    return replace(rule, pattern=fill(rule.pattern), targets=tuple(fill(target) for target in rule.targets))


def find_rule(name: str, rules: tuple[ParamRule, ...]) -> ParamRule | None:
    """The rule of the Megatron parameter `name` (layer and expert index of the whole model), filled in."""
    layer, expert = (re.search(rf"\.{kind}\.(\d+)\.", name) for kind in ("layers", "local_experts"))
    found = (layer.group(1) if layer else "", expert.group(1) if expert else "")
    return next((_filled(rule, *found) for rule in rules if _filled(rule, *found).pattern == name), None)


def all_rules(rules: tuple[ParamRule, ...], dims: ModelDims) -> list[ParamRule]:
    """Every parameter of the whole model, filled in, in the order of the forward pass."""
    before = [r for r in rules if r.pattern.startswith("embedding")]
    after = [r for r in rules if "{layer}" not in r.pattern and r not in before]
    layers = [
        _filled(rule, str(layer), str(expert))
        for layer in range(dims.num_layers)
        for rule in rules
        if "{layer}" in rule.pattern
        for expert in range(dims.num_experts if rule.is_expert else 1)
    ]
    return before + layers + after


def pieces(rule: ParamRule, dims: ModelDims, *, tp_rank: int = 0, tp: int = 1) -> list[Piece]:
    """Where each part of one rank's shard comes from; an expert's shards are those of expert tensor parallelism.
    With tp=1: how the whole parameter is made up."""
    cols = (0, dims.size(rule.shape[1])) if len(rule.shape) > 1 else None
    if rule.merge == "qkv":
        return _qkv_pieces(rule, dims, cols, tp_rank, tp)
    rows = dims.size(rule.shape[0])
    if rule.split_axis == 1:
        assert cols is not None
        size = cols[1] // tp
        return [Piece(rule.targets[0], (0, rows), (tp_rank * size, (tp_rank + 1) * size), (0, rows))]
    size = rows // tp if rule.split_axis == 0 else rows
    begin = tp_rank * size if rule.split_axis == 0 else 0
    return [
        Piece(target, (begin, begin + size), cols, (i * size, (i + 1) * size)) for i, target in enumerate(rule.targets)
    ]


def _qkv_pieces(rule: ParamRule, dims: ModelDims, cols: tuple[int, int] | None, tp_rank: int, tp: int) -> list[Piece]:
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
            out.append(Piece(target, (rows, rows + size), cols, (at, at + size)))
            at += size
    return out


def hf_shape(target: str, rule: ParamRule, dims: ModelDims) -> tuple[int, ...]:
    """Shape of the whole Hugging Face tensor `target` of `rule`."""
    parts = [piece for piece in pieces(rule, dims) if piece.target == target]
    rows = max(piece.rows[1] for piece in parts)
    return (rows,) if parts[0].cols is None else (rows, parts[0].cols[1])


def expected_tensors(rules: tuple[ParamRule, ...], dims: ModelDims) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of a model, in the order of the forward pass."""
    return {target: hf_shape(target, rule, dims) for rule in all_rules(rules, dims) for target in rule.targets}
