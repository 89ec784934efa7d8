"""Byte arithmetic: what an artifact takes on its device, what training takes on each rank. No tensors, no measuring.

In: a RunConfig (its precision settled, not "auto") and a model's checked config.json (model/hf_config.py). Out: records
of bytes, or a refusal before anything is spent. Weights and KV cache are exact (artifact/formats.py has the bytes of
each format); activations are estimates, and each function says of what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_edge.artifact.formats import STATIC_KV_FORMATS, kv_storage_bytes, storage_bytes
from megatron_edge.artifact.tables import Table, tables_of
from megatron_edge.checks import layers_per_chunk
from megatron_edge.config import RunConfig
from megatron_edge.contracts import DeviceProfile, InputError, MemoryPlan, ParallelPlan, QuantRule
from megatron_edge.families import all_rules, dims_of, expected_tensors, hf_shape, rules_of
from megatron_edge.recipe import quant_rules, rule_of

PREFILL_CHUNK_TOKENS = 512  # llama.cpp's n_ubatch; other runtimes read a prompt in chunks as well
DISTILL_CHUNK_BYTES = 2**26  # fp32 logits that distillation works on at once
DISTILL_CHUNKS = 8  # buffers of that size: train/distill.py
DTYPE_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Linear:
    """One linear layer of every decoder layer: (out, in), and the Megatron module that holds it."""

    name: str
    shape: tuple[int, int]
    module: str


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: linear layers outside and inside of experts, others (norms, biases, routers); `head` is 0
    where the output layer is the embedding."""

    embedding: int
    linears: int
    experts: int
    others: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.linears + self.experts + self.others + self.head


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank of one pipeline stage; `activations_bytes` is an estimate. `teacher_bytes` are a teacher's
    weights, what one layer of it makes, and what the distillation keeps of it."""

    stage: int
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    teacher_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        own = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
        return own + self.teacher_bytes


def linears(hf_config: Mapping[str, Any]) -> tuple[Linear, ...]:
    """The linear layers of one decoder layer, by their Hugging Face names."""
    rules, dims = rules_of(hf_config), replace(dims_of(hf_config), num_layers=1)
    return tuple(
        Linear(
            name=target.removeprefix("model.layers.0.").removesuffix(".weight"),
            shape=(shape[0], shape[1]),
            module=rule.module.removeprefix("decoder.layers.0."),
        )
        for rule in all_rules(rules, dims)
        if rule.is_linear
        for target in rule.targets
        for shape in [hf_shape(target, rule, dims)]
    )


def count_parameters(hf_config: Mapping[str, Any]) -> ParameterCount:
    rules, dims = rules_of(hf_config), dims_of(hf_config)
    embedding = dims.vocab_size * dims.hidden_size
    everything = sum(math.prod(shape) for shape in expected_tensors(rules, dims).values())
    of_layer = linears(hf_config)
    inside = dims.num_layers * sum(math.prod(one.shape) for one in of_layer if ".local_experts." in one.module)
    outside = dims.num_layers * sum(math.prod(one.shape) for one in of_layer) - inside
    head = 0 if dims.tied else embedding
    return ParameterCount(embedding, outside, inside, everything - embedding - head - outside - inside, head)


def linear_bytes(linear: Linear, layer: int, rules: tuple[QuantRule, ...], excluded: list[str], dtype: str) -> int:
    """Bytes of one linear layer in the artifact, its scales included; `dtype` where it stays unquantised. `rules` are
    the recipe's (recipe.quant_rules)."""
    rule = rule_of(f"decoder.layers.{layer}.{linear.module}", rules, excluded)
    if rule is None:
        return storage_bytes(dtype, linear.shape)
    input_scale = 4 if rule.activation != "none" else 0
    return storage_bytes(rule.weight, linear.shape, rule.group_size) + input_scale


def table_bytes(table: Table, dtype: str) -> int:
    """Bytes of an embedding or an output layer in the artifact, its scales included; `dtype` where it is left alone."""
    if table.format == "bf16":
        return storage_bytes(dtype, table.shape)
    return storage_bytes(table.format, table.shape, table.group_size)


def weights_bytes(config: RunConfig, hf_config: Mapping[str, Any]) -> int:
    """Bytes of all tensors of the canonical artifact: linears and tables in their format, the rest in the training
    dtype."""
    dtype, count = config.train.precision, count_parameters(hf_config)
    rules, excluded = quant_rules(config.quant, hf_config), config.quant.exclude
    total = count.others * DTYPE_BYTES[dtype]
    total += sum(table_bytes(table, dtype) for table in tables_of(config.quant, hf_config))
    for layer in range(hf_config["num_hidden_layers"]):
        total += sum(linear_bytes(linear, layer, rules, excluded, dtype) for linear in linears(hf_config))
        total += 8 if config.kv.format in STATIC_KV_FORMATS else 0  # k_scale and v_scale
    return total


def kv_bytes(fmt: str, hf_config: Mapping[str, Any], batch: int, seq_len: int) -> int:
    """Bytes of a full KV cache of `batch` sequences; "none" is bf16. Static scales belong to the weights."""
    values = (
        2,
        hf_config["num_hidden_layers"],
        batch,
        seq_len,
        hf_config["num_key_value_heads"],
        hf_config["head_dim"],
    )
    return kv_storage_bytes(fmt, values)


def device_activations_bytes(hf_config: Mapping[str, Any], batch: int, seq_len: int) -> int:
    """Estimate: one chunk of a prompt inside one layer in fp32, with its attention scores, and a row of logits each."""
    hidden, ffn, width = hf_config["hidden_size"], hf_config["intermediate_size"], hf_config["head_dim"]
    heads, kv_heads = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
    tokens = min(PREFILL_CHUNK_TOKENS, batch * seq_len)
    row = 2 * hidden + (2 * heads + 2 * kv_heads) * width + heads * seq_len + 3 * ffn
    return 4 * (tokens * row + batch * hf_config["vocab_size"])


def plan(config: RunConfig, hf_config: Mapping[str, Any]) -> MemoryPlan:
    """Bytes on the device at its limits: export.max_batch_size sequences of export.max_seq_len tokens (at most the
    model's own context)."""
    export, device = config.export, config.device
    seq_len = min(export.max_seq_len, hf_config["max_position_embeddings"])
    return MemoryPlan(
        weights_bytes=weights_bytes(config, hf_config),
        kv_bytes=kv_bytes(config.kv.format, hf_config, export.max_batch_size, seq_len),
        activations_bytes=device_activations_bytes(hf_config, export.max_batch_size, seq_len),
        workspace_bytes=device.overhead_bytes,
        budget_bytes=device.memory_bytes - device.reserved_bytes,
        max_batch=export.max_batch_size,
        max_seq_len=seq_len,
    )


def refuse_if_over(needed: MemoryPlan, device: DeviceProfile) -> None:
    """Raises InputError with the bytes of each part where the plan exceeds the budget, and with what would fit."""
    over = needed.total_bytes - needed.budget_bytes
    if over <= 0:
        return
    parts = (
        ("weights", needed.weights_bytes),
        ("KV cache", needed.kv_bytes),
        ("activations", needed.activations_bytes),
        ("runtime", needed.workspace_bytes),
    )
    left = needed.budget_bytes - (needed.total_bytes - needed.kv_bytes)
    fitting = left * needed.max_seq_len // needed.kv_bytes
    advice = (
        f"export.max_seq_len of at most {fitting} with export.max_batch_size={needed.max_batch}"
        if fitting > 0
        else "a smaller model, or a narrower quant="
    )
    raise InputError(
        f"device={device.name}: {needed.total_bytes:,} bytes ({', '.join(f'{name} {size:,}' for name, size in parts)}) "
        f"exceed its budget of {needed.budget_bytes:,} bytes by {over:,}; allowed: {advice}"
    )


def training_plan(
    config: RunConfig,
    hf_config: Mapping[str, Any],
    layout: ParallelPlan,
    teacher: Mapping[str, Any] | None = None,
) -> tuple[TrainingMemory, ...]:
    """Bytes per rank, one entry per pipeline stage: DDP with fp32 gradients, Adam, bf16 with fp32 main weights, and a
    teacher of the config.json `teacher` where there is one."""
    train = config.train
    micro_batches = max(1, train.global_batch // (train.micro_batch * layout.dp))
    expert_copies = layout.world_size // (layout.pp * layout.ep * layout.etp)
    stages = []
    for stage in range(layout.pp):
        last = stage == layout.pp - 1
        layers, dense, experts, ends = _stage_parameters(hf_config, layout, stage)
        parameters = layers * (dense + experts) + ends
        trained, per_parameter, weights = (layers * dense + ends, layers * experts), 12, parameters
        if train.lora_rank is not None:  # fp32 adapters; a layer's parameter is its merged weight, beside W0
            (dense, experts), (base, expert_base) = _adapter_parameters(hf_config, layout, train.lora_rank)
            trained, per_parameter = (layers * dense, layers * experts), 8
            weights += layers * (base + expert_base)
        elif train.precision == "fp32":
            per_parameter = 8
        split = config.parallel.distributed_optimizer
        kept = trained[0] // (layout.dp * layout.cp if split else 1) + trained[1] // (expert_copies if split else 1)
        adapters = 0 if train.lora_rank is None else 4 * sum(trained)
        in_flight = min(layout.pp - stage, micro_batches)
        stages.append(
            TrainingMemory(
                stage=stage,
                parameters=parameters,
                weights_bytes=weights * DTYPE_BYTES[train.precision] + adapters,
                gradients_bytes=sum(trained) * 4,
                optimizer_bytes=kept * per_parameter if train.steps else 0,
                activations_bytes=_training_activations_bytes(config, hf_config, layout, layers, in_flight, last),
                teacher_bytes=0 if teacher is None else _teacher_bytes(config, teacher, layout, stage, micro_batches),
            )
        )
    return tuple(stages)


def _stage_parameters(hf_config: Mapping[str, Any], layout: ParallelPlan, stage: int) -> tuple[int, int, int, int]:
    """Layers of a stage, what one rank holds of each (outside and inside of experts), and embeddings and last norm."""
    dims, first, last = dims_of(hf_config), stage == 0, stage == layout.pp - 1
    embedding = dims.vocab_size * dims.hidden_size // layout.tp
    # A tied output layer on another stage than the embedding is a copy of it.
    ends = embedding * (first + (last and not (first and dims.tied))) + (dims.hidden_size if last else 0)
    return (
        sum(layers_per_chunk(dims.num_layers, layout)[stage :: layout.pp]),
        *_layer_parameters(hf_config, layout),
        ends,
    )


def _teacher_bytes(
    config: RunConfig, teacher: Mapping[str, Any], layout: ParallelPlan, stage: int, micro_batches: int
) -> int:
    """A teacher's weights, the activations of one of its layers (an estimate), and on the last stage the hidden states
    that it leaves for each micro-batch and the chunks of logits."""
    train, size = config.train, DTYPE_BYTES[config.train.precision]
    layers, dense, experts, ends = _stage_parameters(teacher, layout, stage)
    kept = 0
    if stage == layout.pp - 1:
        split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
        tokens = micro_batches * train.micro_batch * train.seq_length_tokens // split
        logits = train.micro_batch * train.seq_length_tokens // layout.cp * teacher["vocab_size"] // layout.tp
        kept = tokens * teacher["hidden_size"] * size + DISTILL_CHUNKS * min(DISTILL_CHUNK_BYTES, 4 * logits)
        kept += size * logits  # the student's gradient, which is made with the loss
    inside = _training_activations_bytes(config, teacher, layout, layers=1, in_flight=1, last=False)
    return (layers * (dense + experts) + ends) * size + inside + kept


def _layer_parameters(hf_config: Mapping[str, Any], layout: ParallelPlan) -> tuple[int, int]:
    """Parameters of one layer that one rank holds: outside and inside of experts."""
    dims = replace(dims_of(hf_config), num_layers=1)
    counts = {False: 0, True: 0}
    for rule in all_rules(rules_of(hf_config), dims):
        if ".layers." in rule.pattern:
            size = sum(math.prod(hf_shape(target, rule, dims)) for target in rule.targets)
            tensor = layout.etp if rule.is_expert else layout.tp
            counts[rule.is_expert] += size // (tensor if rule.split_axis is not None else 1)
    return counts[False], counts[True] // layout.ep


def _adapter_parameters(
    hf_config: Mapping[str, Any], layout: ParallelPlan, rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(of adapters, of the weights that they adapt) of one layer on one rank, each outside and inside of experts."""
    dims = replace(dims_of(hf_config), num_layers=1)
    trained, adapted = {False: 0, True: 0}, {False: 0, True: 0}
    for rule in all_rules(rules_of(hf_config), dims):
        if rule.is_linear:
            shapes = [hf_shape(target, rule, dims) for target in rule.targets]
            rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
            tensor = layout.etp if rule.is_expert else layout.tp
            rows, columns = (rows // tensor, columns) if rule.split_axis == 0 else (rows, columns // tensor)
            trained[rule.is_expert] += rank * (rows + columns)
            adapted[rule.is_expert] += rows * columns
    return (trained[False], trained[True] // layout.ep), (adapted[False], adapted[True] // layout.ep)


def _training_activations_bytes(
    config: RunConfig, hf_config: Mapping[str, Any], layout: ParallelPlan, layers: int, in_flight: int, last: bool
) -> int:
    """Estimate of what backward needs: the inputs of each operation of `layers` layers for every micro batch in flight
    (of one layer, and the input of every other, where layers are recomputed), and fp32 logits with their gradient on
    the last stage.

    After Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), counted again for RMSNorm, SwiGLU, GQA, no dropout.
    """
    train, dims, recompute = config.train, dims_of(hf_config), config.parallel.recompute
    tokens = train.micro_batch * train.seq_length_tokens // layout.cp
    sequence = layout.tp if layout.sequence_parallel else 1
    replicated = 4 * dims.hidden_size // sequence  # inputs of two norms, qkv and fc1
    norms_fp32 = 2 * 4 * dims.hidden_size // sequence  # a norm works in fp32
    # q, k, v before and after RoPE, and the attention scores
    attention = (3 * dims.num_heads + 4 * dims.num_kv_heads) * dims.head_dim
    attention += 0 if recompute == "selective" else 2 * dims.num_heads * train.seq_length_tokens
    # gate, up, silu(gate), their product
    mlp = 4 * (dims.ffn_hidden_size + dims.experts_per_token * dims.expert_ffn_size)
    size = DTYPE_BYTES[train.precision]
    per_token = size * (replicated + (attention + mlp) // layout.tp) + norms_fp32
    logits = 2 * 4 * tokens * dims.vocab_size // layout.tp if last else 0
    if recompute == "full":
        return tokens * (per_token + layers * in_flight * size * dims.hidden_size // sequence) + logits
    return layers * tokens * per_token * in_flight + logits
