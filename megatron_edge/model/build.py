"""A Hugging Face model as this rank's shard of a Megatron GPTModel, weights read slice by slice."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.model.families import ModelDims, find_rule, pieces, rules_of
from megatron_edge.model.hf_config import rope_scaling, rope_theta
from megatron_edge.model.layers import PackedAttention, PackedRotaryEmbedding, RMSNorm

ReadSlice = Callable[[str, slice | None, slice | None], Tensor]


def transformer_config(hf_config: dict, plan: ParallelPlan, dtype: torch.dtype, device: torch.device) -> Any:
    """Megatron's TransformerConfig for a Llama-family model. Fused kernels that need TransformerEngine or apex are
    off; deallocating pipeline outputs is off on CPU, where with gloo it gives changing, wrong losses."""
    from megatron.core.transformer import TransformerConfig

    dims = ModelDims.from_hf(hf_config)
    return TransformerConfig(
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        ffn_hidden_size=dims.ffn_hidden_size,
        num_attention_heads=dims.num_heads,
        num_query_groups=dims.num_kv_heads,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        sequence_parallel=plan.sequence_parallel,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        deallocate_pipeline_outputs=device.type != "cpu",
        calculate_per_token_loss=True,
        hetereogenous_dist_checkpoint=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
    )


def build_model(hf_config: dict, plan: ParallelPlan, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """This rank's part of the model, its weights not yet set. All ranks call it; process groups must exist.

    Returns:
        GPTModel; call it through `forward`. It gives fp32 losses [b, s] (labels given) or logits [b, s, vocab / tp]
        on the last pipeline stage, hidden states [s, b, h] elsewhere.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    config = transformer_config(hf_config, plan, dtype, device)
    dims = ModelDims.from_hf(hf_config)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    block = TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
    model = GPTModel(
        config,
        block,
        vocab_size=dims.vocab_size,
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=dims.tied,
    )
    model.rotary_pos_emb = PackedRotaryEmbedding(dims.head_dim, rope_theta(hf_config), rope_scaling(hf_config), device)
    _mark_tensor_parallel(model, hf_config)
    return model.to(device)


def _mark_tensor_parallel(model: nn.Module, hf_config: dict) -> None:
    """Upstream does this where it initialises weights, which we skip; without it the gradient norm of every clipping
    counts the shards of tensor-parallel rank 0 alone (layers.py:89)."""
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    rules = rules_of(hf_config)
    for name, param in named_shards(model).items():
        rule = find_rule(name, rules)
        if rule is not None and rule.split_axis is not None:
            set_tensor_model_parallel_attributes(param, True, rule.split_axis, 1)


def forward(model: nn.Module, batch: Any, labels: Tensor | None = None) -> Tensor:
    """Runs `model` on a batch (tokens, positions, attention_mask); positions restart at each document."""
    unwrap(model).rotary_pos_emb.position_ids = batch.positions
    return model(batch.tokens, batch.positions, batch.attention_mask, labels=labels)


def unwrap(model: nn.Module) -> Any:
    """The GPTModel inside Megatron's DistributedDataParallel, or the model itself."""
    from megatron.core.distributed import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


def first_layer_of(model: nn.Module) -> int:
    """Index in the whole model of this stage's first layer."""
    layers = unwrap(model).decoder.layers
    return layers[0].layer_number - 1 if len(layers) else 0


def global_name(name: str, first_layer: int) -> str:
    """A module or parameter name of this pipeline stage with the layer's index in the whole model."""
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m.group()) + first_layer), name, count=1)


def named_shards(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their name in the whole model; the last stage's copy of a tied embedding under the
    embedding's own name."""
    inner = unwrap(model)
    offset = first_layer_of(inner)
    shards = {global_name(name, offset): param for name, param in inner.named_parameters()}
    if inner.share_embeddings_and_output_weights and "output_layer.weight" in shards:
        copy = shards.pop("output_layer.weight")
        shards.setdefault("embedding.word_embeddings.weight", copy)
    return shards


@torch.no_grad()
def load_weights(model: nn.Module, read: ReadSlice, hf_config: dict, *, tp_rank: int, tp: int) -> int:
    """Fills every parameter of this shard; `read(name, rows, cols)` gives a slice of a Hugging Face tensor.

    Returns:
        Number of elements read.

    Raises:
        InputError: a parameter that the family's name table does not know.
    """
    rules, dims = rules_of(hf_config), ModelDims.from_hf(hf_config)
    count = 0
    for name, param in named_shards(model).items():
        rule = find_rule(name, rules)
        if rule is None:
            raise InputError(f"model.source: parameter {name} is not in the name table of {hf_config['architectures']}")
        for piece in pieces(rule, dims, tp_rank=tp_rank, tp=tp):
            cols = slice(*piece.cols) if piece.cols else None
            part = read(piece.target, slice(*piece.rows), cols)
            param.data[slice(*piece.shard_rows)].copy_(part)
            count += part.numel()
    return count
