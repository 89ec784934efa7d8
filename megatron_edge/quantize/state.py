"""Quantizer state as ordinary shards of tensors, cut like the weights they belong to, so that it reshards as they do.

modelopt's own sharded state misplaces block maxima of SwiGLU layers and refuses some layouts; none of it is used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_edge.artifact import formats
from megatron_edge.contracts import QuantPlan
from megatron_edge.model.build import is_copy_of_embedding, named_shards
from megatron_edge.quantize.apply import enabled_quantizers, set_amax
from megatron_edge.quantize.maxima import is_row_parallel, wants_data
from megatron_edge.quantize.policy import rule_for

PREFIX = "quantizer."


def amax_keys(name: str, is_block: bool) -> tuple[str, ...]:
    """Keys of a quantizer's maximum in a checkpoint: two where each row has its own (`is_block`) and the layer is gated
    (gate rows, up rows), else one."""
    gated = is_block and ".linear_fc1." in name
    return tuple(f"{PREFIX}{name}.amax{part}" for part in ((".gate", ".up") if gated else ("",)))


def block_shape(weight: Tensor, fmt: str, group_size: int) -> tuple[int, int] | None:
    """[rows, maxima per row] of a weight shard; None where the whole tensor has one."""
    columns = formats.scales_per_row(fmt, weight.shape[1], group_size)
    return (weight.shape[0], columns) if columns else None


class AmaxShard(NamedTuple):
    """This rank's part of a maximum: `axis` is the dimension that tensor parallelism splits (an expert's own, where
    `is_expert`), None where replicated. `is_copy`: of a tied embedding, on the stage of the output layer."""

    data: Tensor
    axis: int | None
    is_expert: bool
    is_copy: bool = False


def quantizer_shards(model: nn.Module, plan: QuantPlan) -> dict[str, AmaxShard]:
    """Every calibrated maximum of this shard by its key in a checkpoint."""
    shards = {}
    for name, quantizer, block in _calibrated(model, plan):
        keys = amax_keys(name, block is not None)
        where = (".local_experts." in name, is_copy_of_embedding(name, model))
        if block is None:
            shards[keys[0]] = AmaxShard(quantizer._amax.reshape(1), None, *where)
            continue
        axis: int | None = 0
        if is_row_parallel(name):  # the rows of int8 are whole on no rank, and their maxima the same on all
            axis = 1 if quantizer.backend_extra_args["format"] == "int4" else None
        parts = quantizer._amax.reshape(block).chunk(len(keys))
        shards.update((key, AmaxShard(part.contiguous(), axis, *where)) for key, part in zip(keys, parts, strict=True))
    return shards


def set_quantizer_state(model: nn.Module, plan: QuantPlan, loaded: dict[str, Tensor]) -> None:
    """Puts loaded maxima (this rank's shards, by the keys of `quantizer_shards`) into the quantizers."""
    for name, quantizer, block in _calibrated(model, plan):
        parts = [loaded[key] for key in amax_keys(name, block is not None)]
        set_amax(quantizer, torch.cat([part.reshape(-1) for part in parts]) if block else parts[0].reshape(()))


def prepare_quantizer_state(model: nn.Module, plan: QuantPlan) -> None:
    """Gives every static quantizer a maximum of the right shape, before a load fills it."""
    weights = _weights(model)
    for name, quantizer in enabled_quantizers(model).items():
        args, device = quantizer.backend_extra_args, next(model.parameters()).device
        if args["role"] == "weight":
            shape = block_shape(weights[name.rsplit(".", 1)[0]], args["format"], args["group_size"])
            set_amax(quantizer, torch.ones(shape or (), device=device))
        elif wants_data(quantizer):
            set_amax(quantizer, torch.ones((), device=device))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): param for name, param in named_shards(model).items()}


def _calibrated(model: nn.Module, plan: QuantPlan) -> list[tuple[str, Any, tuple[int, int] | None]]:
    """(name, quantizer, block shape or None) of each quantizer that holds a maximum."""
    weights = _weights(model)
    found = []
    for name, quantizer in enabled_quantizers(model).items():
        if not hasattr(quantizer, "_amax"):
            continue
        module, role = name.rsplit(".", 1)
        rule = rule_for(module, plan)
        is_weight = role == "weight_quantizer" and rule is not None
        block = block_shape(weights[module], rule.weight, rule.group_size) if is_weight and rule else None
        found.append((name, quantizer, block))
    return found
