"""The name table: every element is placed once for every tensor-parallel size, and where transformers has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_edge.contracts import InputError, ParamRule
from megatron_edge.export.gather import cut
from megatron_edge.families import FAMILIES, ModelDims, all_rules, find_rule, hf_shape, pieces, rules_of

LLAMA = FAMILIES["LlamaForCausalLM"].rules

GROUPED = ModelDims(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=72,
    num_heads=12,
    num_kv_heads=6,
    head_dim=8,
    vocab_size=66,
    tied=False,
)
ONE_KV_HEAD_EACH = ModelDims(
    num_layers=2, hidden_size=60, ffn_hidden_size=72, num_heads=6, num_kv_heads=6, head_dim=4, vocab_size=30, tied=False
)
DIMS = pytest.mark.parametrize("dims", [GROUPED, ONE_KV_HEAD_EACH], ids=["grouped", "ungrouped"])
TENSOR_PARALLEL = pytest.mark.parametrize("tp", [1, 2, 3, 6])


def hf_tensors(dims: ModelDims) -> dict[str, Tensor]:
    """Every Hugging Face tensor with a number of its own in every element, in transformers' own shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(transformers_config(dims, LlamaConfig))
    tensors, begin = {}, 0
    for name, meta in model.state_dict().items():
        tensors[name] = torch.arange(begin, begin + meta.numel(), dtype=torch.float64).reshape(meta.shape)
        begin += meta.numel()
    return tensors


def transformers_config(dims: ModelDims, kind):
    return kind(
        num_hidden_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        intermediate_size=dims.ffn_hidden_size,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        vocab_size=dims.vocab_size,
        tie_word_embeddings=dims.tied,
    )


def shard(rule: ParamRule, dims: ModelDims, tensors: dict[str, Tensor], tp_rank: int, tp: int) -> Tensor:
    """One rank's parameter, filled as import fills it."""
    parts = pieces(rule, dims, tp_rank=tp_rank, tp=tp)
    filled = []
    for piece in sorted(parts, key=lambda p: p.shard_rows):
        part = tensors[piece.target][slice(*piece.rows)]
        filled.append(part if piece.cols is None else part[:, slice(*piece.cols)])
        assert piece.shard_rows[1] - piece.shard_rows[0] == part.shape[0]
    return torch.cat(filled)


@DIMS
@TENSOR_PARALLEL
def test_every_element_lies_on_one_rank(dims: ModelDims, tp: int) -> None:
    """Or, where nothing is split, on each rank once."""
    for rule in all_rules(LLAMA, dims):
        for target in rule.targets:
            times = torch.zeros(hf_shape(target, rule, dims), dtype=torch.int)
            for tp_rank in range(tp):
                for piece in pieces(rule, dims, tp_rank=tp_rank, tp=tp):
                    if piece.target == target:
                        part = times[slice(*piece.rows)]
                        (part if piece.cols is None else part[:, slice(*piece.cols)]).add_(1)
            assert (times == (tp if rule.split_axis is None else 1)).all(), (rule.pattern, target)


@DIMS
@TENSOR_PARALLEL
def test_every_row_of_a_shard_is_filled_once(dims: ModelDims, tp: int) -> None:
    for rule in all_rules(LLAMA, dims):
        for tp_rank in range(tp):
            covered = [row for p in pieces(rule, dims, tp_rank=tp_rank, tp=tp) for row in range(*p.shard_rows)]
            assert sorted(covered) == list(range(len(covered))), rule.pattern


@DIMS
def test_the_table_names_what_transformers_has(dims: ModelDims) -> None:
    found = {t: hf_shape(t, rule, dims) for rule in all_rules(LLAMA, dims) for t in rule.targets}
    assert found == {name: tuple(tensor.shape) for name, tensor in hf_tensors(dims).items()}


@DIMS
@TENSOR_PARALLEL
def test_shards_put_together_and_cut_are_the_model_again(dims: ModelDims, tp: int) -> None:
    tensors = hf_tensors(dims)
    for rule in all_rules(LLAMA, dims):
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


@DIMS
def test_block_maxima_are_cut_like_the_weight(dims: ModelDims) -> None:
    """One column per block of 4 weights: cutting maxima gives the maxima of the cut weights."""
    tensors = hf_tensors(dims)
    for rule in all_rules(LLAMA, dims):
        if rule.merge != "replicate":
            whole = shard(rule, dims, tensors, 0, 1)
            of_blocks = cut(whole.unflatten(1, (-1, 4)).amax(-1), rule, dims, columns_per_entry=4)
            for target, maxima in of_blocks.items():
                assert torch.equal(maxima, tensors[target].unflatten(1, (-1, 4)).amax(-1))


@DIMS
@TENSOR_PARALLEL
def test_heads_meet_the_kv_head_that_transformers_gives_them(dims: ModelDims, tp: int) -> None:
    """Megatron views linear_qkv's output as [KV groups, query heads of the group + key + value, head_dim] on each rank
    (attention.py:1003); transformers gives query head h key head h // n by repeat_kv. Head by head."""
    from transformers.models.llama.modeling_llama import repeat_kv

    rule = find_rule("decoder.layers.1.self_attention.linear_qkv.weight", LLAMA)
    assert rule is not None
    tensors = hf_tensors(dims)
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


def test_tied_models_have_no_output_layer() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    assert find_rule("output_layer.weight", rules_of(config)) is None
    assert find_rule("output_layer.weight", rules_of(config | {"tie_word_embeddings": False})) is not None


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'GptNeoForCausalLM'.*LlamaForCausalLM"):
        rules_of({"architectures": ["GptNeoForCausalLM"]})
