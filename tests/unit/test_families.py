"""The name table: every element is placed once for every tensor-parallel size, and where transformers has it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_edge.contracts import InputError, ParamRule
from megatron_edge.export.gather import Whole, rows_of
from megatron_edge.families import (
    FAMILIES,
    ModelDims,
    all_rules,
    dims_of,
    expected_tensors,
    find_rule,
    hf_shape,
    pieces,
    rules_of,
)
from megatron_edge.model.hf_config import checked_config

LLAMA = FAMILIES["LlamaForCausalLM"].rules
COMMON = {
    "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 12,
    "num_key_value_heads": 6, "head_dim": 8, "vocab_size": 66, "tie_word_embeddings": False,
}  # fmt: skip
UNGROUPED = COMMON | {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 4, "vocab_size": 30}
# Name -> what differs from Llama: transformers' model_type and sizes.
MODELS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"model_type": "llama"},
    "llama, ungrouped": UNGROUPED | {"model_type": "llama"},
    "qwen2": {k: v for k, v in COMMON.items() if k != "head_dim"} | {"model_type": "qwen2"},
    "qwen3": COMMON | {"model_type": "qwen3"},
    "mixtral": COMMON | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": COMMON
    | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
TENSOR_PARALLEL = pytest.mark.parametrize("tp", [1, 2, 3, 6])


@dataclass(frozen=True)
class Model:
    """A family's table for sizes, and every tensor as transformers would write it, each element with its own number."""

    rules: tuple[ParamRule, ...]
    dims: ModelDims
    tensors: dict[str, Tensor]

    def all_rules(self) -> list[ParamRule]:
        return all_rules(self.rules, self.dims)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return written_by_transformers(MODELS[request.param], tmp_path_factory.mktemp("model"))


def written_by_transformers(sizes: dict[str, Any], directory: Path) -> Model:
    """Through save_pretrained: transformers names experts one by one in files, but not in memory."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).save_pretrained(directory)
    hf_config = checked_config(json.loads((directory / "config.json").read_text()), "the test's model")
    tensors, begin = {}, 0
    for name, stored in sorted(load_file(directory / "model.safetensors").items()):
        tensors[name] = torch.arange(begin, begin + stored.numel(), dtype=torch.float64).reshape(stored.shape)
        begin += stored.numel()
    return Model(rules_of(hf_config), dims_of(hf_config), tensors)


def shard(rule: ParamRule, dims: ModelDims, tensors: dict[str, Tensor], tp_rank: int, tp: int) -> Tensor:
    """One rank's parameter, filled as import fills it."""
    parts = pieces(rule, dims, tp_rank=tp_rank, tp=tp)
    filled = []
    for piece in sorted(parts, key=lambda p: p.shard_rows):
        part = tensors[piece.target][slice(*piece.rows)]
        filled.append(part if piece.cols is None else part[:, slice(*piece.cols)])
        assert piece.shard_rows[1] - piece.shard_rows[0] == part.shape[0]
    return torch.cat(filled)


@TENSOR_PARALLEL
def test_every_element_lies_on_one_rank(model: Model, tp: int) -> None:
    """Or, where nothing is split, on each rank once."""
    for rule in model.all_rules():
        for target in rule.targets:
            times = torch.zeros(hf_shape(target, rule, model.dims), dtype=torch.int)
            for tp_rank in range(tp):
                for piece in pieces(rule, model.dims, tp_rank=tp_rank, tp=tp):
                    if piece.target == target:
                        part = times[slice(*piece.rows)]
                        (part if piece.cols is None else part[:, slice(*piece.cols)]).add_(1)
            assert (times == (tp if rule.split_axis is None else 1)).all(), (rule.pattern, target)


@TENSOR_PARALLEL
def test_every_row_of_a_shard_is_filled_once(model: Model, tp: int) -> None:
    for rule in model.all_rules():
        for tp_rank in range(tp):
            covered = [row for p in pieces(rule, model.dims, tp_rank=tp_rank, tp=tp) for row in range(*p.shard_rows)]
            assert sorted(covered) == list(range(len(covered))), rule.pattern


def test_the_table_names_what_transformers_has(model: Model) -> None:
    found = expected_tensors(model.rules, model.dims)
    assert found == {name: tuple(tensor.shape) for name, tensor in model.tensors.items()}


class InMemory:
    """Stands where export reads a checkpoint's files."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def read(self, key: str, begin: int, end: int, out: Tensor) -> None:
        out.copy_(self.tensor[begin:end])


def cut(whole: Tensor, rule: ParamRule, dims: ModelDims) -> dict[str, Tensor]:
    """As export does, all rows at once; also of block maxima, which have fewer columns."""
    stored = Whole(InMemory(whole), ("",), (len(whole),), tuple(whole.shape), whole.dtype)  # type: ignore[arg-type]
    parts: dict[str, list[Any]] = {}
    for piece in pieces(rule, dims):
        parts.setdefault(piece.target, []).append(piece)
    return {name: rows_of(stored, of_it, 0, hf_shape(name, rule, dims)[0]) for name, of_it in parts.items()}


@TENSOR_PARALLEL
def test_shards_put_together_and_cut_are_the_model_again(model: Model, tp: int) -> None:
    tensors, dims = model.tensors, model.dims
    for rule in model.all_rules():
        shards = [shard(rule, dims, tensors, tp_rank, tp) for tp_rank in range(tp)]
        if rule.split_axis is None:
            assert all(torch.equal(one, shards[0]) for one in shards)
            whole = shards[0]
        elif rule.merge == "gated":  # each shard: its gate rows, then its up rows
            halves = [one.chunk(2) for one in shards]
            whole = torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        else:
            whole = torch.cat(shards, dim=rule.split_axis)
        again = cut(whole, rule, dims)
        assert set(again) == set(rule.targets)
        assert all(torch.equal(again[target], tensors[target]) for target in rule.targets), rule.pattern


def test_block_maxima_are_cut_like_the_weight(model: Model) -> None:
    """One column per block of 4 weights: cutting maxima gives the maxima of the cut weights."""
    tensors, dims = model.tensors, model.dims
    for rule in model.all_rules():
        if rule.is_linear:
            whole = shard(rule, dims, tensors, 0, 1)
            of_blocks = cut(whole.unflatten(1, (-1, 4)).amax(-1), rule, dims)
            for target, maxima in of_blocks.items():
                assert torch.equal(maxima, tensors[target].unflatten(1, (-1, 4)).amax(-1))


@TENSOR_PARALLEL
def test_heads_meet_the_kv_head_that_transformers_gives_them(model: Model, tp: int) -> None:
    """Megatron views linear_qkv's output as [KV groups, query heads of the group + key + value, head_dim] on each rank
    (attention.py:1003); transformers gives query head h key head h // n by repeat_kv. Head by head."""
    from transformers.models.llama.modeling_llama import repeat_kv

    rule = find_rule("decoder.layers.1.self_attention.linear_qkv.weight", model.rules)
    assert rule is not None
    tensors, dims = model.tensors, model.dims
    x = torch.randint(-8, 8, (dims.hidden_size,), generator=torch.Generator().manual_seed(1)).double()  # exact sums
    q, k, v = (tensors[target] @ x for target in rule.targets)
    per_group = dims.num_heads // dims.num_kv_heads
    k, v = (repeat_kv(y.reshape(1, dims.num_kv_heads, 1, dims.head_dim), per_group)[0, :, 0] for y in (k, v))
    heads_here = dims.num_heads // tp
    for tp_rank in range(tp):
        out = shard(rule, dims, tensors, tp_rank, tp) @ x
        out = out.reshape(dims.num_kv_heads // tp, per_group + 2, dims.head_dim)
        for local in range(heads_here):
            head, group = tp_rank * heads_here + local, local // per_group
            assert torch.equal(out[group, local % per_group], q.reshape(-1, dims.head_dim)[head])
            assert torch.equal(out[group, per_group], k[head])
            assert torch.equal(out[group, per_group + 1], v[head])


def test_names_are_found_by_their_layer() -> None:
    rule = find_rule("decoder.layers.17.mlp.linear_fc1.weight", LLAMA)
    assert rule is not None
    assert rule.targets == ("model.layers.17.mlp.gate_proj.weight", "model.layers.17.mlp.up_proj.weight")
    assert find_rule("decoder.layers.17.mlp.linear_fc3.weight", LLAMA) is None


def test_experts_are_found_by_their_number() -> None:
    rule = find_rule(
        "decoder.layers.3.mlp.experts.local_experts.12.linear_fc2.weight", FAMILIES["MixtralForCausalLM"].rules
    )
    assert rule is not None and rule.targets == ("model.layers.3.block_sparse_moe.experts.12.w2.weight",)
    rule = find_rule(
        "decoder.layers.3.mlp.experts.local_experts.12.linear_fc1.weight", FAMILIES["Qwen3MoeForCausalLM"].rules
    )
    assert rule is not None and rule.targets == (
        "model.layers.3.mlp.experts.12.gate_proj.weight",
        "model.layers.3.mlp.experts.12.up_proj.weight",
    )


def test_tied_models_have_no_output_layer() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    assert find_rule("output_layer.weight", rules_of(config)) is None
    assert find_rule("output_layer.weight", rules_of(config | {"tie_word_embeddings": False})) is not None


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'GptNeoForCausalLM'.*LlamaForCausalLM"):
        rules_of({"architectures": ["GptNeoForCausalLM"]})
