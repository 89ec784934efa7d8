"""From a checkpoint to the canonical artifact: every linear layer encoded in its format, nothing left unsaid."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_edge.artifact import formats
from megatron_edge.artifact.store import ArtifactWriter
from megatron_edge.contracts import InputError, LinearEntry, ParamRule, QuantPlan
from megatron_edge.export.gather import CheckpointTensors, cut
from megatron_edge.families import ModelDims, all_rules, dims_of, rules_of
from megatron_edge.quantize.policy import rule_for
from megatron_edge.quantize.state import PREFIX, amax_keys

log = logging.getLogger("megatron_edge")


@dataclass
class Compressed:
    """What was written, as the manifest will say it; `dtype` is the one that the model was trained in."""

    linears: dict[str, LinearEntry]
    kv: dict[str, Any]
    dtype: str


def compress(checkpoint: Path, writer: ArtifactWriter, hf_config: dict, plan: QuantPlan) -> Compressed:
    """Streams every parameter of `checkpoint` into `writer`, quantised as `plan` says. One process.

    Raises:
        InputError: a tensor or a quantizer's maximum is missing, or a pre_quant_scale is left.
    """
    source = CheckpointTensors(checkpoint)
    left = [name for name in source.names() if "pre_quant_scale" in name]
    if left:
        raise InputError(f"{checkpoint}: pre_quant_scale is left unfolded in {left[:3]}; nothing was exported")
    dims = dims_of(hf_config)
    done = Compressed(linears={}, kv={"format": plan.kv}, dtype="")
    for rule in all_rules(rules_of(hf_config), dims):
        whole = source.read(rule.pattern)
        done.dtype = done.dtype or str(whole.dtype).removeprefix("torch.")
        chosen = rule_for(rule.pattern.removesuffix(".weight"), plan)
        if chosen is None or chosen.weight == "none":
            for name, tensor in cut(whole, rule, dims).items():
                writer.add(name, tensor.to(torch.bfloat16), "bf16")
        else:
            for name, entry in _encode_linear(source, rule, whole, dims, chosen, writer):
                done.linears[name] = entry
    if plan.kv in formats.STATIC_KV_FORMATS:
        _add_kv_scales(source, writer, dims, plan.kv)
    return done


def _encode_linear(
    source: CheckpointTensors, rule: ParamRule, whole: Tensor, dims: ModelDims, chosen: Any, writer: ArtifactWriter
) -> Iterator[tuple[str, LinearEntry]]:
    module = rule.pattern.removesuffix(".weight")
    per_row = formats.scales_per_row(chosen.weight, whole.shape[1], chosen.group_size)
    is_block = per_row > 0
    keys = amax_keys(f"{module}.weight_quantizer", is_block)
    amax = torch.cat([source.read(key) for key in keys])
    amax_parts = cut(amax, rule, dims, columns_per_entry=whole.shape[1] // per_row) if is_block else {}
    input_scale = None
    if chosen.activation != "none":
        input_amax = source.read(f"{PREFIX}{module}.input_quantizer.amax").reshape(())
        input_scale = formats.tensor_scale(chosen.activation, input_amax)
    for weight_name, weight in cut(whole, rule, dims).items():
        name = weight_name.removesuffix(".weight")
        encoded = formats.encode(
            chosen.weight, weight, amax_parts[weight_name] if is_block else amax.reshape(()), chosen.group_size
        )
        tensors = {"codes": f"{name}.weight_codes", "scale": f"{name}.weight_scale"}
        writer.add(tensors["codes"], encoded.codes, chosen.weight)
        writer.add(tensors["scale"], encoded.scale, "scale")
        if encoded.global_scale is not None:
            tensors["global_scale"] = f"{name}.weight_global_scale"
            writer.add(tensors["global_scale"], encoded.global_scale, "scale")
        if input_scale is not None:
            tensors["input_scale"] = f"{name}.input_scale"
            writer.add(tensors["input_scale"], input_scale, "scale")
        shape = (weight.shape[0], weight.shape[1])
        yield name, LinearEntry(chosen.weight, chosen.activation, chosen.group_size, shape, tensors)


def _add_kv_scales(source: CheckpointTensors, writer: ArtifactWriter, dims: ModelDims, fmt: str) -> None:
    for layer in range(dims.num_layers):
        for which in "kv":
            key = f"{PREFIX}decoder.layers.{layer}.self_attention.core_attention.{which}_bmm_quantizer.amax"
            scale = formats.tensor_scale(fmt, source.read(key).reshape(()))
            writer.add(f"model.layers.{layer}.self_attn.{which}_scale", scale, "scale")
