"""Quantizer state as ordinary sharded tensors, cut like the weights they belong to, so that it reshards as they do.

modelopt's own sharded state misplaces block maxima of SwiGLU layers and refuses some layouts; none of it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_edge.contracts import QuantPlan
from megatron_edge.quantize.apply import enabled_quantizers, set_amax
from megatron_edge.quantize.policy import rule_for

PREFIX = "quantizer."
_ROW_PARALLEL = ("linear_proj", "linear_fc2")


def amax_keys(name: str, is_block: bool) -> tuple[str, ...]:
    """Keys of a quantizer's maximum in a checkpoint: two for a gated layer's blocks (gate rows, up rows), else one."""
    gated = is_block and ".linear_fc1." in name
    return tuple(f"{PREFIX}{name}.amax{part}" for part in ((".gate", ".up") if gated else ("",)))


def block_shape(weight: Tensor, group_size: int) -> tuple[int, int]:
    """[rows, groups per row] of an int4 weight shard."""
    return weight.shape[0], weight.shape[1] // group_size


def sharded_quantizer_state(model: nn.Module, plan: QuantPlan, *, tp_rank: int, tp: int, dp_rank: int) -> dict[str, Any]:
    """Megatron ShardedTensors of every calibrated maximum of this shard; the data are what a load fills."""
    from megatron.core.dist_checkpointing import ShardedTensor

    state = {}
    for name, quantizer, block in _calibrated(model, plan):
        amax = quantizer._amax
        if block is None:
            (key,) = amax_keys(name, False)
            replica = (0, tp_rank, dp_rank)
            state[key] = ShardedTensor.from_rank_offsets(key, amax.reshape(1), replica_id=replica)
            continue
        axis = 1 if name.split(".")[-2] in _ROW_PARALLEL else 0
        keys = amax_keys(name, True)
        for key, part in zip(keys, amax.reshape(block).chunk(len(keys)), strict=True):
            state[key] = ShardedTensor.from_rank_offsets(
                key, part.contiguous(), (axis, tp_rank, tp), replica_id=(0, 0, dp_rank)
            )
    return state


def set_quantizer_state(model: nn.Module, plan: QuantPlan, loaded: dict[str, Tensor]) -> None:
    """Puts loaded maxima (this rank's shards, keys of `sharded_quantizer_state`) into the quantizers."""
    for name, quantizer, block in _calibrated(model, plan):
        parts = [loaded[key] for key in amax_keys(name, block is not None)]
        set_amax(quantizer, torch.cat([part.reshape(-1) for part in parts]) if block else parts[0].reshape(()))


def prepare_quantizer_state(model: nn.Module, plan: QuantPlan) -> None:
    """Gives every static quantizer a maximum of the right shape, before a load fills it."""
    weights = _weights(model)
    for name, quantizer in enabled_quantizers(model).items():
        args = quantizer.backend_extra_args
        if args["format"] == "int8":
            continue
        device = next(model.parameters()).device
        if args["format"] == "int4":
            rows, groups = block_shape(weights[name.rsplit(".", 1)[0]], args["group_size"])
            set_amax(quantizer, torch.ones(rows * groups, device=device))
        else:
            set_amax(quantizer, torch.ones((), device=device))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    from megatron_edge.model.build import named_shards

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
        is_block = role == "weight_quantizer" and rule is not None and rule.weight == "int4"
        found.append((name, quantizer, block_shape(weights[module], rule.group_size) if is_block and rule else None))
    return found
