"""Refusals before anything is spent: combinations of the configuration, its device, its layout and its model.

In: a `RunConfig`, and the model's own config.json where a check needs its dimensions. Out: nothing, or an `InputError`
naming the field, the value and what is allowed. Called by the launcher before any process group exists, and by jobs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_edge import target_checks
from megatron_edge.config import QuantConfig, RunConfig, parts_of, weights_of
from megatron_edge.contracts import InputError, ParallelPlan, ParamRule, QuantRule
from megatron_edge.devices import check_device
from megatron_edge.families import ModelDims, all_rules, dims_of, rules_of
from megatron_edge.leaves import expected
from megatron_edge.target_limits import EDGE_LLM_GROUP, EDGE_LLM_RUNTIME

ACTIVATIONS = {
    "none": ("none",), "fp8": ("none", "fp8"), "int4": ("none", "fp8"), "int8": ("none", "int8"),
    "nvfp4": ("none", "nvfp4"),
}  # fmt: skip
GROUP_SIZES = {"none": (0,), "fp8": (0,), "int4": (32, 64, 128), "int8": (0,), "nvfp4": (16,)}
ALGORITHMS = {
    "none": ("max",), "fp8": ("max",), "int4": ("max", "awq", "awq_clip"), "int8": ("max", "smoothquant"),
    "nvfp4": ("max", "awq"),
}  # fmt: skip
KV_BLOCKS = {"int8": 32, "nvfp4": 16}
LLAMA_CPP_BLOCKS = {"int4": 32, "int8": 32, "nvfp4": 64}  # Q4_0, Q8_0, NVFP4


def check_config(config: RunConfig) -> None:
    """Every check across fields that needs neither the model nor the number of processes.

    Raises:
        InputError: naming the first field that is wrong, its value and what is allowed.
    """
    train, parallel = config.train, config.parallel
    for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context"):
        if parallel.auto and getattr(parallel, name) > 1:
            raise InputError(f"parallel.{name}={getattr(parallel, name)}: parallel=auto chooses it; allowed there is 1")
    chosen = {"sequence": False, "distributed_optimizer": False, "recompute": "none", "stage_layers": None}
    for name, default in chosen.items():
        value = getattr(parallel, name)
        if parallel.auto and value != default:
            raise expected(f"parallel.{name}", value, f"{default} with parallel=auto, which chooses it")
    if parallel.sequence and parallel.tensor == 1:
        raise InputError("parallel.sequence=true: needs parallel.tensor of at least 2; allowed with 1 is false")
    if parallel.sequence and train.seq_length_tokens % parallel.tensor:
        raise expected("train.seq_length_tokens", train.seq_length_tokens, f"a multiple of {parallel.tensor} (tensor)")
    if parallel.context > 1:
        pieces = 2 * parallel.context * (parallel.tensor if parallel.sequence else 1)
        if train.seq_length_tokens % pieces:
            words = f"a multiple of {pieces} (2 x context" + (" x tensor)" if parallel.sequence else ")")
            raise expected("train.seq_length_tokens", train.seq_length_tokens, words)
    if train.mode == "ptq" and train.steps:
        raise InputError(f"train.steps={train.steps}: train.mode=ptq only calibrates; allowed is 0, or train=qat")
    if train.min_learning_rate > train.learning_rate:
        raise expected("train.min_learning_rate", train.min_learning_rate, f"at most {train.learning_rate} (the peak)")
    _check_distillation(config)
    _check_adapters(config)
    _check_recipe(config)
    target_checks.check_targets(config)
    check_device(config)


def _check_distillation(config: RunConfig) -> None:
    """A leaf of the distillation that nothing reads is refused, and a student that is its own teacher."""
    train = config.train
    unused = {"teacher": None, "teacher_hf_config": None, "distill_temperature": 1.0}
    unused |= {f"distill_{one}_weight": 0.0 for one in ("label", "hidden", "layers")}
    for name, default in unused.items():
        if train.mode != "qad" and getattr(train, name) != default:
            words = (
                f"{'null' if default is None else default} with train.mode={train.mode}; only train=qad has a teacher"
            )
            raise expected(f"train.{name}", getattr(train, name), words)
    if train.teacher is None and train.teacher_hf_config is not None:
        words = "null with train.teacher=null: the student's own source is described by model.hf_config"
        raise expected("train.teacher_hf_config", train.teacher_hf_config, words)
    quant = config.quant
    quantised = weights_of(quant) or {quant.embedding, quant.head} != {"bf16"} or config.kv.format != "none"
    if train.mode == "qad" and train.teacher is None and not quantised:
        raise InputError(
            "train.teacher=null: with quant=none and kv=none the student is its own teacher and learns nothing; "
            "allowed: another model, or a recipe"
        )


def _check_adapters(config: RunConfig) -> None:
    train, adapts = config.train, config.train.mode == "lora_qat"
    for name in ("lora_rank", "lora_alpha"):
        if (getattr(train, name) is not None) != adapts:
            raise expected(f"train.{name}", getattr(train, name), "a number with train=lora_qat, null with any other")
    if adapts and not weights_of(config.quant):
        raise expected("quant.weight", "none", "a format with train=lora_qat: adapters are of quantised layers")


def check_run_dir(config: RunConfig) -> None:
    """Raises InputError where run_dir cannot be made or written; makes nothing."""
    path = Path(config.run_dir).absolute()
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        kind = "cannot be written to" if path.is_dir() else "is no directory"
        raise expected("run_dir", config.run_dir, f"a path that this user can write; {path} {kind}")


def check_batches(config: RunConfig, plan: ParallelPlan) -> None:
    """Raises InputError where the global batch is no whole number of micro batches on every data parallel rank."""
    train = config.train
    unit = train.micro_batch * plan.dp
    if train.global_batch % unit:
        raise InputError(
            f"train.global_batch={train.global_batch}: allowed are multiples of train.micro_batch x data parallel size "
            f"= {train.micro_batch} x {plan.dp} = {unit}"
        )
    if plan.vpp > 1 and train.global_batch // unit % plan.pp:
        raise InputError(
            f"train.global_batch={train.global_batch}: {train.global_batch // unit} micro batches per rank; allowed "
            f"with parallel.virtual_pipeline={plan.vpp} are whole rounds of the {plan.pp} stages: multiples of "
            f"{unit * plan.pp}"
        )


def check_model_dims(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """Layout, recipe and device against the sizes in a model's checked config.json (model/hf_config.py).

    Raises:
        InputError: naming the field, its value and what this model allows.
    """
    parallel, train, dims = config.parallel, config.train, dims_of(hf_config)
    tensor_sizes = {name: hf_config[name] for name in ("num_attention_heads", "num_key_value_heads", "vocab_size")}
    tensor_sizes |= {"intermediate_size": dims.ffn_hidden_size} if dims.ffn_hidden_size else {}
    for field, degree, sizes in (
        ("tensor", parallel.tensor, tensor_sizes),
        ("expert", parallel.expert, {"number of experts": dims.num_experts}),
        ("expert_tensor", parallel.expert_tensor, {"expert's width": dims.expert_ffn_size}),
    ):
        if degree > 1 and field != "tensor" and not dims.num_experts:
            raise InputError(f"parallel.{field}={degree}: the model has no experts; allowed is 1")
        for size, value in sizes.items():
            if value % degree:
                able = ", ".join(str(n) for n in range(1, 65) if not any(v % n for v in sizes.values()))
                raise InputError(
                    f"parallel.{field}={degree}: does not divide the model's {size}={value}; "
                    f"allowed for this model: {able}"
                )
    if dims.num_experts and parallel.tensor > 1 and not parallel.sequence:
        raise InputError(
            "parallel.sequence=false: Megatron routes tokens to experts under tensor parallelism only with their "
            "activations split; allowed with this model: true"
        )
    if train.seq_length_tokens > hf_config["max_position_embeddings"]:
        raise expected(
            "train.seq_length_tokens",
            train.seq_length_tokens,
            f"at most the model's context, max_position_embeddings={hf_config['max_position_embeddings']}",
        )
    block = KV_BLOCKS.get(config.kv.format, 1)
    if hf_config["head_dim"] % block:
        raise InputError(
            f"kv.format={config.kv.format}: blocks of {block} do not divide the model's head_dim="
            f"{hf_config['head_dim']}; allowed: kv=none"
        )
    _check_groups(config, hf_config)
    _check_tables(config, hf_config)
    target_checks.check_model(config, hf_config)


def check_teacher_dims(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """As `check_model_dims`, for a model that gets no quantizers and is not exported."""
    quant = replace(config.quant, weight="none", overrides=[], embedding="bf16", head="bf16")
    kv, export = replace(config.kv, format="none"), replace(config.export, targets=[])
    check_model_dims(replace(config, quant=quant, kv=kv, export=export), hf_config)


def layers_per_chunk(num_layers: int, plan: ParallelPlan) -> tuple[int, ...]:
    """Layers of each of pp x vpp chunks, in the order of the model; what does not divide goes to the first
    ones: the last has the output layer's work.

    Raises:
        InputError: fewer layers than chunks, or stage_layers that do not add up.
    """
    chunks = plan.pp * plan.vpp
    if plan.stage_layers:
        if len(plan.stage_layers) != chunks or sum(plan.stage_layers) != num_layers or min(plan.stage_layers) < 1:
            raise InputError(
                f"parallel.stage_layers={list(plan.stage_layers)}: allowed are {chunks} numbers of at least 1 "
                f"(pipeline={plan.pp} x virtual_pipeline={plan.vpp}) that add up to the model's {num_layers} layers"
            )
        return plan.stage_layers
    if chunks > num_layers:
        raise InputError(
            f"parallel.pipeline={plan.pp} x virtual_pipeline={plan.vpp}: {chunks} chunks, but the model has "
            f"{num_layers} layers; allowed: at most one chunk per layer"
        )
    each, left = divmod(num_layers, chunks)
    return tuple(each + (chunk < left) for chunk in range(chunks))


def _check_groups(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """Groups of weights that share a scale must not be cut by tensor parallelism, and the device must read them."""
    from megatron_edge.recipe import quant_rules, rule_of  # imports torch: not when only refusing a typo

    rules, dims = quant_rules(config.quant, hf_config), dims_of(hf_config)
    found: dict[tuple[str, QuantRule], ParamRule] = {}
    for linear in all_rules(rules_of(hf_config), dims):
        if linear.is_linear and (rule := rule_of(linear.module, rules, config.quant.exclude)) is not None:
            kind = linear.module.split(".", 3)[3].split(".experts.")[0]
            found.setdefault((f"{kind} {linear.targets[0].split('.')[-2]}", rule), linear)
    for (_, rule), linear in found.items():
        if rule.weight in ("int4", "nvfp4"):
            _check_group(config, rule, linear, dims)
        _check_llama_cpp_rows(config, rule, linear, dims)


def _check_group(config: RunConfig, rule: QuantRule, linear: ParamRule, dims: ModelDims) -> None:
    """One recipe at one of the layers that have it."""
    quant, device, parallel = config.quant, config.device, config.parallel
    own = rule.linear != "*"  # an override's
    asked = next(o.group_size for o in quant.overrides if o.pattern == rule.pattern) if own else quant.group_size
    where = f"quant.overrides ({rule.pattern!r})" if own else "quant"
    name = " and ".join(target.split(".")[-2] for target in linear.targets)
    size = dims.size(linear.shape[1])
    field, degree = ("expert_tensor", parallel.expert_tensor) if linear.is_expert else ("tensor", parallel.tensor)
    group = rule.group_size
    if linear.split_axis == 1 and size // degree % group:
        able = ", ".join(str(n) for n in range(1, degree) if size % n == 0 and size // n % group == 0)
        raise InputError(
            f"parallel.{field}={degree}: the shard of {name} has {size}/{degree} = {size // degree} inputs, "
            f"no multiple of the group of {group} ({where}.group_size={asked}); allowed for {name}: {able}"
        )
    if rule.weight == "int4" and group not in device.group_sizes:
        raise InputError(
            f"{where}.group_size={asked}: the {size} inputs of {name} allow groups of {group}, which "
            f"device={device.name} ({device.runtime}) does not read; allowed: {list(device.group_sizes)}"
        )
    outputs = [dims.size(part) for part in (("heads", "kv") if linear.merge == "qkv" else linear.shape[:1])]
    if rule.weight == "int4" and device.runtime == EDGE_LLM_RUNTIME and any(n % EDGE_LLM_GROUP for n in outputs):
        raise InputError(
            f"{where}.weight=int4: {' and '.join(map(str, outputs))} outputs of {name} are no multiples of "
            f"{EDGE_LLM_GROUP}, which device={device.name} ({device.runtime}) wants; allowed: another format"
        )


def _check_llama_cpp_rows(config: RunConfig, rule: QuantRule, linear: ParamRule, dims: ModelDims) -> None:
    """A row is a whole number of llama.cpp's blocks."""
    device, size, block = config.device, dims.size(linear.shape[1]), LLAMA_CPP_BLOCKS.get(rule.weight, 1)
    if size % block and (device.runtime == "llama.cpp" or "gguf" in config.export.targets):
        own = f"quant.overrides ({rule.pattern!r})" if rule.linear != "*" else "quant"
        name = " and ".join(target.split(".")[-2] for target in linear.targets)
        able = ", ".join(f for f in device.weight_formats if size % LLAMA_CPP_BLOCKS.get(f, 1) == 0)
        raise InputError(
            f"{own}.weight={rule.weight}: llama.cpp packs {block} weights, which do not divide the {size} inputs of "
            f"{name}; allowed on device={device.name}: {able}"
        )


def _check_tables(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """A table must be one that the model has, and the device must read its blocks."""
    from megatron_edge.artifact.tables import tables_of  # imports torch

    quant, device = config.quant, config.device
    for table in tables_of(quant, hf_config):
        if table.format == "int4" and table.group_size not in device.group_sizes:
            raise InputError(
                f"quant.embedding_group_size={quant.embedding_group_size}: the {table.shape[1]} values of a row of "
                f"{table.name} allow groups of {table.group_size}, which device={device.name} ({device.runtime}) does "
                f"not read; allowed: {list(device.group_sizes)}"
            )
        by_llama_cpp = device.runtime == "llama.cpp" or "gguf" in config.export.targets
        if table.format != "bf16" and by_llama_cpp and table.shape[1] % 32:
            raise InputError(
                f"quant.embedding={quant.embedding}, quant.head={quant.head}: llama.cpp packs 32 values, "
                f"which do not divide the {table.shape[1]} of a row of {table.name}; allowed: bf16"
            )


def _check_recipe(config: RunConfig) -> None:
    quant = config.quant
    for where, part in parts_of(quant):
        for field, value, allowed in (
            ("activation", part.activation, ACTIVATIONS[part.weight]),
            ("group_size", part.group_size, GROUP_SIZES[part.weight]),
        ):
            if value not in allowed:
                words = " or ".join(str(a) for a in allowed)
                raise expected(f"{where}.{field}", value, f"{words} with {where}.weight={part.weight}")
    algorithms = {name: weight for weight in ("none", *weights_of(quant)) for name in ALGORITHMS[weight]}
    if quant.algorithm not in algorithms:
        words = " or ".join(algorithms)
        raise expected("quant.algorithm", quant.algorithm, f"{words} with quant.weight={quant.weight}")
    _check_calibration(quant, config.kv.format)


def _check_calibration(quant: QuantConfig, kv: str) -> None:
    """A way to calibrate that has nothing to act on is a mistake, not a wish."""
    parts = [part for _, part in parts_of(quant)]
    on_data = any(part.activation != "none" for part in parts) or kv in ("fp8", "nvfp4")
    if quant.algorithm == "smoothquant" and not any(part.activation == "int8" for part in parts):
        raise expected("quant.algorithm", quant.algorithm, "max with quant.activation=none: only inputs gain from it")
    if quant.calibration == "percentile" and not on_data:
        raise expected("quant.calibration", "percentile", "max or mse: no input nor KV cache has a static scale here")
    if quant.calibration == "mse" and not weights_of(quant) and not on_data:
        raise expected("quant.calibration", "mse", "max with quant.weight=none and this kv.format")
    if quant.calibration == "mse" and quant.algorithm == "awq_clip":
        raise expected("quant.calibration", "mse", "max or percentile with quant.algorithm=awq_clip, which sets scales")
