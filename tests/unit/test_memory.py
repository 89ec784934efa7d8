"""Byte arithmetic against what really lies on disk, in tensors and in transformers' own modules."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from test_config import SMOLLM2
from tiny_artifact import RECIPES, llama_config, make_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_edge import compose, memory
from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.config import RunConfig
from megatron_edge.contracts import ParallelPlan
from megatron_edge.model import hf_config as hf
from megatron_edge.recipe import quant_rules

TINY = hf.checked_config({**llama_config().to_dict(), "architectures": ["LlamaForCausalLM"]}, "tiny")


def configured(*arguments: str) -> RunConfig:
    return compose.compose(["train.precision=bf16", *arguments])


def on_meta(sizes: dict) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_that_transformers_builds(tied: bool) -> None:
    sizes = {**SMOLLM2, "tie_word_embeddings": tied}
    assert memory.count_parameters(sizes).total == sum(p.numel() for p in on_meta(sizes).parameters())
    if tied:
        assert memory.count_parameters(sizes).total == 134_515_008  # SmolLM2-135M


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weights_are_the_bytes_of_a_written_artifact(recipe: str, precision: str, tmp_path: Path) -> None:
    """Whatever it was trained in: what no format covers is stored in bf16."""
    reader = ArtifactReader(make_tiny(tmp_path, recipe, "bfloat16", count=1).artifact)
    weight, activation, kv = RECIPES[recipe]
    presets = {"int4 fp8": "w4a8_awq", "int8 int8": "int8_sq", "nvfp4 none": "nvfp4_w4a16"}
    preset = presets.get(f"{weight} {activation}", weight)
    run = configured(f"quant={preset}", f"kv={kv}", f"train.precision={precision}")
    assert memory.weights_bytes(run, TINY) == reader.size_bytes()


def test_excluded_layers_keep_their_dtype() -> None:
    whole, without = configured("quant=int4"), configured("quant=int4", "quant.exclude=['decoder.layers.0.mlp.*']")
    rules = quant_rules(whole.quant, TINY)
    layer_0 = [linear for linear in memory.linears(TINY) if linear.name.startswith("mlp")]
    grown = sum(2 * linear.shape[0] * linear.shape[1] - memory.linear_bytes(linear, 1, rules, []) for linear in layer_0)
    assert memory.weights_bytes(without, TINY) - memory.weights_bytes(whole, TINY) == grown > 0


def test_kv_cache_bytes() -> None:
    cache = torch.empty(2, 30, 4, 512, 3, 64, dtype=torch.bfloat16, device="meta")
    assert memory.kv_bytes("none", SMOLLM2, 4, 512) == cache.nbytes
    assert memory.kv_bytes("fp8", SMOLLM2, 4, 512) == cache.to(torch.float8_e4m3fn).nbytes
    assert memory.kv_bytes("nvfp4", SMOLLM2, 4, 512) == cache.numel() // 2 + cache.numel() // 16
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    assert memory.kv_bytes("int8", SMOLLM2, 4, 512) == cache.numel() // block * block_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_training_bytes_of_all_stages_add_up(tied: bool) -> None:
    sizes = {**SMOLLM2, "tie_word_embeddings": tied}
    count, run = memory.count_parameters(sizes), configured("train.precision=fp32")
    (single,) = memory.training_plan(run, sizes, ParallelPlan())
    assert single.parameters == count.total
    stages = memory.training_plan(run, sizes, ParallelPlan(pp=3, world_size=3))
    copy = count.embedding if tied else 0  # the last stage keeps a copy of a tied embedding
    assert sum(stage.parameters for stage in stages) == count.total + copy
    (shard,) = memory.training_plan(run, sizes, ParallelPlan(tp=3, world_size=3))
    assert 3 * shard.parameters == count.total + 2 * count.others  # norms are on every tensor rank
    mixed = memory.training_plan(configured(), sizes, ParallelPlan())[0]
    assert (mixed.weights_bytes, mixed.gradients_bytes, mixed.optimizer_bytes) == tuple(
        count.total * size for size in (2, 4, 12)
    )


def test_optimizer_bytes_are_those_of_torchs_adam() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "rope_scaling": None}))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    (planned,) = memory.training_plan(configured("train.precision=fp32"), TINY, ParallelPlan())
    assert planned.optimizer_bytes == sum(t.nbytes for t in moments)
    assert planned.weights_bytes == sum(p.nbytes for p in model.parameters())
