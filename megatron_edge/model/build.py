"""A Hugging Face model as this rank's shard of a Megatron GPTModel, weights read slice by slice.

A shard is an nn.ModuleList of model chunks: one GPTModel, or several under virtual pipelining, in the order of the
model; each may be inside of Megatron's DistributedDataParallel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_edge.checks import layers_per_chunk
from megatron_edge.contracts import InputError, ParallelPlan, ParamRule
from megatron_edge.families import dims_of, family_of, find_rule, pieces, renormalises, rules_of
from megatron_edge.model.cross_entropy import gpt_class
from megatron_edge.model.fused import swiglu
from megatron_edge.model.hf_config import rope_scaling, rope_theta
from megatron_edge.model.layers import (
    FusedRMSNorm,
    PackedAttention,
    PackedRotaryEmbedding,
    RMSNorm,
    experts_class,
    rotating_attention_class,
)

ReadSlice = Callable[[str, slice | None, slice | None], Tensor]
Recompute = Literal["none", "selective", "full"]
Backend = Literal["local", "apex", "te"]


def transformer_config(
    hf_config: dict, plan: ParallelPlan, dtype: torch.dtype, device: torch.device, recompute: Recompute = "none"
) -> Any:
    """Megatron's TransformerConfig. Fused kernels that need TransformerEngine or apex are off; deallocating pipeline
    outputs is off on CPU, where with gloo it gives changing, wrong losses; virtual pipelines exchange overlapped and
    unbatched, because batched they give wrong losses."""
    from megatron.core.transformer import TransformerConfig

    dims, family = dims_of(hf_config), family_of(hf_config)
    return TransformerConfig(
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        ffn_hidden_size=dims.ffn_hidden_size or dims.expert_ffn_size,
        num_attention_heads=dims.num_heads,
        num_query_groups=dims.num_kv_heads,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config["rms_norm_eps"],
        qk_layernorm=family.qk_norm,
        add_qkv_bias=family.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=True,  # the layer's own function on gate and up together: _set_layers gives ours
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=plan.tp,
        context_parallel_size=plan.cp,
        sequence_parallel=plan.sequence_parallel,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        deallocate_pipeline_outputs=device.type != "cpu",
        calculate_per_token_loss=True,
        hetereogenous_dist_checkpoint=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # each product decides: runtime/weight_gradients.py
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
        **_pipeline_settings(dims.num_layers, plan),
        **_expert_settings(hf_config, plan),
        **_recompute_settings(recompute),
    )


def _pipeline_settings(num_layers: int, plan: ParallelPlan) -> dict[str, Any]:
    if plan.pp == 1:
        return {}
    layout: list[list[str]] = [["decoder"] * count for count in layers_per_chunk(num_layers, plan)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    settings: dict[str, Any] = {"pipeline_model_parallel_size": plan.pp, "pipeline_model_parallel_layout": layout}
    if plan.vpp > 1:
        settings["virtual_pipeline_model_parallel_size"] = plan.vpp
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings


def _expert_settings(hf_config: dict, plan: ParallelPlan) -> dict[str, Any]:
    dims = dims_of(hf_config)
    if not dims.num_experts:
        return {}
    return {
        "num_moe_experts": dims.num_experts,
        "moe_ffn_hidden_size": dims.expert_ffn_size,
        "moe_router_topk": dims.experts_per_token,
        "moe_router_pre_softmax": not renormalises(hf_config),
        "moe_router_load_balancing_type": "none",  # fine-tuning keeps the routing that the model came with
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": plan.ep,
        "expert_tensor_parallel_size": plan.etp,
    }


def _recompute_settings(recompute: Recompute) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective"} if recompute == "selective" else {}


def build_model(
    hf_config: dict,
    plan: ParallelPlan,
    dtype: torch.dtype,
    device: torch.device,
    recompute: Recompute = "none",
    backend: Backend = "local",
) -> nn.ModuleList:
    """This rank's shard of the model, its weights not yet set. All ranks call it; process groups must exist.

    Names and shapes of parameters are the same with every backend.

    Returns:
        Its chunks; call them through `forward`. A chunk gives fp32 losses [b, s] (labels given) or logits
        [b, s, vocab / tp] at the end of the model, hidden states [s, b, h] elsewhere.
    """
    from megatron.core import parallel_state

    config = transformer_config(hf_config, plan, dtype, device, recompute)
    chunks = nn.ModuleList()
    for stage in range(plan.vpp):
        which = {"ignore_virtual": plan.vpp == 1, "vp_stage": stage if plan.vpp > 1 else None}
        first = parallel_state.is_pipeline_first_stage(**which)
        last = parallel_state.is_pipeline_last_stage(**which)
        chunks.append(_build_chunk(hf_config, config, device, first, last, which["vp_stage"], backend))
    _mark_tensor_parallel(chunks, hf_config)
    return chunks.to(device)


def _build_chunk(
    hf_config: dict, config: Any, device: torch.device, first: bool, last: bool, vp_stage: int | None, backend: Backend
) -> nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    dims = dims_of(hf_config)
    layer = get_gpt_layer_local_spec(
        normalization="RMSNorm", num_experts=dims.num_experts or None, qk_layernorm=config.qk_layernorm
    )
    norm = _set_layers(layer.submodules, config, backend)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    model = gpt_class()(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm),
        vocab_size=dims.vocab_size,
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=dims.tied,
        vp_stage=vp_stage,
    )
    model.rotary_pos_emb = PackedRotaryEmbedding(dims.head_dim, rope_theta(hf_config), rope_scaling(hf_config), device)
    return model


def _set_layers(layer: Any, config: Any, backend: Backend) -> Any:
    """Puts our attention, SwiGLU and experts, and the backend's norms and linear layers, into a layer's specification.

    Returns:
        The class of the backend's norm.
    """
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    attention.core_attention = PackedAttention
    layer.self_attention.module = rotating_attention_class()
    linears = mlp
    if config.num_moe_experts:
        mlp.experts.module = experts_class()
        linears = mlp.experts.submodules
    linears.activation_func = swiglu
    norm: Any = FusedRMSNorm if backend == "apex" else RMSNorm
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

        norm = TENorm
        attention.linear_qkv, attention.linear_proj = TEColumnParallelLinear, TERowParallelLinear
        linears.linear_fc1, linears.linear_fc2 = TEColumnParallelLinear, TERowParallelLinear
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return norm


def _mark_tensor_parallel(model: nn.ModuleList, hf_config: dict) -> None:
    """Upstream does this where it initialises weights, which we skip; without it the gradient norm of every clipping
    counts the shards of tensor-parallel rank 0 alone (layers.py:89).

    Experts' weights are marked too (`allreduce` False: reduced over the replicas of experts). Upstream marks them under
    expert parallelism alone (layers.py:886); tensor ranks that each hold whole experts, and see different tokens, would
    never sum their gradients."""
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    rules, config = rules_of(hf_config), chunks_of(model)[0].config
    of_expert = config.expert_model_parallel_size * config.expert_tensor_parallel_size
    for name, param in named_shards(model).items():
        rule = find_rule(name, rules)
        if rule is not None and rule.is_expert and of_expert != config.tensor_model_parallel_size:
            param.allreduce = False
        if rule is not None and rule.split_axis is not None and not hasattr(param, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(param, True, rule.split_axis, 1)


def forward(chunk: nn.Module, batch: Any, labels: Tensor | None = None) -> Tensor:
    """Runs one chunk on a batch (tokens, positions, attention_mask); positions restart at each document."""
    unwrap(chunk).rotary_pos_emb.position_ids = batch.positions
    return chunk(batch.tokens, batch.positions, batch.attention_mask, labels=labels)


def unwrap(chunk: nn.Module) -> Any:
    """The GPTModel inside Megatron's DistributedDataParallel, or the chunk itself."""
    from megatron.core.distributed import DistributedDataParallel

    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def chunks_of(model: nn.Module) -> list[Any]:
    """The GPTModels of a shard."""
    assert isinstance(model, nn.ModuleList)
    return [unwrap(chunk) for chunk in model]


def _global_name(name: str, first_layer: int, first_expert: int) -> str:
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m.group()) + first_layer), name, count=1)
    return re.sub(r"(?<=\.local_experts\.)\d+", lambda m: str(int(m.group()) + first_expert), name, count=1)


def _first_indices(chunk: Any) -> tuple[int, int]:
    """Indices in the whole model of the chunk's first layer and of its first expert."""
    from megatron.core import parallel_state

    layers = chunk.decoder.layers
    local = (chunk.config.num_moe_experts or 0) // chunk.config.expert_model_parallel_size
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    return first_layer, parallel_state.get_expert_model_parallel_rank() * local


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of all chunks by their name in the whole model: global layer and expert indices; an output layer that
    holds a copy of a tied embedding under the embedding's own name."""
    for chunk in chunks_of(model):
        first = _first_indices(chunk)
        is_copy = chunk.share_embeddings_and_output_weights and not chunk.pre_process
        for name, module in chunk.named_modules():
            if is_copy and name.split(".")[0] == "output_layer":
                name = name.replace("output_layer", "embedding.word_embeddings", 1)
            yield _global_name(name, *first), module


def named_shards(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their name in the whole model; the last stage's copy of a tied embedding under the
    embedding's own name."""
    shards: dict[str, nn.Parameter] = {}
    for chunk in chunks_of(model):
        first = _first_indices(chunk)
        named = ((name, param) for name, param in chunk.named_parameters() if not name.startswith("adapters."))
        found = {_global_name(name, *first): param for name, param in named}
        if chunk.share_embeddings_and_output_weights and "output_layer.weight" in found:
            copy = found.pop("output_layer.weight")
            found.setdefault("embedding.word_embeddings.weight", copy)
        shards |= {name: param for name, param in found.items() if name not in shards}
    return shards


def is_copy_of_embedding(name: str, model: nn.Module) -> bool:
    """Whether a shard named as the embedding is the output layer's copy of it, on a stage without the embedding."""
    return name.startswith("embedding.") and not any(chunk.pre_process for chunk in chunks_of(model))


def tensor_shard(rule: ParamRule, session: Any) -> tuple[int, int]:
    """(rank, size) of the tensor parallelism that cuts a parameter: an expert's own, or the model's."""
    if rule.is_expert:
        return session.etp_rank, session.plan.etp
    return session.tp_rank, session.plan.tp


@torch.no_grad()
def load_weights(model: nn.Module, read: ReadSlice, hf_config: dict, session: Any) -> int:
    """Fills every parameter of this shard; `read(name, rows, cols)` gives a slice of a Hugging Face tensor.

    Returns:
        Number of elements read.

    Raises:
        InputError: a parameter that the family's name table does not know.
    """
    rules, dims = rules_of(hf_config), dims_of(hf_config)
    count = 0
    for name, param in named_shards(model).items():
        rule = find_rule(name, rules)
        if rule is None:
            raise InputError(f"model.source: parameter {name} is not in the name table of {hf_config['architectures']}")
        rank, size = tensor_shard(rule, session)
        for piece in pieces(rule, dims, tp_rank=rank, tp=size):
            cols = slice(*piece.cols) if piece.cols else None
            part = read(piece.target, slice(*piece.rows), cols)
            param.data[slice(*piece.shard_rows)].copy_(part)
            count += part.numel()
    return count
