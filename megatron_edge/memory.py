"""Byte arithmetic: what an artifact weighs, what training takes on each rank. No tensors, no measuring.

In: a RunConfig (its precision settled, not "auto") and a model's checked config.json (model/hf_config.py). Out: bytes.
Weights and KV cache are exact (artifact/formats.py has the bytes of each format); activations are counted operation by
operation, and each function says which. deployment.py has what the artifact takes on its device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_edge.artifact.formats import STATIC_KV_FORMATS, kv_storage_bytes, storage_bytes
from megatron_edge.artifact.tables import Table, tables_of
from megatron_edge.checks import layers_per_chunk
from megatron_edge.config import RunConfig, has_fp8_product, parts_of
from megatron_edge.contracts import ParallelPlan, QuantRule
from megatron_edge.families import ModelDims, all_rules, dims_of, expected_tensors, hf_shape, rules_of
from megatron_edge.recipe import quant_rules, rule_of

DISTILL_CHUNK_BYTES = 2**26  # fp32 logits that distillation works on at once
DISTILL_CHUNKS = 8  # buffers of that size: train/distill.py
LOSS_ROW_BYTES = 16  # beside the logits of a token: its label and two fp32 numbers (model/cross_entropy.py)
ACTIVATION_BYTES = {"bf16": 2, "fp32": 4}  # what layers calculate in, by train.precision
# Of each trained parameter, by train.precision: its weight, its gradient (DDP's fp32 buffer), and what Adam keeps of it
# (two fp32 moments, under bf16 the fp32 weight too).
WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}


@dataclass(frozen=True)
class Linear:
    """One linear layer of every decoder layer: (out, in), and the Megatron module that holds it."""

    name: str
    shape: tuple[int, int]
    module: str

    @property
    def is_expert(self) -> bool:
        return ".local_experts." in self.module


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
    """Bytes on one rank of one pipeline stage. `activations_bytes` are what backward needs and what it makes meanwhile;
    `quantizers_bytes` the fake-quantised weights of a step and the maxima behind them; `teacher_bytes` a teacher's
    weights, what one layer of it makes, and what the distillation keeps of it."""

    stage: int
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    teacher_bytes: int = 0
    quantizers_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        kept = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.teacher_bytes
        return kept + self.activations_bytes + self.quantizers_bytes


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


def distinct_linears(hf_config: Mapping[str, Any]) -> list[tuple[Linear, int]]:
    """The linear layers of one decoder layer and how many there are of each: the first expert's stand for all experts',
    which have one format (recipe.py)."""
    num_experts = dims_of(hf_config).num_experts
    found = [one for one in linears(hf_config) if not one.is_expert or ".local_experts.0." in one.module]
    return [(one, num_experts if one.is_expert else 1) for one in found]


def count_parameters(hf_config: Mapping[str, Any]) -> ParameterCount:
    rules, dims = rules_of(hf_config), dims_of(hf_config)
    embedding = dims.vocab_size * dims.hidden_size
    everything = sum(math.prod(shape) for shape in expected_tensors(rules, dims).values())
    of_layer = linears(hf_config)
    inside = dims.num_layers * sum(math.prod(one.shape) for one in of_layer if one.is_expert)
    outside = dims.num_layers * sum(math.prod(one.shape) for one in of_layer) - inside
    head = 0 if dims.tied else embedding
    return ParameterCount(embedding, outside, inside, everything - embedding - head - outside - inside, head)


def linear_bytes(linear: Linear, layer: int, rules: tuple[QuantRule, ...], excluded: list[str]) -> int:
    """Bytes of one linear layer in the artifact, its scales included; bf16 where it stays unquantised. `rules` are the
    recipe's (recipe.quant_rules)."""
    rule = rule_of(f"decoder.layers.{layer}.{linear.module}", rules, excluded)
    if rule is None:
        return storage_bytes("bf16", linear.shape)
    input_scale = 4 if rule.activation != "none" else 0
    return storage_bytes(rule.weight, linear.shape, rule.group_size) + input_scale


def table_bytes(table: Table) -> int:
    """Bytes of an embedding or an output layer in the artifact, its scales included."""
    if table.format == "bf16":
        return storage_bytes("bf16", table.shape)
    return storage_bytes(table.format, table.shape, table.group_size)


def weights_bytes(config: RunConfig, hf_config: Mapping[str, Any]) -> int:
    """Bytes of all tensors of the canonical artifact: linears and tables in their format, the rest in bf16, whatever
    they were trained in."""
    rules, excluded = quant_rules(config.quant, hf_config), config.quant.exclude
    total = count_parameters(hf_config).others * 2
    total += sum(table_bytes(table) for table in tables_of(config.quant, hf_config))
    counted = distinct_linears(hf_config)
    for layer in range(hf_config["num_hidden_layers"]):
        total += sum(count * linear_bytes(linear, layer, rules, excluded) for linear, count in counted)
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


def training_plan(
    config: RunConfig,
    hf_config: Mapping[str, Any],
    layout: ParallelPlan,
    teacher: Mapping[str, Any] | None = None,
) -> tuple[TrainingMemory, ...]:
    """Bytes per rank, one entry per pipeline stage, and a teacher of the config.json `teacher` where there is one.

    The update counts for nothing: on CUDA it is one kernel without temporaries (train/update.py), after activations are
    gone; on a CPU what it makes is as large as the largest weight."""
    train = config.train
    micro_batches = max(1, train.global_batch // (train.micro_batch * layout.dp))
    expert_copies = layout.world_size // (layout.pp * layout.ep * layout.etp)
    per_weight, per_parameter = WEIGHT_BYTES[train.precision], OPTIMIZER_BYTES[train.precision]
    stages = []
    for stage in range(layout.pp):
        layers, dense, experts, ends = _stage_parameters(hf_config, layout, stage)
        parameters = layers * (dense + experts) + ends
        trained, weights = (layers * dense + ends, layers * experts), parameters
        if train.lora_rank is not None:  # fp32 adapters; a layer's parameter is its merged weight, beside W0
            (dense, experts), (base, expert_base) = _adapter_parameters(hf_config, layout, train.lora_rank)
            trained, per_parameter = (layers * dense, layers * experts), OPTIMIZER_BYTES["fp32"]
            weights += layers * (base + expert_base)
        split = config.parallel.distributed_optimizer
        kept = trained[0] // (layout.dp * layout.cp if split else 1) + trained[1] // (expert_copies if split else 1)
        adapters = 0 if train.lora_rank is None else WEIGHT_BYTES["fp32"] * sum(trained)
        stages.append(
            TrainingMemory(
                stage=stage,
                parameters=parameters,
                weights_bytes=weights * per_weight + adapters,
                gradients_bytes=sum(trained) * GRADIENT_BYTES,
                optimizer_bytes=kept * per_parameter if train.steps else 0,
                activations_bytes=_stage_activations_bytes(config, hf_config, layout, stage, micro_batches),
                teacher_bytes=0 if teacher is None else _teacher_bytes(config, teacher, layout, stage, micro_batches),
                quantizers_bytes=_quantizers_bytes(config, hf_config, layout, stage, micro_batches),
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
    """A teacher's weights, the activations of one of its layers (an estimate), the states that it leaves for each
    micro-batch (of every layer where those are compared, and on the last stage the final), and there the chunks of
    logits."""
    train, size = config.train, ACTIVATION_BYTES[config.train.precision]
    layers, dense, experts, ends = _stage_parameters(teacher, layout, stage)
    split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    state = size * teacher["hidden_size"] * (micro_batches * train.micro_batch * train.seq_length_tokens // split)
    kept = layers * state if train.distill_layers_weight else 0
    if stage == layout.pp - 1:
        logits = train.micro_batch * train.seq_length_tokens // layout.cp * teacher["vocab_size"] // layout.tp
        kept += state + DISTILL_CHUNKS * min(DISTILL_CHUNK_BYTES, 4 * logits)
        kept += size * logits  # the student's gradient, which is made with the loss
    tokens = train.micro_batch * train.seq_length_tokens // layout.cp
    inside = tokens * layer_activations_bytes(config, dims_of(teacher), layout)
    return (layers * (dense + experts) + ends) * WEIGHT_BYTES[train.precision] + inside + kept


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


def _quantizers_bytes(
    config: RunConfig, hf_config: Mapping[str, Any], layout: ParallelPlan, stage: int, micro_batches: int
) -> int:
    """Fake-quantised weights of a stage, which one step keeps (quantize/apply.py: constant_weights), beside them the
    codes that FP8 products multiply, and int4's fp32 maxima of each group. Without train.cache_weights each micro-batch
    in flight keeps its own for backward, or one layer's at a time where layers are recomputed."""
    dims, first, last = dims_of(hf_config), stage == 0, stage == layout.pp - 1
    rules, size = quant_rules(config.quant, hf_config), WEIGHT_BYTES[config.train.precision]
    own_layers = sum(layers_per_chunk(dims.num_layers, layout)[stage :: layout.pp])
    copies = 1.0
    if not config.train.cache_weights:
        at_once = _layers_in_flight(own_layers, layout, stage, micro_batches)
        copies = (1 if config.parallel.recompute == "full" else at_once) / max(own_layers, 1)
    counts = layers_per_chunk(dims.num_layers, layout)
    mine = {
        layer
        for chunk in range(stage, len(counts), layout.pp)
        for layer in range(sum(counts[:chunk]), sum(counts[: chunk + 1]))
    }
    total = 0.0
    for linear in all_rules(rules_of(hf_config), replace(dims, num_experts=min(dims.num_experts, 1))):
        if not linear.is_linear or int(linear.pattern.split(".")[2]) not in mine:
            continue
        rule = rule_of(linear.module, rules, config.quant.exclude)
        if rule is not None:  # experts of a layer have one format: the first stands for all
            weights = sum(math.prod(hf_shape(target, linear, dims)) for target in linear.targets)
            share = dims.num_experts / (layout.etp * layout.ep) if linear.is_expert else 1 / layout.tp
            scales = 4 / rule.group_size if rule.weight == "int4" else 0
            codes = 1 + scales if _keeps_codes(config) else 0
            total += weights * share * (copies * (size + codes) + scales)
    for table in tables_of(config.quant, hf_config):
        here = last if table.module == "output_layer" else first or (last and dims.tied)
        if table.format != "bf16" and here:
            per_weight = size + (4 / table.group_size if table.format == "int4" else 0)
            total += math.prod(table.shape) / layout.tp * per_weight
    return int(total)


def layer_activations_bytes(config: RunConfig, dims: ModelDims, layout: ParallelPlan) -> int:
    """What backward needs of one layer for one token of a rank's part of the text: the tensors that torch's autograd
    keeps of model/layers.py and model/fused.py, one by one. Routed tokens are taken to spread evenly over experts.

    With a mask, which windows of several documents take on a CPU, and on CUDA where the documents are many and short:
    others keep no mask, and with flash attention no key and value for each head, but under context parallelism half of
    a part's more of them, for the first of its two pieces (model/segments.py).

    After Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), for our layers and without dropout."""
    size, sequence = ACTIVATION_BYTES[config.train.precision], layout.tp if layout.sequence_parallel else 1
    norms, recompute = 2 * _norm_bytes(dims, size) // sequence, config.parallel.recompute
    attention = _attention_bytes(recompute, dims, layout, size)
    mask = 0 if recompute == "selective" else size * config.train.seq_length_tokens
    kept = 1 if _keeps_codes(config) and not dims.num_experts else size  # of an input that a linear layer rounds
    if config.model.backend != "local":  # whose norms write no rounded value (quantize/written_inputs.py)
        norms -= 2 * (size - kept) * dims.hidden_size // sequence
    if any(part.activation != "none" for _, part in parts_of(config.quant)):
        attention += kept * dims.num_heads * dims.head_dim  # the projection keeps its rounded input beside the result
    # gate and up, and what SwiGLU makes of them; an expert's input and its output before the router's weight
    mlp = size * 3 * (dims.ffn_hidden_size + dims.experts_per_token * dims.expert_ffn_size)
    routed = size * 2 * dims.experts_per_token * dims.hidden_size * layout.etp
    return norms + mask + _router_bytes(dims, size) // sequence + (attention + mlp + routed) // layout.tp


def _attention_bytes(recompute: str, dims: ModelDims, layout: ParallelPlan, size: int) -> int:
    """Of one token, over all tensor ranks: what attention and the norms of queries and keys keep."""
    heads, kv_heads = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    projection, has_groups = heads + 2 * kv_heads, kv_heads < heads
    keeps_projection = recompute == "selective" or not (has_groups or layout.cp > 1)  # value is a view of it
    kept = heads + kv_heads + projection + heads  # query, key, what value is a view of, and the result
    if not keeps_projection:  # query and result; key and value (of all context ranks) for each head
        kept = 2 * heads + max(2 * layout.cp * heads, (2 * layout.cp + 1) * kv_heads if layout.cp > 1 else 0)
    others = 0 if recompute == "selective" else 4 * dims.num_heads  # logs of the sums
    if dims.qk_norm:  # and 1 / rms; queries of several groups are copied
        others += 4 * (dims.num_heads + dims.num_kv_heads)
        kept += projection * (not keeps_projection) + heads * (has_groups and dims.num_kv_heads > layout.tp)
    return size * kept + others


def _router_bytes(dims: ModelDims, size: int) -> int:
    """Of one token: of each expert whether it is chosen and its probability; of each choice two int64 places, the
    probability in fp32, and in the activations' dtype."""
    return dims.num_experts * (1 + size) + dims.experts_per_token * (20 + size)


def _keeps_codes(config: RunConfig) -> bool:
    """Whether linear layers multiply FP8 numbers in training (quantize/fp8_gemm.py), and keep what they round so."""
    is_split = config.model.backend == "te" and config.parallel.tensor > 1
    if not config.train.fp8_gemm or config.train.lora_rank is not None or is_split:
        return False
    return all(
        has_fp8_product(part.weight, part.activation) and (part.weight == "fp8" or part.group_size == 128)
        for _, part in parts_of(config.quant)
    )


def _norm_bytes(dims: ModelDims, size: int) -> int:
    """Of one token: a norm's input, the result, and 1 / rms in fp32."""
    return dims.hidden_size * (size + size) + 4


def _stage_activations_bytes(
    config: RunConfig, hf_config: Mapping[str, Any], layout: ParallelPlan, stage: int, micro_batches: int
) -> int:
    """All that a stage holds at the peak of backward: what it keeps of every micro batch in flight (of one layer, and
    the input of every other, where layers are recomputed), on the last stage the logits, and what the backward of one
    layer makes meanwhile: gradients of what it kept, and the largest gradient of a weight (where products do
    not add it to its buffer: runtime/weight_gradients.py)."""
    train, dims = config.train, dims_of(hf_config)
    last, size = stage == layout.pp - 1, ACTIVATION_BYTES[train.precision]
    tokens = train.micro_batch * train.seq_length_tokens // layout.cp
    sequence = layout.tp if layout.sequence_parallel else 1
    per_layer = layer_activations_bytes(config, dims, layout)
    own_layers = sum(layers_per_chunk(dims.num_layers, layout)[stage :: layout.pp])
    layers = _layers_in_flight(own_layers, layout, stage, micro_batches)
    kept = per_layer * layers
    if config.parallel.recompute == "full":
        kept = per_layer + layers * size * dims.hidden_size // sequence
    kept += 4 * dims.head_dim  # the rotation, which all layers share
    if last:
        # Logits, in whose place their gradient is made; a distillation makes its own beside them (_teacher_bytes).
        kept += size * dims.vocab_size // layout.tp
        kept += LOSS_ROW_BYTES if train.mode != "qad" else 0
        kept += _norm_bytes(dims, size) // sequence
    largest = 2 * dims.ffn_hidden_size * dims.hidden_size
    if stage == 0 or last:
        largest = max(largest, dims.vocab_size * dims.hidden_size)
    return tokens * (kept + per_layer) + size * largest // layout.tp


def _layers_in_flight(layers: int, layout: ParallelPlan, stage: int, micro_batches: int) -> int:
    """Layers x micro batches whose activations a stage of `layers` layers holds at once, under Megatron's 1F1B
    schedule, and under its interleaved one where a stage has several chunks."""
    if layout.vpp == 1:
        return layers * min(layout.pp - stage, micro_batches)
    chunks = min(2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1, micro_batches * layout.vpp)
    return -(-layers * chunks // layout.vpp)
