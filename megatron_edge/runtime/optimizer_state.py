"""Adam's state by model parameter, whatever optimizer of Megatron's holds it.

Megatron's own sharded optimizer state does not reshard between expert-parallel layouts, nor between a distributed
optimizer and an ordinary one, and its restore fails without TransformerEngine or apex (distrib_optimizer.py:642, :940).
Here every tensor of it has the shape of its parameter, so that a checkpoint stores it as it stores the parameter.
Called by checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Slot:
    """What one rank's optimizer keeps for a parameter: `main`, which it updates, is elements [begin, end) of it: the
    parameter's own memory in fp32, else an fp32 copy."""

    inner: Any
    main: Tensor
    begin: int
    end: int


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Megatron's optimizers of this rank, one or several chained; each has torch's as `optimizer`."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _slots(optimizer: Any) -> dict[nn.Parameter, _Slot]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    slots: dict[nn.Parameter, _Slot] = {}
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            for param, (group, order) in inner.model_param_group_index_map.items():
                part = inner._get_model_param_range_map(param)["param"]
                main = inner.optimizer.param_groups[group]["params"][order]
                slots[param] = _Slot(inner, main, part.start, part.end)
            continue
        for param, main in _pairs(inner):
            slots[param] = _Slot(inner, main, 0, param.numel())
    return slots


def _pairs(inner: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(model parameter, the tensor that the optimizer updates) of an ordinary optimizer."""
    for models, mains in zip(
        getattr(inner, "float16_groups", []), getattr(inner, "fp32_from_float16_groups", []), strict=True
    ):
        yield from zip(models, mains, strict=True)
    own = getattr(inner, "fp32_from_fp32_groups", None)
    groups = own if own is not None else [group["params"] for group in inner.optimizer.param_groups]
    for group in groups:
        yield from ((param, param) for param in group)


def kinds_of(params: list[nn.Parameter]) -> tuple[str, ...]:
    """What is kept for each parameter; "main" is its fp32 value where the model computes with another."""
    return (*MOMENTS, "main") if any(param.dtype is not torch.float32 for param in params) else MOMENTS


def _groups_of(optimizer: Any, params: list[nn.Parameter]) -> dict[nn.Parameter, Any]:
    """The ranks that hold the parts of each parameter's state, also where this rank holds none; None: all is here."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    groups: dict[nn.Parameter, Any] = dict.fromkeys(params)
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            groups.update((param, inner.data_parallel_group) for buffer in inner.buffers for param in buffer.params)
    return groups


@torch.no_grad()
def gather_state(optimizer: Any, params: list[nn.Parameter]) -> tuple[dict[nn.Parameter, dict[str, Tensor]], int]:
    """fp32 tensors of each parameter's shape by kind, and the number of steps taken; the optimizer's own tensors where
    no ranks share them, to be read before the next step. All ranks call it, with their parameters in the same order."""
    slots, kinds, groups = _slots(optimizer), kinds_of(params), _groups_of(optimizer, params)
    found: dict[nn.Parameter, dict[str, Tensor]] = {}
    for param in params:
        found[param] = {}
        for kind in kinds:
            kept = None
            if param in slots:
                slot = slots[param]
                kept = slot.main.detach() if kind == "main" else slot.inner.optimizer.state[slot.main][kind]
            if groups[param] is None and kept is not None:
                found[param][kind] = kept.view(param.shape)
                continue
            whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
            if kept is not None:
                whole[slot.begin : slot.end] = kept.reshape(-1)
            if groups[param] is not None:
                dist.all_reduce(whole, group=groups[param])  # each element is on one rank, zero on the others
            found[param][kind] = whole.view(param.shape)
    return found, _steps(optimizer)


def empty_state(params: list[nn.Parameter]) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Tensors for a checkpoint to fill."""
    kinds = kinds_of(params)
    return {p: {kind: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for kind in kinds} for p in params}


@torch.no_grad()
def set_state(optimizer: Any, loaded: dict[nn.Parameter, dict[str, Tensor]], steps: int) -> None:
    """Puts whole tensors, as `gather_state` gives them, into this rank's optimizer. Parameters must have been loaded
    before."""
    for param, slot in _slots(optimizer).items():
        parts = {kind: tensor.reshape(-1)[slot.begin : slot.end] for kind, tensor in loaded[param].items()}
        state = slot.inner.optimizer.state[slot.main]
        for kind in MOMENTS:
            state[kind] = parts[kind].view(slot.main.shape).clone()
        if "main" in parts:
            slot.main.copy_(parts["main"].view(slot.main.shape))
    for inner in inner_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            if is_torch_adam(inner):
                for main in group["params"]:  # one tensor each: shared, it would be counted up once per parameter
                    where = main.device if group["fused"] else torch.device("cpu")  # where Adam counts
                    inner.optimizer.state[main]["step"] = torch.full((), float(steps), device=where)
            else:
                group["step"] = steps


def is_torch_adam(inner: Any) -> bool:
    """torch's Adam counts steps for each parameter, the fused ones of TransformerEngine and apex for each group."""
    return isinstance(inner.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _steps(optimizer: Any) -> int:
    for inner in inner_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            for main in group["params"]:
                if is_torch_adam(inner):
                    return int(inner.optimizer.state[main]["step"])
            if "step" in group:
                return int(group["step"])
    return 0
